"""Those who are not there, and those who hold nothing out: the run goes on without them, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.embedded import embedded_run, prepare
from potluck.errors import TooFewContributors
from potluck.recipe.load import parse_recipe
from potluck.records.checkpoint import load_checkpoint
from potluck.records.folder import Variant
from potluck.run import newest_checkpoint

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Tables


@pytest.fixture
def without(tables: Tables, tmp_path: Path) -> Tables:
    """The tiny recipe, in which eve has one document, whose end is blank: nothing of it is held out."""
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "all.txt").write_text("bread and salt and soup " * 20 + "\n" * 300)
    people = [*tables["participants"][:2], {"name": "eve", "source": {"path": str(tmp_path / "eve")}}]
    return {**tables, "participants": people, "data": {**tables["data"], "shards": str(tmp_path / "shards")}}


def test_one_without_held_out_text_trains_like_the_others(
    potluck: Potluck, without: Tables, tmp_path: Path, events: Callable[..., Events]
) -> None:
    ended = potluck("train", potluck.recipe(without), "--set", "records.folder=run", "--json")
    assert "eve: has no text to hold out, so it trains and is not evaluated" in " ".join(ended.err.split())
    assert ended.result["bits_per_byte"] is not None
    told = events(tmp_path / "run", "contribution")
    assert [e["status"] for e in told if e["participant"] == "eve"] == ["ok"] * 3
    for evaluation in events(tmp_path / "run", "evaluation"):
        assert list(evaluation["participants"]) == evaluation["union"]["of"] == ["ada", "bob"]
        assert evaluation["missing"] == {}
    found = potluck("evaluate", "run", "--json").result
    assert found["union"]["of"] == ["ada", "bob"]
    assert found["union"]["bits_per_byte"] == pytest.approx(ended.result["bits_per_byte"])


def test_without_any_held_out_text_nothing_is_evaluated(potluck: Potluck, without: Tables, tmp_path: Path) -> None:
    recipe = potluck.recipe({**without, "data": {**without["data"], "validation_fraction": 0.0}})
    ended = potluck("train", recipe, "--set", "records.folder=run", "--json")
    assert ended.result["rounds"] == 3 and ended.result["bits_per_byte"] is None
    assert "nothing is evaluated" in " ".join(ended.err.split())
    assert "nobody evaluated" in potluck("export", "run", "--best", "--to", "best", code=7).err
    assert "no held-out text to compare on" in potluck("compare", recipe, code=3).err


def run_of(tables: Tables, **changes: Any) -> Callable[[Path], Any]:
    """Simulated devices, which are there now and then."""
    profile = {"steps_per_second": 10.0, "availability": 0.7}
    people = [{**p, "profile": profile} for p in tables["participants"]]
    recipe = parse_recipe({**tables, "participants": people, **changes})
    workplace = prepare(recipe, lambda _: None)

    def go(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        variant = Variant("together", recipe.participant_names)
        run = embedded_run(workplace, variant, folder, recipe, checkpoint=newest_checkpoint(folder))
        run.finish(lambda: False)
        return run

    return go


def test_a_simulated_run_that_lacked_contributors_is_finished_in_the_end(tables: Tables, tmp_path: Path) -> None:
    go = run_of(tables, rounds={"count": 2, "local_steps": 1, "min_contributors": 3, "deadline": 60.0})
    hashes = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        failures = 0
        while True:
            try:
                hashes.append((go(folder).shared.digest, failures))
                break
            except TooFewContributors:
                failures += 1
        assert 0 < failures < 100
    assert hashes[0] == hashes[1]


def test_the_best_of_evaluations_by_others_is_not_the_one_that_lacks_somebody(tables: Tables, tmp_path: Path) -> None:
    go = run_of(tables, rounds={"count": 8, "local_steps": 2, "min_contributors": 1, "deadline": 60.0})
    run = go(tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    found = {e["round"]: e for e in events if e["event"] == "evaluation"}
    assert any(e["missing"] for e in found.values()) and all(e["union"] for e in found.values() if e["participants"])
    best = run.best
    for event in found.values():
        common = event["participants"].keys() & best["participants"].keys()
        now, then = (sum(e["participants"][name]["nats"] for name in common) for e in (event, best))
        assert now >= then or event["round"] < best["round"]
    assert load_checkpoint(tmp_path / "run" / "checkpoints").facts["best"] == best
