"""Parts on a real model: adapters, merges, a library, routing, experts and decoding on a model that others trained.

``python -m benchmarks.real_parts --full --model FOLDER``. Without a model the base is the one of `_silos`.

**Setting.** Some participants train a part each, at the default rate of its kind, on the documentation of one project;
what is measured is text of the same project that no part has seen, and general text: the documentation of projects of
which there is no part. Losses are in nats per token over stretches of 128 tokens. Everything is made as the verbs make
it. Trained parts and figures are kept below ``runs/real-parts``, and a run that was stopped goes on from there.

**What is wanted.** Parts help on text of their kind; routing keeps most of that; the library finds the right project;
an expert answers for its own text; a text by speculation is the assistant's own; merged models are merged adapters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._measure import Measurement, main, measured
from benchmarks._silos import PLACE, BaseSize, Texts, stage, texts
from potluck.compose.adapter import Adapter, load_adapter, save_adapter
from potluck.compose.base import Base, load_base, token_stream
from potluck.compose.decoding.decode import Sampling, decode
from potluck.compose.decoding.deferral import Lesson as Gates
from potluck.compose.decoding.deferral import learn_deferral
from potluck.compose.decoding.models import Here
from potluck.compose.decoding.rules import Speculative
from potluck.compose.effect import losses, stretches
from potluck.compose.experts.assembly import assembled, routing_shares
from potluck.compose.experts.parts import Expert, load_expert, save_expert
from potluck.compose.experts.training import train_expert
from potluck.compose.library.search import index_of, nearest
from potluck.compose.library.specification import specification_of
from potluck.compose.library.storage import Files
from potluck.compose.library.yardstick import yardstick_of
from potluck.compose.lora import attached, copied_with, merge_into, train_adapter
from potluck.compose.merging.adapters import ADAPTER_METHODS, MEASURED, merge_adapters
from potluck.compose.merging.lego import Lego
from potluck.compose.merging.models import MODEL_METHODS, merge_models
from potluck.compose.routing.arrow import Arrow, arrow, mean_shares
from potluck.compose.routing.evidence import by_evidence, token_profile
from potluck.compose.statistics import Statistics, fisher_statistics, gram_statistics
from potluck.compose.training import Lesson
from potluck.models.mixture import TokenRouter
from potluck.recipe.seeds import seed_of

_LENGTH = 128
_WITH_BASE = ("multislerp", "ties", "task_arithmetic")
Losses = Mapping[str, float]  # of each text


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        model: The base, a model folder; one trained here if empty.
        parts: Who trains adapters and experts, the first `experts` of them the latter.
        others: Whose text is general text, and who is in the library besides.
        steps, batch_size: Of training a part.
        held_out: Stretches of each text that are measured.
        entry, query: Windows of text of an entry of the library, and of a search.
        merges: Methods of merging adapters, and the weight of each adapter.
        models: Methods of merging the first two participants' models.
        said: Tokens that are generated.
        gates: Stretches of 128 tokens that deferral learns from, in all.
    """

    base: BaseSize
    model: str = ""
    parts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    experts: int = 2
    rank: int = 8
    steps: int = 20
    batch_size: int = 1
    held_out: int = 5
    entry: int = 24
    query: int = 8
    merges: tuple[tuple[str, float], ...] = (
        *((method, 0.5) for method in ("svd", "ties", "dare_ties", "lego", "regmean", "fisher")),
        ("svd", 0.75),
    )
    models: tuple[str, ...] = ("linear", "multislerp")
    said: int = 24
    gates: int = 20


_BASE = BaseSize(vocabulary=1024, layers=2, width=64, heads=2, feedforward=176, steps=100)
SIZES = {
    "short": Size(base=_BASE, steps=10, held_out=4),
    "full": Size(base=_BASE, parts=("httpx", "learnware"), others=("tinygrad", "typer")),
}


