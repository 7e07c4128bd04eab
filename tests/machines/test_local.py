"""From an empty folder to a run of real processes, and back to none."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.beginning import begin
from potluck.engine.nats.identity import Invite, new_seed, public_key, save_invite
from potluck.errors import CorpusError, RecipeError, StorageError
from potluck.recipe import load_recipe

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


def left_behind(folder: Path) -> list[str]:
    """Processes that have a folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and path.parent.name != str(os.getpid()):
            found.append(words.replace("\0", " "))
    return found


def test_a_first_recipe_runs_as_processes(potluck: Potluck, tmp_path: Path, final_hash: Callable[[Path], str]) -> None:
    """The same weights as in one process, and nothing left but files."""
    assert potluck("init", "--json").result == {"recipe": "first.toml", "participants": ["ada", "ben"], "warnings": []}
    assert "there is something here already" in potluck("init", code=8).err
    short = ("--set", "rounds.count=1", "--set", "rounds.local_steps=2", "--set", "data.train_bytes=20000",
             "--set", "data.validation_bytes=4000")  # fmt: skip
    run = ("--set", f"records.folder={tmp_path / 'run'}", "--json")
    ended = potluck.start("local", "first.toml", *short, *run).wait(300)
    assert ended.code == 0, ended.err
    for name in ("ada", "ben"):
        assert "round 1 of 1" in Path(ended.result["logs"][name]).read_text()
        mine = tmp_path / "run" / "local" / name
        assert mine.stat().st_mode & 0o777 == 0o700 and (mine / "sent.jsonl").stat().st_mode & 0o777 == 0o600
    for place in ("host", "local"):
        assert (tmp_path / "run" / place).stat().st_mode & 0o777 == 0o700
    assert "potluck join" not in ended.err
    again = potluck("local", "first.toml", *short, *run, code=9)
    assert "finished" in again.result["error"] and "--set name=" in again.result["hint"] and again.err.count("\n") == 2
    assert "look from another terminal: potluck status" in ended.err and left_behind(tmp_path) == []
    potluck(
        "train", "first.toml", *short, "--set", f"records.folder={tmp_path / 'whole'}", "--set", "compute.threads=1"
    )
    assert final_hash(tmp_path / "run") == final_hash(tmp_path / "whole")


def test_ctrl_c_ends_all_and_the_same_command_goes_on(
    potluck: Potluck, tables: Tables, tmp_path: Path, events: Callable[..., Any]
) -> None:
    people = [p for p in tables["participants"] if p["name"] != "eve"]
    recipe = potluck.recipe({**tables, "participants": people}, rounds={"count": 30, "local_steps": 1})
    words = ("local", recipe, "--set", f"records.folder={tmp_path / 'run'}", "--json")
    run = potluck.start(*words)
    while not events(tmp_path / "run", "round"):
        assert not run.ends_within(0.05), run.err.read_text()
    run.signal(signal.SIGINT)
    stopped = run.wait(300)
    assert stopped.code == 130 and "the same command goes on" in stopped.result["hint"], stopped.err
    assert left_behind(tmp_path / "run") == []
    assert "potluck local" in potluck("resume", tmp_path / "run", code=9).err
    assert "potluck local" in potluck("status", tmp_path / "run").out
    for name in ("ada", "bob"):
        assert "could not say goodbye" in (tmp_path / "run" / "local" / f"{name}.log").read_text()
    done = len(events(tmp_path / "run", "round"))
    assert 1 <= done < 30
    assert potluck.start(*words).wait(300).result["rounds"] == 30
    assert len(events(tmp_path / "run", "run_resumed")) == 1 and left_behind(tmp_path / "run") == []


def test_whoever_cannot_begin_ends_all(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    people = [*tables["participants"][:1], {"name": "bob", "source": {"path": str(tmp_path / "nowhere")}}]
    recipe = potluck.recipe({**tables, "participants": people})
    ended = potluck.start("local", recipe, "--set", f"records.folder={tmp_path / 'run'}", "--json").wait(300)
    assert ended.code == 4
    assert "bob left with exit code 4" in ended.result["error"] and "nowhere" in ended.result["error"]
    assert left_behind(tmp_path / "run") == []
    people = [{"name": "ada"}]
    recipe = potluck.recipe({**tables, "participants": people}, engine={"kind": "nats"})
    assert "'ada' has no source" in potluck("local", recipe, code=3).err


def test_what_cannot_join_is_told_before_anything_is_dialled(potluck: Potluck, recipe_file: Path, texts: Path) -> None:
    assert "it is a recipe, not an invite" in potluck("join", "--invite", recipe_file, "--data", texts, code=12).err
    invite = recipe_file.with_name("ada.invite")
    seed, key = new_seed(), public_key(new_seed())
    facts = Invite(
        run="0123456789ab", recipe="tiny", participant="ada", urls=("tls://127.0.0.1:1",), coordinator=key, seed=seed
    )
    save_invite(facts, invite)
    err = potluck("join", "--invite", invite, "--data", texts.with_name(texts.name[:-1]), code=4).err
    assert "there is no such file or folder" in err and f"did you mean {texts}?" in err


def test_data_that_is_given_is_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [Path("my texts"), Path("more/my texts"), Path("letters.jsonl")]
    for place in places[:2]:
        place.mkdir(parents=True)
        (place / 'a"b.txt').write_text("some words of text\n" * 3000)
    places[2].write_text((json.dumps({"text": "a letter"}) + "\n") * 3000)
    assert begin("mine", places)["participants"] == ["my-texts", "my-texts-2", "letters"]
    sources = [p["source"] for p in tomllib.loads(Path("mine.toml").read_text())["participants"]]
    assert sources == [{"path": "my texts"}, {"path": "more/my texts"}, {"jsonl": "letters.jsonl"}]
    load_recipe("mine.toml")
    for name, data, kind in (
        ("mine", places, StorageError),
        ("a b", [], RecipeError),
        ("x", [Path("no")], CorpusError),
    ):
        with pytest.raises(kind):
            begin(name, data)
    assert not Path("x.toml").exists()
