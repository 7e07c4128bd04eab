"""The cases of `benchmarks.parity`: methods, their recipes, and what came of a run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import _measure
from potluck.comparison import planned_runs
from potluck.corpus.sources import documents
from potluck.embedded import embedded_run, prepare
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe
from potluck.recipe.sources import Package
from potluck.records.events import Event
from potluck.records.folder import POOLED, Variant

PACKAGES = ("stdlib", "torch", "transformers", "numpy", "sympy", "networkx", "pydantic", "pip")
START_RATE = 4e-3  # the best of 2e-3, 4e-3, 8e-3 from random weights
DATA_PARALLEL, DILOCO, STREAMING = "data-parallel", "DiLoCo", "Streaming DiLoCo, P = 5, mixing 0"
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """One form of the benchmark.

    Attributes:
        batch: Sequences of all participants together in one local step, so that a step is as many tokens for any M.
        length: Tokens of a sequence.
        period: Local steps between two exchanges of the same parameters, H.
        rounds: Exchanges of all parameters.
        grid: (participants, split, methods, seeds) that are run.
        best_rates: Learning rates of the methods that do better with another than the others'.
        start_steps: Steps that one party made before, on other documents of the same kind; all cases go on from there.
        text: JSON lines to train on; ``None`` is source code of eight installed packages.
    """

    batch: int
    length: int
    period: int
    rounds: int
    grid: tuple[tuple[int, str, tuple[str, ...], int], ...]
    model: Table = field(default_factory=lambda: {"preset": "tiny"})
    tokenizer: Table = field(default_factory=lambda: {"kind": "bytes"})
    text: str | None = None
    text_bytes: int = 450_000
    held_out_bytes: int = 32_000
    learning_rate: float = 4e-3
    best_rates: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 50
    start_steps: int = 0
    evaluations: int = 10
    compute: Table = field(default_factory=lambda: {"device": "cpu", "threads": 1, "compile": True})


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method changes in the recipe; ``period`` and ``tokens`` are factors of the size's."""

    outer: Table = field(default_factory=dict)
    links: tuple[Table, ...] = ()
    download: Table = field(default_factory=lambda: {"kind": "full"})
    fragments: int = 1
    overlap: int = 1
    mixing: float = 0.5
    period: float = 1.0
    tokens: float = 1.0
    local: Table = field(default_factory=dict)
    every_step: bool = False