@dataclass(frozen=True)
class Place:
    """What all stages share, and where they keep what they made."""

    size: Size
    folder: Path
    everybody: Mapping[str, Texts]

    @cached_property
    def base(self) -> Base:
        return load_base(Path(self.size.model)) if self.size.model else stage(0, self.size.base).base

    @cached_property
    def names(self) -> tuple[str, ...]:
        return self.size.parts or tuple(self.everybody)[:2]

    @cached_property
    def others(self) -> tuple[str, ...]:
        return self.size.others or tuple(name for name in self.everybody if name not in self.names)

    def stream(self, documents: Sequence[str]) -> np.ndarray:
        return token_stream(documents, self.base.vocabulary)

    @cached_property
    def measured(self) -> dict[str, np.ndarray]:
        """Text that no part has seen: of each participant with a part, and general."""
        most = self.size.held_out * _LENGTH + 1
        found = {name: self.stream(self.everybody[name].held_out)[:most] for name in self.names}
        each = -(-most // len(self.others))
        general = [self.stream(self.everybody[name].held_out)[:each] for name in self.others]
        return found | {"general": np.concatenate(general)}

    @cached_property
    def public(self) -> np.ndarray:
        """A little of everybody's text that the base may know."""
        return self.stream([text[:8000] for one in self.everybody.values() for text in one.base[:2]])

    def own(self, name: str) -> np.ndarray:
        return self.stream([*self.everybody[name].base, *self.everybody[name].own])

    def lesson(self, name: str) -> Lesson:
        seed = seed_of(0, name)
        return Lesson(self.size.steps, self.size.batch_size, _LENGTH, seed=seed, device="cpu")

    def adapter(self, name: str) -> Adapter:
        folder = self.folder / "adapters" / name
        if not (folder / "adapter_config.json").exists():
            adapter = train_adapter(self.base, [self.own(name)], self.lesson(name), self.size.rank)
            save_adapter(adapter, folder)
        return load_adapter(folder)

    def expert(self, name: str) -> Expert:
        folder = self.folder / "experts" / name
        if not (folder / "expert.json").exists():
            made = train_expert(self.base, self.own(name), self.public, self.lesson(name), name, self.size.rank)
            save_expert(made, folder)
        return load_expert(folder)

    def losses(self, model: Any, names: Sequence[str] = ()) -> Losses:
        chosen = names or tuple(self.measured)
        rows = {name: stretches(self.base.model, self.measured[name], _LENGTH) for name in chosen}
        return {name: float(losses(model, read, "cpu").mean()) for name, read in rows.items()}

    def known(self, name: str, make: Callable[[], Any]) -> Any:
        """Figures that were had before, or that are had now and kept."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = make()
            path.write_text(json.dumps(found, indent=1))
            print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def measure(size: Size) -> list[Measurement]:
    folder = PLACE.parent / "real-parts" / f"{seed_of(json.dumps(asdict(size)))}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {*size.parts, *size.others}
    place = Place(size, folder, {n: t for n, t in texts().items() if not wanted or n in wanted})
    with torch.random.fork_rng(devices=[]):
        found = [*_adapters(place), *_merged(place), *_decoding(place), *_models(place)]
        return [*found, *_answered(place), *_library(place), *_experts(place)]


def _adapters(place: Place) -> list[Measurement]:
    """Own adapters, and all of them routed by evidence."""
    base = place.known("base", lambda: place.losses(place.base.model))
    rows = [measured(f"{name}, base", [loss], "nats per token") for name, loss in base.items()]
    for name in place.names:
        after = place.known(f"adapter-{name}", lambda name=name: _with(place, place.adapter(name), (name, "general")))
        rows.append(measured(f"{name}, own adapter", [after[name]], "nats per token", at_most=base[name]))
        rows.append(measured(f"general, adapter of {name}", [after["general"]], "nats per token"))
    routed = place.known("evidence", lambda: _routed(place))
    kept = [
        (base[name] - routed[name]) / (base[name] - place.known(f"adapter-{name}", dict)[name]) for name in place.names
    ]
    rows.append(
        measured("adapters by evidence: share of the own adapters' gain", kept, "1", at_least=_least(place, 0.8))
    )
    rows.append(measured("general, adapters by evidence", [routed["general"]], "nats per token"))
    chosen = place.known("arrow", lambda: _by_arrow(place))
    gains = [base[name] - chosen["losses"][name] for name in place.names]
    right = [chosen["shares"][name][name] for name in place.names]
    return [
        *rows,
        measured("adapters by arrow: mean gain", [_mean(gains)], "nats"),
        measured("adapters by arrow: of the tokens of a text, to its own adapter", right, "1"),
    ]


def _with(place: Place, adapter: Adapter, names: Sequence[str]) -> Losses:
    with attached(place.base.model, adapter):
        return place.losses(place.base.model, names)


def _routed(place: Place) -> Losses:
    adapters = {name: place.adapter(name) for name in place.names}
    size = place.base.model.config.vocab_size
    profiles = {name: token_profile(place.own(name), place.public, size) for name in adapters}
    with by_evidence(place.base.model, adapters, profiles):
        return place.losses(place.base.model)


def _by_arrow(place: Place) -> Any:
    adapters, found, shares = {name: place.adapter(name) for name in place.names}, {}, {}
    for name in place.names:
        with arrow(place.base.model, adapters, Arrow(top_k=1)) as routed:
            found |= place.losses(place.base.model, (name,))
            shares[name] = mean_shares(routed)
    return {"losses": found, "shares": shares}


def _statistics(place: Place, method: str) -> list[Statistics]:
    """What each participant measures on its own text, where the method needs it."""
    kind = MEASURED.get(ADAPTER_METHODS[method])
    if kind is None:
        return []
    measure_it = {"gram": gram_statistics, "fisher": fisher_statistics}[kind]
    most = place.size.steps * place.size.batch_size * _LENGTH
    return [measure_it(place.base, place.adapter(name), place.own(name)[:most]) for name in place.names]


def _merged(place: Place) -> list[Measurement]:
    """All adapters as one of the same rank, on everybody's text."""
    rows = []
    base = place.known("base", dict)
    for method, weight in place.size.merges:

        def merged(method: str = method, weight: float = weight) -> Losses:
            adapters = [place.adapter(name) for name in place.names]
            weights, statistics = [weight] * len(adapters), _statistics(place, method)
            if method == "lego":
                made = merge_adapters(adapters, Lego())
            else:
                made = merge_adapters(adapters, ADAPTER_METHODS[method](), weights, statistics=statistics)
            return _with(place, made, tuple(place.measured))

        found = place.known(f"merge-{method}-{weight}", merged)
        gains = [base[name] - found[name] for name in place.names]
        rows.append(measured(f"adapters merged by {method}, weights {weight:g}: mean gain", [_mean(gains)], "nats"))
        rows.append(measured(f"general, {method}, weights {weight:g}", [found["general"]], "nats per token"))
    return rows


def _models(place: Place) -> list[Measurement]:
    """Two participants' whole models, merged; the mean of two models is the base with half of both adapters."""
    one, other = place.names[:2]

    def all_of_them() -> Mapping[str, Losses]:
        halves = merge_adapters([place.adapter(one), place.adapter(other)], ADAPTER_METHODS["sum"](), [0.5, 0.5])
        found = {"halves": _with(place, halves, (one, other))}
        with tempfile.TemporaryDirectory() as scratch:
            folders = [_model(place, name, Path(scratch) / name) for name in (one, other)]
            start = Path(place.base.place)
            for method in place.size.models:
                out = Path(scratch) / "merged"
                merge_models(folders, out, MODEL_METHODS[method](), base=start if method in _WITH_BASE else None)
                found[method] = place.losses(load_base(out).model, (one, other))
                shutil.rmtree(out)
        return found

    found = place.known("models", all_of_them)
    base = place.known("base", dict)
    rows = [
        measured(
            f"models of {one} and {other} merged by {method}: mean gain",
            [_mean([base[n] - found[method][n] for n in (one, other)])], "nats",
        )
        for method in place.size.models
    ]  # fmt: skip
    if "linear" in found:
        apart = max(abs(found["linear"][name] - found["halves"][name]) for name in (one, other))
        rows.append(measured("mean of models against half of both adapters", [apart], "nats per token", at_most=1e-3))
    return rows


def _model(place: Place, name: str, folder: Path) -> Path:
    copied = load_base(Path(place.base.place))
    merge_into(copied.model, place.adapter(name))
    copied.model.save_pretrained(folder)
    for path in Path(place.base.place).glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def _experts(place: Place) -> list[Measurement]:
    """Experts of low rank, assembled."""
    names = place.names[: place.size.experts]

    def mixed() -> Any:
        model = assembled(place.base, [place.expert(name) for name in names])
        shares = {name: routing_shares(model, place.measured[name]) for name in (*names, "general")}
        return {"losses": place.losses(model, (*names, "general")), "shares": shares}

    found, base = place.known("experts", mixed), place.known("base", dict)
    right = [found["shares"][n][n] / (1 - found["shares"][n]["base"] or 1) for n in names]
    gains = [base[n] - found["losses"][n] for n in names]
    return [
        measured("experts of low rank, assembled: mean gain", [_mean(gains)], "nats", at_least=_least(place, 0.0)),
        measured("of what goes to experts, to the right one", right, "1", at_least=_least(place, 0.9)),
        measured("general, experts", [found["losses"]["general"]], "nats per token"),
    ]


def _answered(place: Place) -> list[Measurement]:
    """Which of everybody's experts a text goes to; that is known before there are experts."""
    size, experts = place.base.model.config.vocab_size, len(place.everybody)
    router = TokenRouter(size, experts, experts, place.base.vocabulary.end_of_text)
    evidence = [token_profile(place.own(name), place.public, size) for name in place.everybody]
    right = []
    with torch.no_grad():
        router.evidence.copy_(torch.stack(evidence, dim=1))
        for number, mine in enumerate(place.everybody.values()):
            rows = _spread(place.stream(mine.held_out), 16, _LENGTH).reshape(-1, _LENGTH)
            gates = router(torch.from_numpy(rows)).double().mean((0, 1))[1:]
            right.append(float(gates[number] / gates.sum()))
    name = f"of what goes to {len(right)} experts, to the right one"
    return [measured(name, right, "1", at_least=_least(place, 0.8))]


def _library(place: Place) -> list[Measurement]:
    """Which project a text is of, by specifications of everybody's text."""

    def searched() -> Any:
        began = time.process_time()
        yardstick = yardstick_of(place.base, "benchmark", "cpu", keep=Files(place.folder))
        taken = time.process_time() - began
        window = yardstick.window
        entries, queries = {}, {}
        for name, mine in place.everybody.items():
            own = place.stream([*mine.base, *mine.own])
            entries[name] = yardstick.measure(place.base, _spread(own, place.size.entry, window), "cpu")
            held = _spread(place.stream(mine.held_out), place.size.query, window)
            queries[name] = yardstick.measure(place.base, held, "cpu")
        index = index_of({n: specification_of(s, yardstick) for n, s in entries.items()}, yardstick.gamma)
        best = {name: [match.name for match in nearest(index, states, 2)] for name, states in queries.items()}
        return {"seconds": taken, "best": best}

    found = place.known("library", searched)
    right = _mean([float(best[0] == name) for name, best in found["best"].items()])
    name = f"library: right project of {len(found['best'])} first, {place.size.query} windows"
    return [
        measured(name, [right], "1", at_least=_least(place, 0.8)),
        measured("library: beginning it, CPU time", [found["seconds"]], "s"),
    ]


def _spread(stream: np.ndarray, windows: int, window: int) -> np.ndarray:
    """So many windows of a text, spread evenly over it, as `library add` takes them of a long one."""
    rows = stream[: len(stream) // window * window].reshape(-1, window)
    return rows[np.linspace(0, len(rows) - 1, min(windows, len(rows))).round().astype(int)].reshape(-1)


def _decoding(place: Place) -> list[Measurement]:
    """The base drafts, and the base with the first participant's adapter says what it would have said."""
    name, vocabulary = place.names[0], place.base.vocabulary

    def decoded() -> Any:
        assistant = copied_with(place.base.model, place.adapter(name))
        prompt = [int(token) for token in place.measured[name][:32]]
        here, other = (Here(n, m, vocabulary.size) for n, m in (("base", place.base.model), (name, assistant)))
        ask = {"max_tokens": place.size.said, "stops": vocabulary.stops}
        together = decode(here, [other], Speculative(4), prompt, sampling=Sampling(), **ask)
        theirs = _greedy(other, prompt, place.size.said, vocabulary.stops)
        bases = _greedy(here, prompt, place.size.said, vocabulary.stops)
        said = {"prompt": prompt, "base": bases, "adapter": theirs}
        samples = {which: vocabulary.tokenizer.decode(tokens) for which, tokens in said.items()}
        calls = together.counts[name].calls / max(1, len(together.tokens))
        return {"equal": float(together.tokens == theirs), "calls": calls, "samples": samples}

    def deferred() -> Any:
        assistant = copied_with(place.base.model, place.adapter(name))
        here, other = (Here(n, m, vocabulary.size) for n, m in (("base", place.base.model), (name, assistant)))
        each = place.size.gates * _LENGTH // len(place.everybody)
        text = [vocabulary.tokenizer.decode(place.own(n)[-each:].tolist()) for n in place.everybody]
        return learn_deferral(place.base, here, [other], text, Gates(sequence_length=_LENGTH)).figures

    found, figures = place.known("decoding", decoded), place.known("deferral", deferred)
    nats = figures["nats_per_token"]
    return [
        measured(f"deferral to the adapter of {name}: less than the base", [nats["base"] - nats["deferral"]], "nats"),
        measured("the adapter at every token: less than the base", [nats["base"] - nats[name]], "nats"),
        measured("deferral: calls", [figures["called"]], "of tokens"),
        measured("a text by speculation is the assistant's own", [found["equal"]], "1 = yes", at_least=1),
        measured("calls of the assistant, a token", [found["calls"]], "1"),
    ]


def _greedy(model: Here, prompt: Sequence[int], count: int, stops: frozenset[int]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        following = int(model.log_probs(tokens)[-1].argmax())
        if following in stops:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def _least(place: Place, least: float) -> float | None:
    """Targets are for a real model."""
    return least if place.size.model else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="")
    options, rest = parser.parse_known_args()
    main(measure, {name: replace(size, model=options.model) for name, size in SIZES.items()}, rest)
