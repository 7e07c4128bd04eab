"""A run is of the recipe that it began with, and says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from potluck.recipe.load import changed_keys, parse_recipe
from potluck.records.card import command_of

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


@pytest.mark.parametrize("words", [("resume",), ("export",), ("evaluate",), ("report",)], ids=lambda words: words[0])
def test_an_edited_recipe_of_a_finished_run_is_refused(potluck: Potluck, done: Path, words: tuple[str, ...]) -> None:
    recipe, model = done / "recipe.toml", done / "model" / "recipe.toml"
    before, exported = recipe.read_text(), model.read_text()
    recipe.write_text(before.replace("local_steps = ", "local_steps = 1"))
    assert recipe.read_text() != before
    ended = potluck(*words, done, code=9)
    assert "began with another recipe: rounds.local_steps" in " ".join(ended.err.split())
    assert model.read_text() == exported
    recipe.write_text(before.replace('device = "', 'device = "cpu" # "'))  # where it is computed decides nothing
    potluck("report", done)


def test_changed_keys_are_named(tables: Tables) -> None:
    was = parse_recipe({**tables, "outer": {"kind": "nesterov"}})
    people = [{**p, "name": p["name"].replace("bob", "ben")} for p in tables["participants"]]
    now = parse_recipe({**tables, "participants": people, "records": {"folder": "elsewhere"}})
    assert changed_keys(was, was) == []
    assert changed_keys(was, now) == ["outer.kind", "outer.learning_rate", "outer.momentum", "participants.1.name"]


def test_report_and_card_name_the_command_that_trains_it(potluck: Potluck, done: Path, tables: Tables) -> None:
    potluck("report", done)
    report = json.loads((done / "report.json").read_text())
    assert report["command"] == "potluck train recipe.toml"
    for participant in report["participants"]:
        assert participant["epochs"] == pytest.approx(participant["trained_tokens"] / participant["train_tokens"])
        assert 0 < participant["epochs"] != round(participant["epochs"])
    hosted = 'engine = { kind = "nats" }'
    assert command_of("together", hosted) == "potluck host recipe.toml"
    assert command_of("alone", hosted) == command_of("pooled", "") == "potluck compare recipe.toml"


def test_a_comparison_without_the_pooled_run_says_so(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    rounds = {"count": 1, "local_steps": 1}
    recipe = potluck.recipe(tables, rounds=rounds, participants=tables["participants"][:2])
    potluck("compare", recipe, "--no-pooled", "--set", "records.folder=run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["command"].endswith("recipe.toml --no-pooled")