INT8, INT4 = {"kind": "quantize", "bits": 8, "block": 256}, {"kind": "quantize", "bits": 4, "block": 64}
SPARSE = ({"kind": "block-top-k", "k": 64, "block": 4096}, {"kind": "quantize", "bits": 2, "block": 64})
NESTEROV = {"kind": "nesterov", "learning_rate": 0.5, "momentum": 0.5}
SPARSELOCO = ({"kind": "error-feedback", "decay": 0.95}, *SPARSE)
LOW_RANK = ({"kind": "error-feedback"}, {"kind": "low-rank", "rank": 8}, INT4)
INT4_DOWN = {"kind": "quantized", "bits": 4, "block": 64}
DELTA = {"kind": "delta"}
METHODS: dict[str, Method] = {  # the way down is fp32 unless the name says otherwise
    DATA_PARALLEL: Method(every_step=True),
    "FedAvg": Method(outer={"kind": "sgd"}),
    DILOCO: Method(outer=NESTEROV),
    "DiLoCo int8": Method(outer=NESTEROV, links=(INT8,)),
    "DiLoCo int4": Method(outer=NESTEROV, links=(INT4,)),
    "DiLoCo int4 both ways": Method(outer=NESTEROV, links=(INT4,), download=INT4_DOWN),
    STREAMING: Method(outer=NESTEROV, fragments=5, mixing=0.0),
    "Streaming DiLoCo, P = 5, mixing 0.5": Method(outer=NESTEROV, fragments=5, mixing=0.5),
    "Streaming DiLoCo, P = 2, mixing 0": Method(outer=NESTEROV, fragments=2, mixing=0.0),
    "SparseLoCo": Method(outer={"kind": "sgd"}, links=SPARSELOCO),
    "SparseLoCo, delta down, 1.5 times the tokens": Method(
        outer={"kind": "sgd"}, links=SPARSELOCO, download=DELTA, tokens=1.5
    ),
    "PowerSGD int4": Method(outer=NESTEROV, links=LOW_RANK),
    "DiLoCo, 20H, twice the tokens": Method(outer=NESTEROV, period=20, tokens=2),
    "DiLoCo int4 both ways, 20H, twice the tokens": Method(
        outer=NESTEROV, links=(INT4,), download=INT4_DOWN, period=20, tokens=2
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    method: str
    participants: int
    split: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case. Bytes are of one participant, the mean of all, of everything that travels.

    Attributes:
        curve: After each evaluation (tokens so far, nats per byte of held-out text, bytes sent and received).
        up_bytes, down_bytes: Sent and received over the whole run, set-up included.
        setup_bytes: Of these, what travels before the first local step: initial state, tokenizer, recipe.
        warm_bytes: What the participants would have sent and received had they made the model that a case begins
            from by data-parallel training; 0 from random weights. Not part of the others.
        peak_bytes: The largest update.
    """

    case: Case
    parameters: int
    steps: int
    curve: list[tuple[int, float, int]]
    up_bytes: int
    down_bytes: int
    setup_bytes: int
    warm_bytes: int
    peak_bytes: int
    seconds: float
    state_hash: str
    versions: dict[str, str]

    @property
    def loss(self) -> float:
        return self.curve[-1][1]

    @property
    def total_bytes(self) -> int:
        """Sent and received over the whole run."""
        return self.up_bytes + self.down_bytes

    def bytes_to(self, loss: float) -> int | None:
        """Bytes that a participant has sent and received when the loss is first reached."""
        return next((moved for _, reached, moved in self.curve if reached <= loss), None)


def recipe_of(size: Size, case: Case, folder: Path) -> Recipe:
    """The recipe of a case; a data-parallel one is the recipe whose pooled run it is."""
    method = METHODS[case.method]
    steps = max(1, round(size.period * method.period / method.fragments))
    rounds = max(1, round(size.period * size.rounds * method.tokens / steps))
    streaming = {"kind": "streaming", "fragments": method.fragments, "overlap": method.overlap, "mixing": method.mixing}
    return parse_recipe(
        {
            "name": "parity",
            "seed": case.seed,
            "data": {
                "source": {"jsonl": size.text or str(text_of(size, folder)), "group_field": "group"},
                "split": {"participants": case.participants, "how": case.split},
                "validation_fraction": 0.05 * max(1, case.participants / 4),
                "validation_bytes": size.held_out_bytes // min(case.participants, 4),  # room for whole documents
                "shards": str(folder / "shards"),
            },
            "tokenizer": size.tokenizer,
            "model": {"path": str(start_of(size, folder))} if size.start_steps else size.model,
            "local": {
                "batch_size": size.batch // case.participants,
                "sequence_length": size.length,
                "optimizer": {"kind": "adamw", "learning_rate": size.best_rates.get(case.method, size.learning_rate)},
                "schedule": {"kind": "cosine", "warmup_steps": size.warmup_steps},
                **method.local,
            },
            "rounds": {
                "count": rounds,
                "local_steps": steps,
                "evaluate_every": max(1, rounds // size.evaluations),
                "streaming": streaming if method.fragments > 1 else None,
            },
            "outer": method.outer or {"kind": "sgd"},
            "updates": {"links": list(method.links), "download": method.download},
            "records": {"checkpoint_every": rounds, "keep_last": 1, "keep_best": False},
            "compute": size.compute,
        }
    )


def start_of(size: Size, folder: Path) -> Path:
    """A model that one party has trained on other documents of the same packages."""
    path = folder / f"start-{size.start_steps}"
    if not path.exists():
        alone = replace(
            size,
            start_steps=0,
            period=10,
            rounds=size.start_steps // 10,
            learning_rate=START_RATE,
            text=str(text_of(size, folder, skip=1)),
        )
        recipe = recipe_of(alone, Case(method="FedAvg", participants=1, split="iid", seed=0), folder)
        workplace = prepare(recipe, lambda _: None)
        with tempfile.TemporaryDirectory() as scratch:
            run = embedded_run(workplace, Variant("together", recipe.participant_names), Path(scratch), recipe)
            run.finish(lambda: False)
        workplace.network.flat.vector.copy_(run.shared.theta)
        workplace.network.model.save_pretrained(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path.absolute()


def text_of(size: Size, folder: Path, skip: int = 0) -> Path:
    """Source code of eight packages, each a group, as one file of documents.

    Args:
        skip: So many times the text that another file holds comes before this file's.
    """
    path = folder / f"text-{size.text_bytes}-{skip}.jsonl"
    if not path.exists():
        rows = []
        for package in PACKAGES:
            taken = -skip * size.text_bytes
            for document in documents(Package(package=package, order="shuffled")):
                if taken >= size.text_bytes:
                    break
                text = document.text[: size.text_bytes // 40]
                if taken >= 0:
                    rows.append(json.dumps({"text": text, "group": package}))
                taken += len(text.encode())
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def run_case(size: Size, case: Case, folder: Path) -> Outcome:
    """Train, and keep what is needed of the events."""
    recipe = recipe_of(size, case, folder)
    began, told = time.monotonic(), list[Event]()
    workplace = prepare(recipe, lambda _: None)
    variant = Variant("together", recipe.participant_names)
    if METHODS[case.method].every_step:
        planned = [run for run in planned_runs(recipe, folder, True) if run.folder.name == POOLED]
        recipe, variant = planned[0].recipe, planned[0].variant
    with tempfile.TemporaryDirectory() as scratch:
        run = embedded_run(workplace, variant, Path(scratch), recipe, (told.append,))
        run.finish(lambda: False)
    told_first = len(workplace.corpus.vocabulary.tokenizer.to_str().encode()) + len(recipe.model_dump_json().encode())
    return outcome_of(case, recipe, told, told_first, size.start_steps, time.monotonic() - began)


def outcome_of(
    case: Case, recipe: Recipe, told: Sequence[Event], told_first: int, start_steps: int, seconds: float
) -> Outcome:
    """Read the events.

    The events count what was serialised, both ways, for contributions and for evaluations; the first evaluation brings
    the initial state. Data-parallel training is a ring all-reduce of fp32 gradients, as PyTorch's DDP over gloo does
    it: in each step a participant sends ``2 (M - 1) / M x 4 N`` bytes and receives as many, and before the first step
    it receives ``4 N``. What it costs to evaluate it is not counted.

    Args:
        told: All events of the run.
        told_first: Bytes of tokenizer and recipe, which everybody is told before anything else.
        start_steps: Steps behind the model that the case begins from.
    """
    every_step, parties = METHODS[case.method].every_step, case.participants
    started = next(event for event in told if event["event"] == "run_started")
    tokens = recipe.tokens_per_step * recipe.local_steps * parties
    ring = 2 * (parties - 1) * 4 * started["parameters"]  # of all participants together in a step, one way
    sent, received = 0, parties * (told_first + every_step * 4 * started["parameters"])
    setup = peak = 0
    curve = []
    for event in told:
        if event["event"] == "contribution":
            sent += ring * recipe.local_steps if every_step else event["up_bytes"]
            received += ring * recipe.local_steps if every_step else event["down_bytes"]
            peak = max(peak, ring // parties if every_step else event["up_bytes"])
        elif event["event"] == "evaluation":
            if not every_step:
                sent += sum(transfer["up_bytes"] for transfer in event["transfers"].values())
                received += sum(transfer["down_bytes"] for transfer in event["transfers"].values())
            setup = setup or (sent + received) // parties
            union = event["union"]
            curve.append((event["round"] * tokens, union["nats"] / union["bytes"], (sent + received) // parties))
    return Outcome(
        case=case,
        parameters=started["parameters"],
        steps=recipe.total_local_steps,
        curve=curve,
        up_bytes=sent // parties,
        down_bytes=received // parties,
        setup_bytes=setup,
        warm_bytes=2 * start_steps * ring // parties,
        peak_bytes=peak,
        seconds=seconds,
        state_hash=next(event["state_hash"] for event in told if event["event"] == "run_finished"),
        versions=_measure.versions(),
    )


# --- sizes -----------------------------------------------------------------------------------------

ALL = tuple(METHODS)
SOME = (DATA_PARALLEL, DILOCO, "DiLoCo int4", "SparseLoCo", "PowerSGD int4")
SIZES = {
    "short": Size(
        batch=4,
        length=16,
        period=10,
        rounds=10,
        evaluations=2,
        warmup_steps=2,
        text_bytes=60_000,
        held_out_bytes=4_000,
        model={"layers": 4, "width": 16, "heads": 2, "feedforward": 32, "context": 64},
        grid=((2, "iid", ALL, 1),),
        compute={"device": "cpu", "threads": 1},
    ),
    "full": Size(
        batch=32,
        length=64,
        period=10,
        rounds=100,
        learning_rate=2e-3,
        best_rates={DATA_PARALLEL: 1e-3},
        start_steps=2000,
        evaluations=20,
        grid=((4, "iid", ALL, 3), (2, "iid", SOME, 3), (8, "iid", SOME, 3), (4, "groups", SOME, 3)),
    ),
}
PRESETS = {
    # The full form in small, for a machine that is shared: 43% of the parameters, 800 steps before, 500 steps.
    "quick": Size(
        batch=32, length=64, period=10, rounds=50, learning_rate=2e-3, best_rates={DATA_PARALLEL: 1e-3},
        start_steps=800, evaluations=10,
        grid=((4, "iid", tuple(method for method in METHODS if METHODS[method].fragments <= 4), 3),),  # of 3 layers
        model={"layers": 3, "width": 96, "heads": 4, "feedforward": 256, "context": 128},
    ),
    # Layers, heads and width of the smallest model of arXiv 2503.09799, whose losses at M = 2 and 4 are 0.7% and 2.0%
    # above data-parallel. Its 700M tokens of C4 need text of one's own: `--text FILE.jsonl`.
    "35m": Size(
        batch=24, length=2048, period=30, rounds=474, warmup_steps=1000, learning_rate=1.5e-3,
        model={"preset": "35m"}, tokenizer={"kind": "bpe", "vocab_size": 32_768}, text_bytes=400_000_000,
        held_out_bytes=4_000_000, compute={"device": "cuda", "compile": True},
        grid=((2, "iid", (DATA_PARALLEL, DILOCO, "DiLoCo int4"), 1), (4, "iid", (DATA_PARALLEL, DILOCO), 1)),
    ),
}  # fmt: skip
PRESETS["quick-random"] = replace(PRESETS["quick"], start_steps=0, learning_rate=START_RATE, best_rates={})


def cases_of(size: Size) -> Iterator[Case]:
    """Seed by seed, so that a campaign that is cut has whole comparisons."""
    for seed in range(max(seeds for *_, seeds in size.grid)):
        for participants, split, methods, seeds in size.grid:
            if seed < seeds:
                yield from (Case(method=m, participants=participants, split=split, seed=seed) for m in methods)
