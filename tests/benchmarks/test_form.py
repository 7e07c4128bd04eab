"""Every benchmark runs and writes what `Measurement` documents; how fast anything is, no test asks."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path
from string import ascii_lowercase
from types import ModuleType
from typing import Any

import pytest

from benchmarks import (
    _silos,
    aggregate,
    apart,
    arrow,
    compose,
    corpus,
    deferral,
    edit,
    edits,
    forget,
    library,
    links,
    merge,
    outer_steps,
    overhead,
    packing,
    parity,
    real_edits,
    real_forget,
    real_parts,
    wire,
)
from benchmarks._compose_parts import Size as Parts
from benchmarks._measure import Measurement, main, measured, table
from benchmarks._merge_adapters import AdapterSize
from benchmarks._merge_models import ModelSize
from benchmarks._silos import BaseSize
from potluck.compose.decoding.deferral import Lesson as Gates
from potluck.compose.training import Lesson

MODEL = (("layers", 1), ("width", 16), ("heads", 2), ("feedforward", 32), ("context", 64))
BASE = BaseSize(
    vocabulary=300, layers=1, width=16, heads=2, feedforward=32, steps=2, local_steps=2, batch_size=1,
    sequence_length=32, parties=3,
)  # fmt: skip
PARTS = Parts(
    base=BASE, seeds=(0,), max_steps=2, batch_size=1, length=32, rank=1, ranks=(1, 2), router_steps=2, top_k=2,
    held_out=100,
)  # fmt: skip
TINY: dict[ModuleType, Any] = {
    overhead: overhead.Size(
        single={1: (2, 1)}, swapped=1, swapped_steps=2, participants=2, saves=2, model=MODEL, batch=(2, 16)
    ),
    outer_steps: outer_steps.Size(
        runs=((2, 1),),
        starts=(outer_steps.RANDOM,),
        codecs=("fp32", "int8"),
        batch=1,
        length=16,
        model=dict(MODEL),
        text_bytes=20_000,
        held_out_bytes=2_000,
    ),
    aggregate: aggregate.Size(
        parameters=300_000,
        memory_parameters=1_000_000,
        updates=3,
        distinct=2,
        runs=2,
        flower_runs=1,
        update_counts=(2,),
    ),
    links: links.Size(
        parameters=20_000, memory_parameters=1_000_000, runs=2, links=("int8, blocks of 256", "SparseLoCo")
    ),
    corpus: corpus.Size(text_bytes=30_000, builds=1, steps=2, packages=("numpy",), model=MODEL),
    wire: wire.Size(megabytes=2, pings=3, repeats={"https": 1}, pullers=2, pulled=2, peers=()),
    apart: apart.Size(rounds=1, local_steps=1, packages=apart.TWO, model=dict(MODEL, context=128), text=4_000),
    merge: merge.Size(
        adapters=AdapterSize(layers=1, width=32, feedforward=48, adapters=2, rank=2, clustered=1),
        models=ModelSize(shapes={"F32": (1, 32, 48)}, models=2, runs=1, vocabulary=64),
    ),
    arrow: arrow.Size(widths=(64,), layers=1, ranks=(2,), batches=(1,), prompt=4, new=2, runs=1),
    packing: packing.Size(parts=PARTS, errors=(0.3,), held_out=100),
    library: replace(library.SIZES["short"], base=BASE, windows=(2,), queries=1, mixtures=2, entries=20),
    deferral: replace(
        deferral.SIZES["short"],
        parts=PARTS,
        far=Lesson(2, 1, 32),
        learn=5,
        test=1,
        gates=Gates(sequence_length=32, epochs=1),
    ),
    compose: replace(PARTS, held_out=100),
    edit: edit.Size(
        seeds=(0,), participants=2, each=2, values=2, alone=1, text=10_000, wise=1, margins=(), people=5, runs=1
    ),
    edits: edits.Size(
        seeds=(0,), edits=2, methods=("GRACE", "MEMIT"), people=5, rates=(1e-4,), further=1, untouched=60
    ),
    forget: forget.Size(people=4, splits={"forget25": 1}, seeds=(0,), epochs=1, world=500, methods=(forget.MOST,)),
    real_edits: real_edits.Size(count=1, neighbours=1, methods=("grace",), ways=("once",)),
    real_forget: real_forget.Size(gone=2, kept=2, epochs=1, methods=("npo",), checks=("npo",)),
    real_parts: real_parts.Size(
        base=BASE,
        rank=2,
        steps=2,
        held_out=2,
        entry=3,
        query=2,
        merges=(("svd", 0.5), ("lego", 0.5), ("regmean", 0.5), ("fisher", 0.5)),
        models=("linear", "multislerp"),
        gates=40,
        said=3,
    ),
    parity: replace(parity.SIZES["short"], grid=((2, "iid", ("data-parallel", "DiLoCo int4"), 2),)),
}


def test_a_target_of_the_full_size_is_told_and_not_judged(tmp_path: Path) -> None:
    row = measured("lost", [0.0], "percent", at_least=20, at_size=False)
    assert (row.target, row.holds) == (">= 20", None) and "not at this size" in table([row])
    assert written(tmp_path / "out.json", lambda _: [row], None)[0] == 0
    assert measured("figure", [0.0], "", at_size=False).at_size  # without a target nothing is left out


def written(path: Path, measure: Any, size: Any) -> tuple[int, list[dict[str, Any]]]:
    with pytest.raises(SystemExit) as end:
        main(measure, {"short": size}, ["--short", "--json", str(path)])
    return int(end.value.code or 0), json.loads(path.read_text())


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little text of three participants; as in ``runs``, benchmarks share the base and the parts that one trained."""
    place = tmp_path_factory.mktemp("form") / "silos"
    (place / "texts").mkdir(parents=True)
    for name in ("ada", "bob", "eve"):
        draw = random.Random(name)
        words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(2, 8))) for _ in range(200)]
        documents = [f"<<<FILE {n}>>>\n{' '.join(draw.choices(words, k=300))}\n" for n in range(30)]
        (place / "texts" / f"{name}.txt").write_text("".join(documents))
    return place


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__)
def test_a_benchmark_runs_and_writes_its_measurements(
    module: ModuleType, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_silos, "PLACE", silos)
    monkeypatch.setattr(real_parts, "PLACE", silos)
    monkeypatch.setattr(outer_steps, "PLACE", tmp_path / "outer-steps")
    code, results = written(tmp_path / "out.json", module.measure, TINY[module])
    assert set(module.SIZES) == {"short", "full"}
    assert all(set(result) == {f.name for f in fields(Measurement)} for result in results)
    assert {"python", "torch", "potluck"} <= set(results[0]["versions"])
    assert code == any(result["holds"] is False for result in results)
    assert all(result["holds"] for result in results if "identical" in result["name"] or "opt-out" in result["name"])


def test_the_median_is_judged() -> None:
    slow = measured("wall time", [1.0, 1.02, 9.0], "x", at_most=1.03)
    assert (slow.value, slow.target, slow.holds) == (1.02, "<= 1.03", True)
    assert measured("speed", [3.0], "x", at_least=4).holds is False


@pytest.mark.parametrize("undecided", [measured("f", [], "x", at_least=4), measured("f", [1.0], "s")])
def test_what_cannot_be_judged_is_neither_met_nor_missed(undecided: Measurement, tmp_path: Path) -> None:
    assert undecided.holds is None
    assert written(tmp_path / "out.json", lambda _: [undecided], None)[0] == 0
