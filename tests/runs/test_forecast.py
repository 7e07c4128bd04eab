"""What `check` says beforehand is what the run then does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

HEADER_BYTES = 512


@pytest.mark.parametrize("rounds", [{"evaluate_every": 1}, {"evaluate_every": 3, "participants_per_round": 2}])
def test_parameters_tokens_and_bytes(potluck: Potluck, tables: Tables, tmp_path: Path, rounds: dict[str, Any]) -> None:
    from potluck.records.curves import read_run

    recipe = potluck.recipe(tables, rounds={"count": 4, "local_steps": 2, **rounds})
    expected = potluck("check", recipe, "--json").result
    potluck("train", recipe, "--set", f"records.folder={tmp_path / 'run'}")
    run = read_run(tmp_path / "run")
    assert (run.parameters, run.total_tokens) == (expected["parameters"], expected["total_tokens"])
    messages = len(run.contributions) + sum(len(e.transfers) for e in run.evaluations)
    for direction in ("up_bytes", "down_bytes"):
        assert 0 <= run.transferred(direction) - expected[direction] <= HEADER_BYTES * messages
