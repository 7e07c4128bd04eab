"""A run whose participants edit facts together: in one process, on machines of their own, stopped and gone on with."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from potluck.edit.facts import Edit, write_edits
from tests.machines.test_machines import Hosted

if TYPE_CHECKING:
    from tests.conftest import Potluck, Process, Tables

MODEL = {"layers": 3, "width": 32, "heads": 2, "feedforward": 48, "context": 128}
VALUES = {"steps": 4}
ASK = ("claims", "moments", "edit")
PEOPLE = ("Ada Orben", "Bela Tarm", "Carl Umbo", "Dora Welk")


def edits_of(number: int, count: int = 2) -> list[Edit]:
    return [
        Edit(str(i), f"{name} {number} lives in", f"{name} {number}", "ABCDEF"[i]) for i, name in enumerate(PEOPLE)
    ][:count]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Edits of two participants; the third has none."""
    found = {}
    for number, name in enumerate(("ada", "bob")):
        found[name] = tmp_path / f"edits-{name}.json"
        write_edits(found[name], edits_of(number))
    return found


@pytest.fixture
def editing(potluck: Potluck, tables: Tables, files: dict[str, Path]) -> Callable[..., Path]:
    """A recipe that edits; keys of ``[editing]`` by name."""

    def write(rounds: int = 2, **keys: Any) -> Path:
        people = [
            {**p, **({"edits": str(files[p["name"]])} if p["name"] in files else {})} for p in tables["participants"]
        ]
        table = {"layers": [0, 1], "values": VALUES, "max_rise": 5.0, **keys}
        counts = {"count": rounds, "local_steps": 2}
        return potluck.recipe(tables, model=MODEL, editing=table, rounds=counts, participants=people)

    return write


def test_the_last_round_is_followed_by_an_edit(
    potluck: Potluck, editing: Callable[..., Path], events: Callable[..., Any], final_hash: Callable[[Path], str]
) -> None:
    recipe = editing(masks={})
    result = potluck("train", recipe, "--json").result
    run = Path(result["run"])
    (event,) = events(run, "edit")
    assert event["kept"] and event["edits"] == {"ada": 2, "bob": 2, "eve": 0} and event["round"] == 2
    assert event["refused"] == {} and set(event["layers"]) == {"0", "1"} and all(event["layers"].values())
    last = events(run, "evaluation")[-1]
    bits = {name: found["bits_per_byte"] for name, found in last["participants"].items()}
    assert event["after"] == bits and last["union"]["bits_per_byte"] == result["bits_per_byte"]
    assert [e["event"] for e in events(run)][-3:] == ["evaluation", "checkpoint", "run_finished"]
    assert events(run, "checkpoint")[-1]["state_hash"] == final_hash(run)
    plain = potluck("train", editing(), "--set", "records.folder=plain", "--json").result
    assert plain["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-6)
    potluck("generate", run, "--prompt", "Ada Orben 0 lives in", "--max-tokens", 3)
    assert potluck("evaluate", run, "--json").result["union"]["bits_per_byte"] == result["bits_per_byte"]


def join(hosted: Hosted, person: dict[str, Any], files: dict[str, Path], folder: Path) -> Process:
    """A participant with edits of its own, if it has a file of them."""
    name, secret = person["name"], folder / "secret"
    if not secret.exists():
        secret.write_text(secrets.token_hex(32))
    own = {"edits": str(files[name])} if name in files else {}
    part, policy = folder / f"part-{name}.toml", {"kinds": ["train", "evaluate", *ASK]}
    part.write_text(tomli_w.dumps({**own, "source": person["source"], "edit_secret": "secret", "policy": policy}))
    words = ("--invite", hosted.invite(name), "--part", part, "--folder", folder / f"at-{name}", "--json")
    return hosted.potluck.start("join", *words)


@pytest.mark.parametrize("form", ["sequential", "one-shot"])
def test_on_machines_of_their_own_as_in_one_process(
    potluck: Potluck,
    editing: Callable[..., Path],
    files: dict[str, Path],
    tables: Tables,
    tmp_path: Path,
    events: Callable[..., Any],
    final_hash: Callable[[Path], str],
    form: str,
) -> None:
    """Masked, over a real server: the same bits; and no edit is in what the coordinator writes."""
    recipe = editing(masks={}, form=form, every=1, at_once=1, method="alphaedit", free_directions=0.5)
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    potluck("train", recipe, "--set", f"records.folder={whole}")
    hosted = Hosted(potluck, recipe, apart)
    joined = [join(hosted, person, files, tmp_path) for person in tables["participants"]]
    assert hosted.coordinator.wait().code == 0, hosted.said()
    assert [json.loads(process.wait(20).out)["ended"] for process in joined] == ["the run is finished"] * 3
    assert final_hash(apart) == final_hash(whole)
    mine, theirs = ([{**e, "transfers": {}} for e in events(run, "edit")] for run in (apart, whole))
    assert len(mine) == 2 and mine == theirs and [e["number"] for e in mine] == [1, 2]
    assert all(all(event["layers"].values()) and event["refused"] == {} for event in mine)
    told = [path.read_bytes() for path in apart.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".log")]
    assert not any(b"Orben" in text or b"Tarm" in text for text in told)


