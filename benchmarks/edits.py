"""Three hundred edits, one batch after the other, asked about after the last.

The base of `recipes/world.toml` (``tests/assets/world``) knows 1,000 facts of a synthetic world. 300 of them are given
other values, in batches of 10 (ROME edits one by one). Then the model is asked, and answers by itself: the prompts of
the edits (reliability), two phrasings of each that nobody trained on (rephrase), and two facts of others for each,
which shall be answered as by the unedited model (locality). **given** are the same teacher-forced, as most papers
report them. Editors work at the prompt's last token and in a layer where ``potluck edit locate`` finds the facts. Each
has several settings; `GRID` tries all of them on edits of a seed that is in no figure, and the best harmonic mean is
taken.

**Later**: what of the edits still holds after the folder was saved and loaded, and after a further round of training,
25 steps on sentences about 40 people who are new, beside sentences about facts that were not edited; at the rate of the
training before, and at a tenth of it. **untouched** are facts that were neither edited nor told in that round.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch

from benchmarks._measure import Measurement, main, measured
from benchmarks.forget import learned
from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base, load_base
from potluck.corpus.world import documents_of, facts
from potluck.edit.edited_folder import save_model
from potluck.edit.evaluation import Before, answered, answers_before, as_percent, score_edits
from potluck.edit.facts import Edit
from potluck.edit.grace import GraceSettings, grace_memory
from potluck.edit.layout import layout_of
from potluck.edit.memory_folder import Memory, with_edits
from potluck.edit.moments import key_moments
from potluck.edit.side_memory import attached, save_with_memory
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.weights import WeightSettings, weight_editor
from potluck.edit.wise import WiseSettings, wise_memory
from potluck.edit.world_edits import changed_world

WORLD = Path(__file__).parents[1] / "tests" / "assets" / "world"
PEOPLE = 200
Batches = Sequence[Sequence[Edit]]
Method = Callable[[Base, Statistics, Batches], Memory | None]  # edits in place, or beside


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        at_once: Edits in a batch.
        methods: Names in `METHODS`; all if empty.
        people: Whose text the key moments are of.
        everything: All settings of each, not only those that are taken, and nothing of later.
        rates: At which further people are learned, so many of them.
        untouched: Every so many-th fact that is neither edited nor learned again is asked.
    """

    seeds: tuple[int, ...]
    edits: int = 300
    at_once: int = 10
    methods: tuple[str, ...] = ()
    people: int = PEOPLE
    everything: bool = False
    rates: tuple[float, ...] = (1e-3, 1e-4)
    further: int = 40
    untouched: int = 4


SIZES = {
    "short": Size(seeds=(0,), edits=20, methods=("GRACE", "MEMIT"), rates=(1e-4,), further=10, untouched=17),
    "full": Size(seeds=(0, 1, 2), methods=("ROME", "MEMIT", "AlphaEdit", "GRACE", "WISE", "FT")),
}
GRID = Size(seeds=(9,), everything=True)


def measure(size: Size) -> list[Measurement]:
    asset = load_base(WORLD)
    asset.model.to("cuda" if torch.cuda.is_available() else "cpu")
    moments = key_moments(asset, layout_of(asset.model), (3, 4), documents_of(size.people, tellings=2))
    found: dict[tuple[str, str], list[float]] = {}
    for seed in size.seeds:
        edits = changed_world(size.edits, seed)
        before = answers_before(asset, edits)
        for name, method in chosen(size).items():
            for figure, value in figures(asset, moments, method, edits, before, size, seed).items():
                found.setdefault((name, figure), []).append(value)
    return [_row(name, figure, runs) for (name, figure), runs in found.items()]


def figures(
    asset: Base, moments: Statistics, method: Method, edits: Sequence[Edit], before: Before, size: Size, seed: int
) -> dict[str, float]:
    """What one method comes to."""
    base = replace(asset, model=copy.deepcopy(asset.model))
    began = time.perf_counter()
    memory = method(base, moments, [edits[i : i + size.at_once] for i in range(0, len(edits), size.at_once)])
    seconds = time.perf_counter() - began
    with _at_work(base, memory):
        scores = score_edits(base, edits, before)
    found = {name: value for name, value in as_percent(scores).items() if value is not None and name != "onward"}
    found["seconds an edit"] = seconds / len(edits)
    if not size.everything:
        found |= later(base, memory, edits, before, size, seed)
    return found


