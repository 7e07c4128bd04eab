"""Where a run stands, of whatever kind, whether it goes on or is over."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


def test_a_run_that_is_watched_to_its_end(
    potluck: Potluck, tables: Tables, tmp_path: Path, events: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    recipe = potluck.recipe(tables, rounds={"count": 60, "local_steps": 1, "evaluate_every": 60})
    watching = potluck.start("status", run, "--watch", "--json")
    while "waiting for a run in" not in watching.err.read_text():
        assert not watching.ends_within(0.02), watching.err.read_text()
    training = potluck.start("train", recipe, "--set", f"records.folder={run}")
    while not events(run, "round"):
        assert not training.ends_within(0.02), training.err.read_text()
    while '"working"' not in watching.out.read_text():
        assert not watching.ends_within(0.02), watching.err.read_text()
    training.signal(signal.SIGTERM)
    assert training.wait().code == 130
    *_, last = [json.loads(line) for line in watching.wait(20).out.splitlines()]
    assert last["state"] == "stopped" and 0 < last["round"] < 60 and last["participants"]["ada"]["up_bytes"] > 0
    assert f"potluck resume {run} goes on with it" in potluck("status", run).out

    potluck("resume", run)
    assert "finished, round 60 of 60, held-out" in potluck("status", run, "--watch").out
    found = potluck("status", run, "--json").result
    assert found["participants"]["bob"]["last"] == {
        "round": 60, "status": "ok", "reason": "", "loss": found["participants"]["bob"]["last"]["loss"]
    }  # fmt: skip


def test_a_comparison_and_what_is_no_run(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    people = [p for p in tables["participants"] if p["name"] != "eve"]
    recipe = potluck.recipe({**tables, "participants": people}, rounds={"count": 1, "local_steps": 1})
    potluck("compare", recipe, "--set", f"records.folder={tmp_path / 'all'}")
    found = potluck("status", tmp_path / "all", "--json").result
    assert found["state"] == "finished" and {run["state"] for run in found["runs"].values()} == {"finished"}
    assert set(found["runs"]) == {"together", "alone/ada", "alone/bob", "pooled"}
    assert "alone/bob: tiny: finished, round 1 of 1" in potluck("status", tmp_path / "all").out
    assert "it holds runs" in potluck("status", tmp_path, code=9).err
    assert "name a run folder" in potluck("status", code=12).err
