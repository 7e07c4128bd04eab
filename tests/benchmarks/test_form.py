"""Every benchmark runs and writes what `Measurement` documents; how fast anything is, no test asks."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import aggregate, apart, corpus, links, overhead, parity, wire
from benchmarks._measure import Measurement, main, measured

MODEL = (("layers", 1), ("width", 16), ("heads", 2), ("feedforward", 32), ("context", 64))
TINY: dict[ModuleType, Any] = {
    overhead: overhead.Size(
        single={1: (2, 1)}, swapped=1, swapped_steps=2, participants=2, saves=2, model=MODEL, batch=(2, 16)
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
    apart: apart.Size(rounds=1, local_steps=1),
    parity: replace(parity.SIZES["short"], grid=((2, "iid", ("data-parallel", "DiLoCo int4"), 2),)),
}


def written(path: Path, measure: Any, size: Any) -> tuple[int, list[dict[str, Any]]]:
    with pytest.raises(SystemExit) as end:
        main(measure, {"short": size}, ["--short", "--json", str(path)])
    return int(end.value.code or 0), json.loads(path.read_text())


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__)
def test_a_benchmark_runs_and_writes_its_measurements(module: ModuleType, tmp_path: Path) -> None:
    code, results = written(tmp_path / "out.json", module.measure, TINY[module])
    assert set(module.SIZES) == {"short", "full"}
    assert all(set(result) == {f.name for f in fields(Measurement)} for result in results)
    assert {"python", "torch", "potluck"} <= set(results[0]["versions"])
    assert code == any(result["holds"] is False for result in results)
    assert all(result["holds"] for result in results if "identical" in result["name"])


def test_the_median_is_judged() -> None:
    slow = measured("wall time", [1.0, 1.02, 9.0], "x", at_most=1.03)
    assert (slow.value, slow.target, slow.holds) == (1.02, "<= 1.03", True)
    assert measured("speed", [3.0], "x", at_least=4).holds is False


@pytest.mark.parametrize("undecided", [measured("f", [], "x", at_least=4), measured("f", [1.0], "s")])
def test_what_cannot_be_judged_is_neither_met_nor_missed(undecided: Measurement, tmp_path: Path) -> None:
    assert undecided.holds is None
    assert written(tmp_path / "out.json", lambda _: [undecided], None)[0] == 0
