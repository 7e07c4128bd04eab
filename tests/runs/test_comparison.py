"""Together, each alone, pooled: equal weights to begin with, equal tokens."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Tables

NAMES = ("ada", "bob", "eve")
RUNS = ("together", "alone/ada", "alone/bob", "alone/eve", "pooled")


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, potluck_in: Callable[[Path], Potluck], tables: Tables
) -> tuple[Path, Path, Any]:
    """A recipe, the folder of its comparison and what the verb printed."""
    verbs = potluck_in(tmp_path_factory.mktemp("compared"))
    recipe = verbs.recipe(tables)
    folder = recipe.with_name("whole")
    printed = verbs("compare", recipe, "--set", f"records.folder={folder}", "--json").result
    return recipe, folder, printed


def last(events: Callable[..., Events], folder: Path) -> Any:
    return events(folder, "evaluation")[-1]


def test_a_comparison_is_a_folder_of_runs(compared: tuple[Path, Path, Any]) -> None:
    _, folder, printed = compared
    for run in RUNS:
        for name in ("recipe.toml", "run.json", "events.jsonl", "checkpoints", "tokenizer"):
            assert (folder / run / name).exists(), f"{run}/{name}"
    assert (folder / "together" / "model" / "model.safetensors").exists()
    assert (folder / "report.html").exists() and (folder / "report.json").exists()
    saved = json.loads((folder / "comparison.json").read_text())
    expected = {key: value for key, value in printed.items() if key != "report"}
    assert expected | {"run": "whole", "model": "together/model"} == saved  # it may be moved, and shown to others


def test_all_begin_with_the_same_weights(compared: tuple[Path, Path, Any], events: Callable[..., Events]) -> None:
    _, folder, _ = compared
    first = [events(folder / run, "evaluation")[0] for run in RUNS]
    assert first[0]["round"] == 0
    assert all((e["participants"], e["union"]) == (first[0]["participants"], first[0]["union"]) for e in first)
    assert len({events(folder / run, "checkpoint")[0]["state_hash"] for run in RUNS}) == 1
    assert len({events(folder / run, "checkpoint")[-1]["state_hash"] for run in RUNS}) == len(RUNS)


def test_all_see_equally_many_tokens(compared: tuple[Path, Path, Any], events: Callable[..., Events]) -> None:
    _, folder, _ = compared
    tokens = {run: events(folder / run, "run_finished")[0]["total_tokens"] for run in RUNS}
    assert tokens["together"] == tokens["pooled"] == 3 * 3 * 2 * 32
    spent = {name: 0 for name in NAMES}
    for event in events(folder / "together", "contribution"):
        spent[event["participant"]] += event["tokens"]
    assert {name: tokens[f"alone/{name}"] for name in spent} == spent


def test_with_few_asked_all_still_see_equally_many_tokens(
    tmp_path: Path, potluck_in: Callable[[Path], Potluck], tables: Tables, events: Callable[..., Events]
) -> None:
    """Two of three are asked once, the third never; a pooled step has the batch of whoever is asked."""
    verbs = potluck_in(tmp_path)
    recipe = verbs.recipe({**tables, "rounds": {"count": 2, "local_steps": 2, "participants_per_round": 1}})
    verbs("compare", recipe, "--set", f"records.folder={tmp_path / 'few'}")
    verbs.end()
    tokens = {run: events(tmp_path / "few" / run, "run_finished")[0]["total_tokens"] for run in RUNS}
    assert tokens["together"] == tokens["pooled"] == sum(tokens[f"alone/{name}"] for name in NAMES) == 2 * 2 * 32
    assert sorted(tokens[f"alone/{name}"] for name in NAMES) == [0, 64, 64]
    together, pooled = (events(tmp_path / "few" / run, "contribution") for run in ("together", "pooled"))
    assert together[0]["loss"] == pooled[0]["loss"] != pooled[1]["loss"]


def test_alone_draws_what_it_draws_together(compared: tuple[Path, Path, Any], events: Callable[..., Events]) -> None:
    """In the first round nothing has been shared yet: the same loss, to the bit."""
    _, folder, _ = compared
    together = {e["participant"]: e["loss"] for e in events(folder / "together", "contribution") if e["round"] == 1}
    for name, loss in together.items():
        assert events(folder / "alone" / name, "contribution")[0]["loss"] == loss


def test_the_table_says_what_the_logs_say(compared: tuple[Path, Path, Any], events: Callable[..., Events]) -> None:
    _, folder, printed = compared
    measured = {run: last(events, folder / run) for run in RUNS}
    for row in (*printed["rows"], printed["union"]):
        bits = {
            run: (e["union"] if row["text"] == "union" else e["participants"][row["text"]])["bits_per_byte"]
            for run, e in measured.items()
        }
        assert (row["together"], row["pooled"]) == (bits["together"], bits["pooled"])
        assert row["alone"] == bits.get(f"alone/{row['text']}")
        best = min(NAMES, key=lambda name: bits[f"alone/{name}"])
        assert (row["best_alone"], row["best_alone_by"]) == (bits[f"alone/{best}"], best)
    assert [row["text"] for row in printed["rows"]] == list(NAMES)
    assert printed["better_together"] == sum(row["together"] < row["alone"] for row in printed["rows"])


def test_together_is_what_train_makes(
    potluck: Potluck, compared: tuple[Path, Path, Any], tmp_path: Path, events: Callable[..., Events]
) -> None:
    recipe, folder, _ = compared
    potluck("train", recipe, "--set", "records.folder=run")
    assert events(tmp_path / "run") == events(folder / "together")


def test_a_killed_comparison_goes_on(
    potluck: Potluck, compared: tuple[Path, Path, Any], tmp_path: Path, wait_for: Callable[..., None],
    story: Callable[[Path], Any],
) -> None:  # fmt: skip
    recipe, folder, printed = compared
    process = potluck.start("compare", recipe, "--set", "records.folder=run")
    wait_for(process, tmp_path / "run" / "alone" / "bob" / "checkpoints" / "round-000001")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    again = potluck("resume", "run", "--json").result
    assert (again["rows"], again["union"]) == (printed["rows"], printed["union"])
    for run in RUNS:
        assert story(tmp_path / "run" / run) == story(folder / run), run


def test_a_comparison_that_is_stopped_says_how_to_go_on(
    potluck: Potluck, compared: tuple[Path, Path, Any], tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    process = potluck.start("compare", compared[0], "--no-pooled", "--set", "records.folder=run", "--set",
                            "rounds.count=6")  # fmt: skip
    wait_for(process, tmp_path / "run" / "alone" / "ada" / "checkpoints" / "round-000001")
    process.signal(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and "potluck resume run\n" in ended.err
    potluck("resume", "run", "--round", 1, code=9)
    potluck("resume", "run")
    assert not (tmp_path / "run" / "pooled").exists()


def test_a_participant_may_not_be_called_pooled(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    people = [{**tables["participants"][0], "name": "pooled"}, *tables["participants"][1:]]
    ended = potluck("compare", potluck.recipe(tables, participants=people), "--set", "records.folder=run", code=3)
    assert "'pooled' is the name of the pooled run" in ended.err
    assert not (tmp_path / "run").exists()


def test_alone_takes_as_many_rounds_as_it_is_asked_for(
    potluck: Potluck, tables: Tables, tmp_path: Path, events: Callable[..., Events]
) -> None:
    """With partial participation, and a run alone can be looked at by itself."""
    rounds = {"count": 4, "local_steps": 2, "participants_per_round": 1}
    local = {**tables["local"], "schedule": {"kind": "cosine", "warmup_steps": 3}}
    potluck("compare", potluck.recipe(tables, rounds=rounds, local=local), "--set", "records.folder=run", "--no-pooled")
    asked = [event["participant"] for event in events(tmp_path / "run" / "together", "contribution")]
    for name in NAMES:
        alone = tmp_path / "run" / "alone" / name
        assert len(events(alone, "round")) == asked.count(name)
        potluck("evaluate", alone)
