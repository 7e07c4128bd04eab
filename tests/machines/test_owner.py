"""What the owner of a participant sees of a run, and how much of it the owner allows."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.contribution import Contribution
from potluck.errors import PolicyError, RecipeError
from potluck.recipe.part import Limits, load_part
from potluck.sent import Sent
from tests.machines.test_machines import Hosted

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

NATS = {"kind": "nats", "heartbeat": 0.5}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sources(tables: Tables) -> dict[str, dict[str, Any]]:
    return {participant["name"]: participant["source"] for participant in tables["participants"]}


@pytest.mark.parametrize("inline", [0, 700_000], ids=["blobs", "inline"])
def test_what_is_noted_is_what_the_coordinator_received(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path, events: Callable[..., Any], inline: int
) -> None:
    recipe = potluck.recipe(tables, engine={**NATS, "inline_bytes": inline})
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    joined = {name: hosted.join(name, source) for name, source in sources.items()}
    assert hosted.coordinator.wait().code == 0, hosted.said()
    for name, process in joined.items():
        ended = process.wait(20)
        answers = [e for e in events(tmp_path / "run", "contribution") if e["participant"] == name]
        evaluated = [e["transfers"][name] for e in events(tmp_path / "run", "evaluation")]
        received = sum(e["up_bytes"] for e in answers) + sum(e["up_bytes"] for e in evaluated)
        noted = lines(tmp_path / f"at-{name}" / "sent.jsonl")
        assert sum(line["bytes"] for line in noted) == received == ended.result["sent_bytes"]
        assert [line["kind"] for line in noted] == ["evaluate", *["train", "evaluate"] * 3]
        assert all(set(line) >= {"time", "task", "what", "round"} and len(line["sha256"]) == 64 for line in noted)
        assert "round 2 of 3: 2 local steps, loss" in ended.err and "after round 3 of 3: held-out" in ended.err


def test_consent_names_the_folder_in_full_and_what_leaves(
    potluck: Potluck, tables: Tables, texts: Path, tmp_path: Path
) -> None:
    recipe = potluck.recipe(tables, engine=NATS)
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    deep = tmp_path.joinpath(*["a folder of mine [draft]"] * 6)
    deep.parent.mkdir(parents=True)
    deep.symlink_to(texts / "ada")
    words = ("--data", deep, "--folder", tmp_path / "at", "--ask", "--limit", "rounds=2")
    nobody = lambda: setattr(sys, "stdin", io.StringIO())  # noqa: E731
    said = potluck("join", "--invite", hosted.invite("ada"), *words, code=13, before=nobody).err
    for part in (str(deep), "update: ", "loss on its held-out text", "signs of life", "rounds 2", "join? [y/N]"):
        assert part in said
    assert str(tmp_path / "at" / "sent.jsonl") in said and "not joined" in said


def test_who_has_given_its_rounds_leaves_and_the_others_go_on(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path, events: Callable[..., Any]
) -> None:
    rounds = {"count": 4, "local_steps": 2, "min_contributors": 1}
    people = [p for p in tables["participants"] if p["name"] != "eve"]
    recipe = potluck.recipe({**tables, "participants": people}, rounds=rounds, engine=NATS)
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    ada, bob = hosted.join("ada", sources["ada"], "--limit", "rounds=2"), hosted.join("bob", sources["bob"])
    left = ada.wait()
    assert left.code == 0 and left.result["ended"].startswith("limits.rounds") and left.result["rounds"] == 2
    assert hosted.coordinator.wait().code == 0 and bob.wait(20).code == 0, hosted.said()
    told = [(e["round"], e["status"], e["reason"]) for e in events(tmp_path / "run", "contribution")
            if e["participant"] == "ada"]  # fmt: skip
    assert [status for _, status, _ in told] == ["ok", "ok", "failed", "failed"]
    assert all("limits.rounds" in reason for _, status, reason in told if status == "failed")
    again = hosted.potluck("join", "--invite", hosted.invite("ada"), "--part", tmp_path / "ada.toml",
                           "--folder", tmp_path / "at-ada", "--limit", "rounds=2", code=13)  # fmt: skip
    assert "limits.rounds" in again.err


def test_ctrl_c_says_what_it_means_and_leaves_with_130(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path
) -> None:
    hosted = Hosted(potluck, potluck.recipe(tables, engine=NATS), tmp_path / "run")
    ada = hosted.join("ada", sources["ada"])
    hosted.until(lambda: "ready" in ada.err.read_text())
    ada.signal(signal.SIGINT)
    ended = ada.wait()
    assert ended.code == 130 and "the run goes on without" in ended.err
    assert "0 rounds, 0 B sent" in ended.result["error"] and "same command comes back" in ended.result["hint"]


def update(revision: int) -> Contribution:
    return Contribution(kind="train", revision=revision)


def test_limits_are_of_all_sessions(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    sent = Sent(path, Limits(rounds=2, bytes=100))
    sent("train-0", update(0), 40, "0" * 64)
    assert not sent.over() and not sent.over("train-1")
    sent.close()
    with path.open("ab") as file:
        file.write(b'{"task": "train-1", "by')  # a power cut
    sent = Sent(path, Limits(rounds=2, bytes=100))
    sent("train-1", update(1), 40, "0" * 64)
    assert "limits.rounds" in sent.over("train-2") and not sent.over("train-1") and not sent.over()
    with pytest.raises(PolicyError, match=r"limits\.bytes"):
        sent("train-1", update(1), 40, "0" * 64)
    assert "limits.bytes" in sent.over()
    assert [json.loads(line)["bytes"] for line in path.read_text().splitlines() if line.endswith("}")] == [40, 40]
    sent.close()
    sent = Sent(path, Limits(hours=1e-12))
    assert "limits.hours" in sent.over()
    sent.close()


@pytest.mark.parametrize(
    ("path", "limits", "says"),
    [
        (None, {}, "--data or --part: must be given"),
        ("part.toml", {"round": "3"}, "limits.round: unknown key; did you mean 'rounds'"),
        ("part.toml", {"rounds": "none"}, "limits.rounds: input should be a valid integer"),
    ],
)
def test_a_part_that_is_wrong_says_so(tmp_path: Path, path: str | None, limits: dict[str, str], says: str) -> None:
    (tmp_path / "part.toml").write_text('source = { path = "texts" }\nmodel = "mine"\n')
    place = None if path is None else tmp_path / path
    with pytest.raises(RecipeError) as error:
        load_part(place, {}, {}, (), limits)
    assert says in str(error.value)


def test_the_model_of_a_part_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "part.toml").write_text('source = { path = "texts" }\nmodel = "mine"\n')
    assert load_part(tmp_path / "part.toml", {}, {}, ()).model == str(tmp_path / "mine")
