"""Editing: speed, flat memory, and eight participants who edit together.

**Setting.** The base of `recipes/world.toml` (``tests/assets/world``), which knows 200 people of a synthetic world.

**Together.** Eight participants with 50 edits each, of different facts. Each sends ``M = Rᵀ K`` and ``G = Kᵀ K``; their
sums are solved once and compared with the update of one editor with all 400, in float64 and from sums in float32. Then
how well the edited models answer, by themselves, after the last edit, beside what is usually done with updates: each
participant solves for itself, and the updates are averaged, added up, or merged by TIES (density 0.2). The score is the
harmonic mean of reliability, rephrase and locality. And once more with a quarter as many facts, of which each is edited
by four participants: together it is made once, as `potluck.edit.together.edit_hashes` decides.

**Speed.** Target values of 100 edits side by side, against one by one; key moments of a text of 10 MB, and how much
memory they add to those of 1 MB; edits a second of WISE, all into one shard, and how much longer EasyEdit takes for the
same edits of the same model, if ``EASYEDIT`` names a clone of it (`benchmarks.peers.easyedit_wise`), its margins
tried at three scales, of which the best score counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from benchmarks._measure import Measurement, main, measured, seconds
from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base, load_base
from potluck.compose.merging.rules import Ties, merged
from potluck.corpus.world import documents_of
from potluck.edit.closed_form import alphaedit_update, asked_in, memit_update, null_space, sums
from potluck.edit.contexts import contexts, hidden_at, keys_at
from potluck.edit.evaluation import Before, answered, answers_before, score_edits, unchanged
from potluck.edit.facts import Edit, write_edits
from potluck.edit.layout import Layout, layout_of
from potluck.edit.moments import key_moments, moment_of
from potluck.edit.side_memory import attached
from potluck.edit.values import ValueSettings, targets
from potluck.edit.weights import WeightSettings, add, put, weight_editor
from potluck.edit.wise import WiseSettings, edit_with_wise, wise_memory
from potluck.edit.world_edits import changed_world

WORLD = Path(__file__).parents[1] / "tests" / "assets" / "world"
PEOPLE = 200
_HELD_BY = 4  # participants who have the same edit
Deltas = Mapping[int, Tensor]
Sums = tuple[Tensor, Tensor]  # M and G
Rule = Callable[[Sequence[Sums], int], Tensor]  # from everybody's sums to a layer's update


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        participants, each: Who edits, and how many edits everyone has.
        values: Edits whose target values are timed.
        alone: Of them, how many one by one.
        text: Characters of the text whose moments are taken.
        wise: Edits of WISE that are timed.
        margins: Scales of EasyEdit's margins.
        people: Whose text the key moments are of.
        runs: Of all that is timed.
        judged: Whether targets are of this size that need many edits or much text; sums are held exact at any.
    """

    seeds: tuple[int, ...]
    participants: int
    each: int
    values: int
    alone: int
    text: int
    wise: int = 20
    margins: tuple[float, ...] = (0.01, 0.1, 1.0)
    people: int = PEOPLE
    runs: int = 3
    judged: bool = True


SIZES = {
    "short": Size(
        seeds=(0,), participants=2, each=4, values=6, alone=2, text=50_000, wise=3, margins=(0.1,), runs=1, judged=False
    ),
    "full": Size(seeds=(0, 1, 2), participants=8, each=50, values=100, alone=20, text=10_000_000),
}


def measure(size: Size) -> list[Measurement]:
    base = load_base(WORLD)
    layout = layout_of(base.model)
    settings = WeightSettings(layers=(4,), at="prompt")  # as `potluck edit locate` says
    moments = key_moments(base, layout, range(layout.count), documents_of(size.people, tellings=2))
    found: dict[str, list[float]] = {}
    for seed in size.seeds:
        edits = changed_world(size.participants * size.each, seed)
        shares = [edits[i :: size.participants] for i in range(size.participants)]
        own = {layer: moment_of(moments, base.content_hash, layout, layer) for layer in settings.layers}
        _judge_together(found, base, layout, settings, shares, own)
    targets_met = {"alphaedit": 1e-9, "memit": 1e-9}
    rows = []
    for name, runs in found.items():
        method, what = name.split(": ")
        limit = {"together from float64": targets_met[method], "together from float32": 1e-5}.get(what)
        unit = "relative error" if limit else "percent"
        lost = 20.0 if what.startswith("lost") else None
        rows.append(measured(name, runs, unit, at_most=limit, at_least=lost, at_size=size.judged or lost is None))
    return [*rows, *_speed(base, layout, settings, moments, size), *_wise(base, size)]