def test_who_is_killed_in_an_edit_comes_back_and_nothing_changes(
    potluck: Potluck,
    editing: Callable[..., Path],
    files: dict[str, Path],
    tables: Tables,
    tmp_path: Path,
    events: Callable[..., Any],
    final_hash: Callable[[Path], str],
) -> None:
    """First a participant, then the coordinator, at different places of the exchange."""
    recipe = editing(values={"steps": 100, "enough": 0.0})
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    potluck("train", recipe, "--set", f"records.folder={whole}")
    hosted = Hosted(potluck, recipe, apart)
    joined = {person["name"]: join(hosted, person, files, tmp_path) for person in tables["participants"]}
    hosted.until(lambda: len(events(apart, "evaluation")) == 3)  # the last round's; the edit is what comes now
    joined["bob"].signal(signal.SIGKILL)
    joined["bob"].wait()
    bob = next(person for person in tables["participants"] if person["name"] == "bob")
    joined["bob"] = join(hosted, bob, files, tmp_path)
    hosted.coordinator.signal(signal.SIGKILL)
    hosted.coordinator.wait()
    hosted.coordinator = hosted.host()
    assert hosted.coordinator.wait().code == 0, hosted.said()
    for process in joined.values():
        process.wait(30)
    assert final_hash(apart) == final_hash(whole)
    assert [{**e, "transfers": {}} for e in events(apart, "edit")] == [
        {**e, "transfers": {}} for e in events(whole, "edit")
    ]


@pytest.mark.parametrize("kind", ["delta", "quantized"])
def test_all_hold_the_same_state_whatever_travels(
    potluck: Potluck, editing: Callable[..., Path], events: Callable[..., Any], kind: str
) -> None:
    """Each task of an edit names the state; who has another is left out."""
    recipe = editing(rounds=3, every=1, at_once=1)
    run = Path(potluck("train", recipe, "--set", f"updates.download.kind={kind}", "--json").result["run"])
    found = events(run, "edit")
    assert [event["kept"] for event in found] == [True, True, False] and not any(e["refused"] for e in found)


def test_edits_go_on_from_a_checkpoint_with_the_same_bits(
    potluck: Potluck, editing: Callable[..., Path], events: Callable[..., Any], final_hash: Callable[[Path], str]
) -> None:
    run = Path(potluck("train", editing(every=1, at_once=1), "--json").result["run"])
    before, said = final_hash(run), events(run, "edit")
    assert [event["number"] for event in said] == [1, 2] and said[0]["edits"] == {"ada": 1, "bob": 1, "eve": 0}
    potluck("resume", run, "--round", 1)
    assert final_hash(run) == before and events(run, "edit")[1] == said[1]


def test_an_edit_that_hurts_is_taken_back(
    potluck: Potluck, editing: Callable[..., Path], events: Callable[..., Any], final_hash: Callable[[Path], str]
) -> None:
    hurts = {"steps": 10, "clamp": 1000.0, "learning_rate": 100.0, "decay": 0.0}
    run = Path(potluck("train", editing(max_rise=0.0, values=hurts), "--json").result["run"])
    other = Path(
        potluck("train", editing(participants=["eve"]), "--set", "records.folder=other", "--json").result["run"]
    )
    (event,) = events(run, "edit")
    assert not event["kept"] and "editing.max_rise is 0" in event["reason"] and event["number"] == 0
    (nothing,) = events(other, "edit")
    assert not nothing["kept"] and nothing["reason"] == "there was nothing to edit"
    assert final_hash(run) == final_hash(other)


def test_conflicts_that_nobody_decided_stop_the_run_until_somebody_does(
    potluck: Potluck, editing: Callable[..., Path], files: dict[str, Path], tmp_path: Path, events: Callable[..., Any]
) -> None:
    write_edits(files["bob"], [replace(edits_of(0)[1], target="Z"), *edits_of(1)[:1]])
    decisions = tmp_path / "decisions.json"
    recipe = editing(rounds=0, policy="ask", decisions=str(decisions))
    ended = potluck("train", recipe, code=14)
    said = " ".join(ended.err.split())
    assert "1 edits are in conflict" in said and "ada 1 against bob 0" in said and "decisions.json" in said
    run = tmp_path / "runs" / "tiny"
    assert not events(run, "edit")
    potluck("resume", run, code=14)
    decisions.write_text(json.dumps({"keep": [["bob", 0]]}))
    potluck("resume", run)
    (event,) = events(run, "edit")
    assert event["kept"] and event["edits"] == {"ada": 1, "bob": 2, "eve": 0} and event["left_out"] == {"ada": [1]}
    assert event["conflicts"] == [{"edits": [["ada", 1], ["bob", 0]], "kept": ["bob", 0]}]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"layers": [0, 7]}, "the model has 0 to 2"),
        ({"layers": [1, 2]}, "layer 2 is the model's last"),
        ({"layers": [0, 0]}, "each layer once"),
        ({"participants": ["zoe"]}, "'zoe' takes no part"),
        ({"policy": "ask"}, "one needs the other"),
        ({"participants": ["ada"], "masks": {}}, "the sum of one participant hides nothing"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    potluck: Potluck, editing: Callable[..., Path], keys: dict[str, Any], reason: str
) -> None:
    ended = potluck("train", editing(**keys), code=14 if "model" in reason else 3)
    assert reason in " ".join(ended.err.split())


def test_a_participant_that_does_not_allow_edits_does_not_join(
    potluck: Potluck, editing: Callable[..., Path], tables: Tables, tmp_path: Path
) -> None:
    hosted = Hosted(potluck, editing(), tmp_path / "run")
    ended = hosted.join("ada", tables["participants"][0]["source"]).wait()
    assert ended.code == 13 and "tasks of kind `edit`" in " ".join(ended.err.split())
