"""A run on machines of their own: the same weights as in one process, whoever comes, goes and comes back."""

from __future__ import annotations

import json
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from potluck.recipe import load_recipe
from tests.machines.test_chaos import free_port

if TYPE_CHECKING:
    from tests.conftest import Potluck, Process, Tables

ROOT = Path(__file__).parents[2]


class Hosted:
    """A coordinator and participants as processes of one machine."""

    def __init__(self, potluck: Potluck, recipe: Path, folder: Path, *words: object) -> None:
        self.potluck, self.recipe, self.folder, self.port = potluck, recipe, folder, free_port()
        self.coordinator = self.host(*words)

    def host(self, *words: object) -> Process:
        where = ("--listen", f"127.0.0.1:{self.port}", "--set", f"records.folder={self.folder}")
        return self.potluck.start("host", self.recipe, *where, *words)

    def invite(self, name: str) -> Path:
        path = self.folder / "host" / "invites" / f"{name}.toml"
        self.until(path.exists)
        return path

    def join(self, name: str, source: dict[str, Any], *words: object) -> Process:
        part = self.folder.with_name(f"{name}.toml")
        part.write_text(tomli_w.dumps({"source": source}))
        state = self.folder.with_name(f"at-{name}")
        return self.potluck.start(
            "join", "--invite", self.invite(name), "--part", part, "--folder", state, "--json", *words
        )

    def until(self, found: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end and not self.coordinator.ends_within(0), self.said()
            time.sleep(0.01)

    def said(self) -> str:
        return self.coordinator.err.read_text()[-3000:]


def test_the_demo_on_four_machines_has_the_weights_of_one_process(
    potluck: Potluck, tmp_path: Path, final_hash: Callable[[Path], str], events: Callable[..., Any]
) -> None:
    """Its tokenizer is trained on everybody's words, and nobody sends its text."""
    people = [
        p.model_dump(exclude_none=True) for p in load_recipe(ROOT / "recipes/demo-short.toml").participants[4:]
    ]  # small packages
    recipe = tmp_path / "demo.toml"
    demo, few = str(ROOT / "recipes/demo-short.toml"), {"local_steps": 3}
    recipe.write_text(tomli_w.dumps({"extends": demo, "participants": people, "rounds": few}))
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    potluck("train", recipe, "--set", f"records.folder={whole}")
    hosted = Hosted(potluck, recipe, apart)
    joined = [hosted.join(p["name"], p["source"], "--allow", "words") for p in people]
    assert hosted.coordinator.wait().code == 0, hosted.said()

    assert final_hash(apart) == final_hash(whole)
    assert [json.loads(process.wait(20).out)["ended"] for process in joined] == ["the run is finished"] * 4
    for kind in ("contribution", "evaluation"):
        assert [without_bytes(e) for e in events(apart, kind)] == [without_bytes(e) for e in events(whole, kind)]
    assert (apart / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    secrets = [*apart.glob("host/invites/*"), apart / "host/coordinator.key", *apart.glob("host/server/*.key")]
    assert len(secrets) == 7 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    seeds = [line.split('"')[1] for path in apart.glob("host/invites/*") for line in path.read_text().splitlines()
             if line.startswith("seed")]  # fmt: skip
    logs = [
        path.read_text()
        for path in (*apart.glob("host/*.log"), *apart.glob("host/server/*.log"), apart / "events.jsonl")
    ]
    assert len(seeds) == 5 and not any(seed in log for seed in seeds for log in logs)


def without_bytes(event: dict[str, Any]) -> dict[str, Any]:
    """What differs: signatures and addresses travel along."""
    return {key: value for key, value in event.items() if key not in ("down_bytes", "up_bytes", "transfers")}


def test_join_late_leave_and_return(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path, events: Callable[..., Any]
) -> None:
    """One comes after the run has begun; one leaves in order and comes back with its optimizer."""
    rounds = {"count": 40, "local_steps": 2, "evaluate_every": 40, "min_contributors": 1}
    recipe = potluck.recipe(tables, rounds=rounds, engine={"kind": "nats", "start_with": 2, "heartbeat": 0.5})
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    ada, bob = (hosted.join(name, sources[name]) for name in ("ada", "bob"))

    def told(**wanted: Any) -> list[int]:
        found = events(tmp_path / "run", "contribution")
        return [e["round"] for e in found if all(e[key] == value for key, value in wanted.items())]

    hosted.until(lambda: len(told(participant="bob", status="ok")) >= 2)
    bob.signal(signal.SIGTERM)
    assert bob.wait().code == 130
    eve = hosted.join("eve", sources["eve"])
    hosted.until(lambda: len(told(participant="eve", status="ok")) >= 1)
    bob = hosted.join("bob", sources["bob"])
    assert hosted.coordinator.wait().code == 0, hosted.said()
    for process in (ada, bob, eve):
        process.wait(20)

    assert told(participant="ada", status="ok") == list(range(1, 41))
    first = told(participant="eve", status="ok")[0]
    assert first > 2 and set(told(participant="eve", status="failed")) == set(range(1, first))
    away = told(participant="bob", status="failed")
    reasons = {e["reason"] for e in events(tmp_path / "run", "contribution") if e["status"] == "failed"}
    left = "has left: it was asked to leave"
    assert away and reasons <= {"has not joined", left, "is still preparing", "it left before it answered"}
    back = [e for e in events(tmp_path / "run", "contribution") if (e["participant"], e["status"]) == ("bob", "ok")]
    cursors = [event["cursor"] for event in back]
    assert cursors == [4 * n for n in range(1, len(cursors) + 1)], "it went on where it had stopped"


def test_a_policy_is_shown_and_kept(potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path) -> None:
    recipe = potluck.recipe(tables, rounds={"count": 2, "local_steps": 5})
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    refused = hosted.join("ada", sources["ada"], "--max-local-steps", 4).wait()
    assert refused.code == 13 and "5 local steps in a task, the policy allows 4" in json.loads(refused.out)["error"]
    assert "this participant allows" in refused.err
    hosted.coordinator.signal(signal.SIGTERM)
    assert hosted.coordinator.wait().code == 130


def test_status_and_doctor_look_from_another_terminal(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path
) -> None:
    recipe = potluck.recipe(tables, rounds={"count": 2, "local_steps": 2})
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    hosted.join("ada", sources["ada"])
    watcher = hosted.invite("watcher")

    def presence() -> dict[str, str]:
        found = potluck("status", "--invite", watcher, "--json").result
        return {name: facts["presence"] for name, facts in found["participants"].items()}

    hosted.until(lambda: presence() == {"ada": "ready", "bob": "absent", "eve": "absent"})
    here = potluck("status", tmp_path / "run").out
    assert "ready" in here and "waiting for participants" in here
    found = potluck("doctor", "--invite", hosted.invite("bob"), "--json").result
    assert found["ok"] and [f["test"] for f in found["findings"]] == [
        "disk", "reachability", "TLS", "key", "permissions", "clock", "bandwidth"
    ]  # fmt: skip
    (tmp_path / "other.toml").write_text(hosted.invite("bob").read_text().replace(str(hosted.port), "1"))
    found = potluck("doctor", "--invite", tmp_path / "other.toml", "--json", code=11).result
    assert [f["test"] for f in found["findings"] if not f["ok"]] == ["reachability"]
    hosted.coordinator.signal(signal.SIGTERM)  # and with it the server
    assert hosted.coordinator.wait().code == 130
    assert "stopped" in potluck("status", tmp_path / "run").out
    refused = potluck("status", "--invite", hosted.folder / "host" / "invites" / "bob.toml", code=12).err
    assert "is bob's; only the watcher's may look" in refused


def test_own_keys_and_rotation(potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path) -> None:
    public = potluck("join", "--make-key", tmp_path / "ada.key", "--json").result["public"]
    recipe = potluck.recipe(tables, rounds={"count": 2, "local_steps": 2})
    hosted = Hosted(potluck, recipe, tmp_path / "run", "--key", f"ada={public}")
    assert 'seed = ""' in hosted.invite("ada").read_text()
    public = potluck("join", "--make-key", tmp_path / "eve.key", "--json").result["public"]
    for key, says in (("eve", "not the key of ada that the coordinator was given"), ("gone", "no such key")):
        words = ("--invite", hosted.invite("ada"), "--key", tmp_path / f"{key}.key")
        refused = potluck("join", *words, "--data", sources["ada"]["path"], "--json", code=12).result
        assert says in refused["error"]
        potluck("doctor", *words, code=12)
    assert not (tmp_path / "gone.key").exists() and public not in hosted.invite("ada").read_text()
    old = hosted.invite("bob").read_text()
    hosted.until(lambda: "server:" in hosted.said())
    hosted.coordinator.signal(signal.SIGTERM)
    hosted.coordinator.wait()

    hosted.coordinator = hosted.host("--rotate", "bob")
    hosted.until(lambda: hosted.invite("bob").read_text() != old and "server:" in hosted.said())
    stale = tmp_path / "stale.toml"
    stale.write_text(old)
    refused = potluck("join", "--invite", stale, "--data", sources["bob"]["path"], "--json", code=11).result
    assert "does not know this key" in refused["error"]
    joined = [hosted.join("ada", sources["ada"], "--key", tmp_path / "ada.key")]
    joined += [hosted.join(name, sources[name]) for name in ("bob", "eve")]
    assert hosted.coordinator.wait().code == 0, hosted.said()
    assert all(process.wait(20).code == 0 for process in joined)


def test_one_invite_is_served_by_one_process(
    potluck: Potluck, tables: Tables, sources: dict[str, Any], tmp_path: Path, events: Callable[..., Any]
) -> None:
    """A second one is refused and everybody is told; it takes over when the first has gone."""
    people = [p for p in tables["participants"] if p["name"] != "eve"]
    recipe = potluck.recipe(
        {**tables, "participants": people},
        rounds={"count": 3, "local_steps": 2},
        engine={"kind": "nats", "heartbeat": 0.2, "silence": 2.0},
    )
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    first = hosted.join("ada", sources["ada"])
    hosted.until(lambda: "ready" in first.err.read_text())

    elsewhere = ("--invite", hosted.invite("ada"), "--data", sources["ada"]["path"], "--folder", tmp_path / "elsewhere")
    second = potluck("join", *elsewhere, "--json", code=11).result
    assert (
        "another process takes part as ada, on another machine" in second["error"] and "one machine" in second["hint"]
    )
    hosted.until(lambda: "another process tried to take part as ada" in first.err.read_text())
    hosted.until(lambda: "another process with the same invite" in hosted.said())

    first.signal(signal.SIGSTOP)  # as when a machine sleeps
    other = potluck.start("join", *elsewhere, "--json")
    hosted.until(lambda: "ready" in other.err.read_text())
    first.signal(signal.SIGCONT)
    assert "another process takes part as ada now" in first.wait(20).result["error"] and first.wait().code == 11
    bob = hosted.join("bob", sources["bob"])
    assert hosted.coordinator.wait().code == 0, hosted.said()
    assert [p.wait(20).result["ended"] for p in (other, bob)] == ["the run is finished"] * 2
    told = events(tmp_path / "run", "contribution")
    assert [e["cursor"] for e in told if e["participant"] == "ada"] == [4, 8, 12] and len(told) == 6