def _judge_together(
    found: dict[str, list[float]],
    base: Base,
    layout: Layout,
    settings: WeightSettings,
    shares: Sequence[Sequence[Edit]],
    moments: Mapping[int, Tensor],
) -> None:
    everybody = [edit for share in shares for edit in share]
    originals = {layer: layout.weight(layer).clone() for layer in settings.layers}
    before = contexts(base, settings.seed)
    z = [targets(base, layout, settings.layers[-1], share, before, settings.values, settings.at) for share in shares]
    free = {layer: null_space(moment, settings.free) for layer, moment in moments.items()}
    keys = keys_at(base, layout, settings.layers, everybody, before, settings.at)
    ridges = {layer: settings.null_weight * asked_in(own.T @ own, free[layer], len(own)) for layer, own in keys.items()}

    def memit(m: Tensor, g: Tensor, layer: int) -> Tensor:
        return memit_update(m, g, moments[layer], settings.moment_weight)

    def alphaedit(m: Tensor, g: Tensor, layer: int) -> Tensor:
        return alphaedit_update(m, g, torch.zeros_like(g), free[layer], ridges[layer])

    scene = _Scene(base, layout, settings, list(zip(shares, z, strict=True)), before, originals)
    unedited = answers_before(base, everybody)
    _judge(found, "memit", memit, scene, unedited)
    _judge(found, "alphaedit", alphaedit, scene, unedited)
    few = [(edit, value) for share, own in scene.parts for edit, value in zip(share, own, strict=True)][::_HELD_BY]
    held = [[few[j] for j in range(len(few)) if (i - j) % len(shares) < _HELD_BY] for i in range(len(shares))]
    once = replace(scene, parts=[_part(few)])
    often = replace(scene, parts=[_part(part) for part in held])
    unedited = answers_before(base, once.edits)
    _judge_often(found, "memit", memit, once, often, unedited)
    _judge_often(found, "alphaedit", alphaedit, once, often, unedited)


def _part(held: Sequence[tuple[Edit, Tensor]]) -> tuple[Sequence[Edit], Tensor]:
    return [edit for edit, _ in held], torch.stack([value for _, value in held])


@dataclass(frozen=True)
class _Scene:
    """A model, and everybody's edits with their target values."""

    base: Base
    layout: Layout
    settings: WeightSettings
    parts: Sequence[tuple[Sequence[Edit], Tensor]]
    contexts: Sequence[str]
    originals: Deltas

    def deltas(self, rule: Rule, pooled: bool = False) -> dict[int, Tensor]:
        """One exchange a layer: everybody's M and G on the weights as they are now, one update for all."""
        layout, layers = self.layout, self.settings.layers
        self.restore()
        parts = [(self.edits, torch.cat([z for _, z in self.parts]))] if pooled else self.parts
        deltas = {}
        for place, layer in enumerate(layers):
            statistics = []
            for edits, z in parts:
                now = hidden_at(self.base, layout, layers[-1], edits, self.settings.at)
                keys = keys_at(self.base, layout, (layer,), edits, self.contexts, self.settings.at)[layer]
                statistics.append(sums(keys, (z - now) / (len(layers) - place)))
            deltas[layer] = rule(statistics, layer)
            add(layout, layer, deltas[layer])
        return deltas

    @property
    def edits(self) -> list[Edit]:
        """Everybody's."""
        return [edit for share, _ in self.parts for edit in share]

    def restore(self) -> None:
        """The unedited model."""
        for layer, value in self.originals.items():
            put(self.layout, layer, value)

    def score(self, unedited: Before) -> float:
        """Harmonic mean of reliability, rephrase and locality, in percent."""
        told = [(edit.prompt, edit.target) for edit in self.edits]
        rephrased = [(prompt, edit.target) for edit in self.edits for prompt in edit.rephrases]
        kept = unchanged(self.base, self.edits, unedited, answers_before(self.base, self.edits))
        shares = [answered(self.base, asked).begins for asked in (told, rephrased)] + [kept.begins]
        return 100 * harmonic_mean([sum(share) / len(share) for share in shares])


def _judge(
    found: dict[str, list[float]],
    method: str,
    solve: Callable[[Tensor, Tensor, int], Tensor],
    scene: _Scene,
    unedited: Before,
) -> None:
    def together(dtype: torch.dtype) -> Rule:
        def rule(parts: Sequence[Sums], layer: int) -> Tensor:
            m, g = (torch.stack([part[i].to(dtype).double() for part in parts]).sum(0) for i in range(2))
            return solve(m, g, layer)

        return rule

    pooled = scene.deltas(together(torch.float64), pooled=True)
    score = scene.score(unedited)
    found.setdefault(f"{method}: harmonic mean together", []).append(score)
    for dtype in (torch.float64, torch.float32):
        deltas = scene.deltas(together(dtype))
        error = max(float((deltas[i] - pooled[i]).norm() / pooled[i].norm()) for i in pooled)
        found.setdefault(f"{method}: together from {str(dtype)[6:]}", []).append(error)
    for name, merge in NAIVE.items():
        scene.deltas(_apart(solve, merge))
        found.setdefault(f"{method}: lost by {name}", []).append(score - scene.score(unedited))
    scene.restore()


