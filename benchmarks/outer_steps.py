"""How many outer steps each way to exchange needs: what `potluck plan` may recommend, and where.

A run is trained with every codec of `potluck plan`, for several numbers of outer steps, from random weights and from a
model that has been trained on other text. Each is held against a run of as many local steps that exchanges everything
in full precision every `REFERENCE` local steps and waits. What a codec holds back comes with later exchanges (error
feedback), so that few outer steps cost more than many.

Finished runs are kept in ``runs/outer-steps``, so that a long campaign may be cut and go on.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks._measure import Measurement, main, measured
from potluck.embedded import embedded_run, prepare
from potluck.local.network import Network
from potluck.measured import CODECS
from potluck.recipe import Recipe, recipe_hash
from potluck.recipe.load import parse_recipe
from potluck.records.events import Event
from potluck.records.folder import Variant
from potluck.run import Run

REFERENCE = 10  # local steps between two exchanges
RANDOM, TRAINED = "random weights", "a trained model"
START_STEPS = 500
PLACE = Path("runs/outer-steps")
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        runs: (local steps in all, local steps between two exchanges of the same parameters) of every codec.
        layouts: (fragments, local steps that overlap): 1, 0 exchanges everything at once and waits.
        other_text: What the trained model has been trained on.
    """

    runs: tuple[tuple[int, int], ...]
    starts: tuple[str, ...] = (RANDOM, TRAINED)
    layouts: tuple[tuple[int, int], ...] = ((1, 0),)
    codecs: tuple[str, ...] = tuple(CODECS)
    seeds: tuple[int, ...] = (0,)
    participants: int = 2
    batch: int = 4
    length: int = 64
    learning_rate: float = 3e-3
    model: Mapping[str, int] = field(default_factory=lambda: {"layers": 4, "width": 64, "heads": 4, "feedforward": 176})
    text: Table = field(default_factory=lambda: {"package": "stdlib", "order": "shuffled"})
    other_text: Table = field(default_factory=lambda: {"package": "sympy", "order": "shuffled"})
    text_bytes: int = 500_000
    held_out_bytes: int = 60_000


SIZES = {
    "short": Size(
        runs=((20, 10), (100, 10)), codecs=("fp32", "int8", "sparse"), batch=4, length=32,
        model={"layers": 2, "width": 32, "heads": 2, "feedforward": 64}, text_bytes=60_000, held_out_bytes=8_000,
    ),
    "full": Size(
        runs=((50, 10), (200, 10), (500, 10), (1000, 10), (1000, 100)),
        layouts=((1, 0), (4, 1), (4, 5)),
        seeds=(0, 1),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: ``period`` local steps lie between two exchanges of the same parameters."""

    start: str
    codec: str
    total: int
    period: int
    layout: tuple[int, int]
    seed: int


def measure(size: Size) -> list[Measurement]:
    """Loss of every run above that of its reference, in percent, over the seeds."""
    results = []
    for start, total in product(size.starts, sorted({total for total, _ in size.runs})):
        references = [loss_of(size, Case(start, "fp32", total, REFERENCE, (1, 0), seed)) for seed in size.seeds]
        name = f"from {start}, {total} local steps, "
        results.append(measured(f"{name}fp32, H = {REFERENCE}", references, "bits per byte"))
        for (fragments, overlap), codec, period in _variants(size, total):
            losses = [loss_of(size, Case(start, codec, total, period, (fragments, overlap), s)) for s in size.seeds]
            over = [100 * (loss / reference - 1) for loss, reference in zip(losses, references, strict=True)]
            what = f"{codec}, P, tau = {fragments}, {overlap}, H = {period}: {total // period} outer steps"
            results.append(measured(f"{name}{what}, loss over fp32", over, "%"))
    return results


def _variants(size: Size, total: int) -> Iterator[tuple[tuple[int, int], str, int]]:
    for layout, (steps, period), codec in product(size.layouts, size.runs, size.codecs):
        if steps == total and (layout == (1, 0) or layout[1] < period // layout[0]):
            yield layout, codec, period


def _recipe(size: Size, case: Case, text: Table | None = None, participants: int | None = None) -> Recipe:
    fragments, overlap = case.layout
    steps = case.period // fragments
    rounds: Table = {"count": math.ceil(case.total / steps), "local_steps": steps, "evaluate_every": 10_000}
    if fragments > 1:
        rounds["streaming"] = {"kind": "streaming", "fragments": fragments, "overlap": overlap}
    return parse_recipe(
        {
            "name": "outer-steps",
            "seed": case.seed,
            "data": {
                "source": text or size.text,
                "split": {"participants": participants or size.participants},
                "train_bytes": size.text_bytes,
                "validation_bytes": size.held_out_bytes,
                "shards": str(PLACE / "shards"),
            },
            "tokenizer": {"kind": "bytes"},
            "model": size.model if case.start == RANDOM else {"path": str(_trained(size))},
            "local": {
                "batch_size": size.batch,
                "sequence_length": size.length,
                "optimizer": {"kind": "adamw", "learning_rate": size.learning_rate},
                "schedule": {"kind": "cosine", "warmup_steps": min(50, case.total // 10)},
            },
            "rounds": rounds,
            "updates": CODECS[case.codec].model_dump(),
            "records": {"checkpoint_every": 10_000, "keep_last": 1, "keep_best": False},
            "compute": {"device": "cpu", "threads": 1},
        }
    )


def _trained(size: Size) -> Path:
    """A model that one party has trained on other text."""
    path = PLACE / f"start-{recipe_hash(_recipe(size, _START, size.other_text, 1))[:16]}"
    if not path.exists():
        network, run = _run(_recipe(size, _START, size.other_text, 1))[:2]
        network.flat.vector.copy_(run.shared.theta)
        network.model.save_pretrained(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path.absolute()


_START = Case(RANDOM, "fp32", START_STEPS, REFERENCE, (1, 0), 0)


def loss_of(size: Size, case: Case) -> float:
    """Bits per byte of everybody's held-out text at the end."""
    recipe = _recipe(size, case)
    path = PLACE / f"{recipe_hash(recipe)[:16]}.json"
    if path.exists():
        return float(json.loads(path.read_text())["bits_per_byte"])
    _, _, before, loss = _run(recipe)
    path.write_text(json.dumps({"before": before, "bits_per_byte": loss, "case": asdict(case)}))
    print(f"{loss:.4f} {case}", file=sys.stderr, flush=True)
    return loss


def _run(recipe: Recipe) -> tuple[Network, Run, float, float]:
    """The network, the run, and bits per byte of everybody's held-out text before it and after."""
    workplace, told = prepare(recipe, lambda _: None), list[Event]()
    with tempfile.TemporaryDirectory() as scratch:
        variant = Variant("together", recipe.participant_names)
        run = embedded_run(workplace, variant, Path(scratch), recipe, (told.append,))
        run.finish(lambda: False)
    losses = [float(event["union"]["bits_per_byte"]) for event in told if event["event"] == "evaluation"]
    return workplace.network, run, losses[0], losses[-1]


if __name__ == "__main__":
    main(measure, SIZES)