def later(
    base: Base, memory: Memory | None, edits: Sequence[Edit], before: Before, size: Size, seed: int
) -> dict[str, float]:
    """What of the edits is left, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "edited"
        if memory is None:
            place.mkdir()
            save_model(base, place)
        else:
            save_with_memory(base, memory, place)
        loaded = load_base(place)
        loaded.model.to(base.model.device)
        again = score_edits(loaded, edits, before)
    touched = {(edit.subject, edit.relation) for edit in edits}
    others = [fact for fact in facts(PEOPLE) if (fact.person, fact.relation.name) not in touched]
    untouched = others[:: size.untouched]
    stays = [fact for fact in others if fact not in untouched]
    found = {"saved and loaded, score": 100 * again.score}
    for rate in size.rates:
        further = learned(base, facts(size.further, first=PEOPLE), stays, 1, seed, rate)
        with _at_work(further, memory):
            trained = score_edits(further, edits, before)
            said = answered(further, [(fact.told[0], fact.value) for fact in untouched])
        found |= {
            f"a round at {rate:g}, reliability": 100 * trained.reliability,
            f"a round at {rate:g}, score": 100 * trained.score,
            f"a round at {rate:g}, untouched": 100 * sum(said.begins) / len(untouched),
        }
    return found


def chosen(size: Size) -> dict[str, Method]:
    """Methods by name, or by name and setting."""
    names = size.methods or METHODS
    if size.everything:
        return {f"{name} ({label})": method for name in names for label, method in METHODS[name].items()}
    return {name: METHODS[name][TAKEN[name]] for name in names}


def _in_weights(settings: WeightSettings) -> Method:
    def edit(base: Base, moments: Statistics, batches: Batches) -> None:
        editor = weight_editor(base, moments, settings)
        for batch in batches:
            editor.write(batch)

    return edit


def _beside(layer: int, settings: GraceSettings | WiseSettings) -> Method:
    def edit(base: Base, moments: Statistics, batches: Batches) -> Memory:
        if isinstance(settings, GraceSettings):
            return reduce(partial(with_edits, base), batches, grace_memory(base, layer, settings))
        return reduce(partial(with_edits, base), batches, wise_memory(base, layer, settings))

    return edit


def _tuned(settings: Tuning) -> Method:
    def edit(base: Base, moments: Statistics, batches: Batches) -> None:
        for batch in batches:
            fine_tune(base, batch, settings)

    return edit


def _at_work(base: Base, memory: Memory | None) -> AbstractContextManager[None]:
    return nullcontext() if memory is None else attached(base, memory)


def _row(name: str, figure: str, runs: Sequence[float]) -> Measurement:
    unit = "s" if figure.startswith("seconds") else "" if figure == "fluency" else "percent"
    return measured(f"{name}: {figure}", runs, unit)


METHODS: Mapping[str, Mapping[str, Method]] = {
    "ROME": {
        f"layer {layer}, ridge {ridge:g}": _in_weights(WeightSettings("rome", (layer,), "prompt", ridge=ridge))
        for layer, ridge in ((4, 0.03), (3, 0.03), (4, 1.0))
    },
    "MEMIT": {
        f"layers {layers}, lambda {weight:g}": _in_weights(
            WeightSettings("memit", layers, "prompt", moment_weight=weight)
        )
        for layers, weight in (((4,), 4000.0), ((4,), 8000.0), ((3, 4), 8000.0), ((4,), 12000.0))
    },
    "AlphaEdit": {
        f"layers {layers}, free {free:g}, L2 {weight:g}": _in_weights(
            WeightSettings("alphaedit", layers, "prompt", free=free, null_weight=weight)
        )
        for layers, free, weight in (((4,), 0.75, 1.0), ((4,), 0.75, 2.0), ((4,), 0.75, 4.0), ((4,), 0.5, 1.0))
    },
    "GRACE": {
        f"layer {layer}, radius {radius:g}": _beside(layer, GraceSettings(radius=radius))
        for layer, radius in ((4, 0.1), (4, 0.3), (4, 0.5), (3, 0.3))
    },
    "WISE": {
        f"layer {layer}, shards of {shard}": _beside(layer, WiseSettings(shard=shard))
        for layer, shard in ((3, 100), (3, 50), (3, 25), (3, 10), (4, 25))
    },
    "FT": {
        f"layer {layer}, rate {rate:g}": _tuned(Tuning((layer,), learning_rate=rate))
        for layer, rate in ((4, 1e-4), (4, 5e-4), (3, 5e-4), (4, 2e-3))
    },
    "LoRA": {
        f"layer {layer}, rate {rate:g}": _tuned(Tuning((layer,), rank=8, learning_rate=rate))
        for layer, rate in ((4, 1e-3), (4, 5e-3), (3, 5e-3))
    },
}  # fmt: skip
TAKEN = {
    "ROME": "layer 4, ridge 0.03",
    "MEMIT": "layers (4,), lambda 8000",
    "AlphaEdit": "layers (4,), free 0.75, L2 2",
    "GRACE": "layer 4, radius 0.5",
    "WISE": "layer 3, shards of 25",
    "FT": "layer 4, rate 0.002",
    "LoRA": "layer 4, rate 0.005",
}


if __name__ == "__main__":
    main(measure, SIZES)