def _judge_often(
    found: dict[str, list[float]],
    method: str,
    solve: Callable[[Tensor, Tensor, int], Tensor],
    once: _Scene,
    often: _Scene,
    unedited: Before,
) -> None:
    """Each edit is at several participants: made once, or as often as it is there."""
    once.deltas(lambda parts, layer: solve(*parts[0], layer))
    score = once.score(unedited)
    found.setdefault(f"{method}: harmonic mean together, each edit at {_HELD_BY}", []).append(score)
    for name, merge in NAIVE.items():
        often.deltas(_apart(solve, merge))
        found.setdefault(f"{method}: lost by {name}, each edit at {_HELD_BY}", []).append(score - once.score(unedited))
    once.restore()


def _apart(solve: Callable[[Tensor, Tensor, int], Tensor], merge: Callable[[Tensor], Tensor]) -> Rule:
    """Each participant solves for itself, and the updates are merged."""
    return lambda parts, layer: merge(torch.stack([solve(m, g, layer) for m, g in parts]))


NAIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda stack: stack.mean(0),
    "sum": lambda stack: stack.sum(0),
    "ties": lambda stack: merged(Ties(density=0.2), "w", torch.ones(len(stack)), stack.float()).double(),
}


def _memit(base: Base, moments: Statistics, edits: Sequence[Edit], at_once: int = 0) -> None:
    editor = weight_editor(base, moments, WeightSettings(layers=(4,), at="prompt", values=ValueSettings(enough=0.0)))
    size = at_once or len(edits)
    for begin in range(0, len(edits), size):
        editor.write(edits[begin : begin + size])
    for layer, original in editor.originals.items():
        put(editor.layout, layer, original)


def _speed(base: Base, layout: Layout, settings: WeightSettings, moments: Statistics, size: Size) -> list[Measurement]:
    edits = changed_world(size.values, 0)
    before = contexts(base, settings.seed)
    values = ValueSettings(enough=0.0)  # all steps, whatever they reach

    def find(some: Sequence[Edit]) -> object:
        return targets(base, layout, settings.layers[-1], some, before, values, settings.at)

    ratios = []
    for _ in range(size.runs):
        together = seconds(lambda: find(edits)) / len(edits)
        alone = seconds(lambda: [find([edit]) for edit in edits[: size.alone]]) / size.alone
        ratios.append(alone / together)
    whole = []
    for _ in range(size.runs):
        together = seconds(lambda: _memit(base, moments, edits)) / len(edits)
        alone = seconds(lambda: _memit(base, moments, edits[: size.alone], at_once=1)) / size.alone
        whole.append(alone / together)
    memory = []
    for text in (size.text // 10, size.text):
        taken = seconds(lambda text=text: key_moments(base, layout, settings.layers, _stream(text)))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return [
        measured(
            f"{size.values} MEMIT edits at once against one by one", whole, "x", at_least=5.0, at_size=size.judged
        ),
        measured(f"of it, values of {size.values} edits", ratios, "x"),
        measured(f"key moments of {size.text / 1e6:g} MB", [taken], "s"),
        measured(
            f"memory they add to those of {size.text / 1e7:g} MB",
            [memory[1] - memory[0]],
            "MB",
            at_most=20.0,
            at_size=size.judged,
        ),
    ]


def _wise(base: Base, size: Size) -> Iterator[Measurement]:
    edits = changed_world(size.wise, 9)
    before = answers_before(base, edits)
    ours, ratios, scores = [], [], []
    for run in range(size.runs):
        empty = wise_memory(base, 4, WiseSettings(margin=5.0, quiet=150, seed=run))
        began = perf_counter()
        memory = edit_with_wise(base, empty, edits)
        ours.append(perf_counter() - began)
        with attached(base, memory):
            scores.append(100 * score_edits(base, edits, before).score)
    yield measured(f"WISE, edits a second, of {size.wise}", [size.wise / seconds for seconds in ours], "1/s")
    yield measured("WISE: harmonic mean", scores, "percent")
    clone, best = os.environ.get("EASYEDIT"), ""
    if clone:
        with TemporaryDirectory() as folder:
            write_edits(Path(folder) / "edits.json", edits)
            runs = [_easyedit(clone, Path(folder) / "edits.json", margin) for margin in size.margins]
        theirs = max(runs, key=lambda run: run["score"])
        best = (
            f"EasyEdit: {theirs['seconds']:.1f} s, score {theirs['score']:.0f}, reliability {theirs['reliability']:.0f}"
        )
        ratios = [theirs["seconds"] / seconds for seconds in ours]
    yield measured(
        "WISE: how many times as long EasyEdit takes",
        ratios,
        "x",
        at_least=3.0,
        peer=best or "EASYEDIT names no clone",
        at_size=size.judged,
    )


def _easyedit(clone: str, edits: Path, margin: float) -> dict[str, float]:
    module = "benchmarks.peers.easyedit_wise"
    command = [sys.executable, "-m", module, clone, str(WORLD), str(edits), "4", str(margin)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _stream(characters: int) -> Iterator[str]:
    done = 0
    while done < characters:
        for text in documents_of(PEOPLE, tellings=1):
            yield text
            done += len(text)
            if done >= characters:
                return


if __name__ == "__main__":
    main(measure, SIZES)
