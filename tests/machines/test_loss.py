"""The server's store is deleted and damaged while a run is on: it is mended, said, and the weights are the same."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.machines.test_machines import Hosted

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

ROUNDS = 12


def delete(store: Path) -> None:
    shutil.rmtree(store)


def garble_everything(store: Path) -> None:
    for path in store.rglob("*"):
        if path.is_file():
            path.write_bytes(os.urandom(max(64, path.stat().st_size)))


def garble_messages(store: Path) -> None:
    for path in store.rglob("*.blk"):
        path.write_bytes(os.urandom(path.stat().st_size))


def lose_a_stream(store: Path) -> None:
    for path in store.rglob("*-tasks"):
        shutil.rmtree(path)


def a_file_in_its_place(store: Path) -> None:
    shutil.rmtree(store)
    store.write_text("not a store")


LOSSES = [delete, garble_everything, garble_messages, lose_a_stream, a_file_in_its_place]


def lose(hosted: Hosted, loss: Callable[[Path], None]) -> None:
    """Kill the server and damage what it left, before the coordinator can start it again."""
    server = hosted.folder / "host" / "server"
    hosted.coordinator.signal(signal.SIGSTOP)
    os.kill(int((server / "server.pid").read_text()), signal.SIGKILL)
    time.sleep(0.05)
    loss(server / "store")
    hosted.coordinator.signal(signal.SIGCONT)


def test_whatever_the_server_loses_the_weights_are_those_of_the_undisturbed_run(
    potluck: Potluck,
    tables: Tables,
    sources: dict[str, dict[str, Any]],
    tmp_path: Path,
    final_hash: Callable[[Path], str],
    events: Callable[..., Any],
) -> None:
    recipe = potluck.recipe(
        tables,
        rounds={"count": ROUNDS, "local_steps": 2, "evaluate_every": 3},
        outer={"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
        engine={"kind": "nats", "heartbeat": 0.5, "inline_bytes": 0},
    )
    run = tmp_path / "run"
    potluck("train", recipe, "--set", f"records.folder={tmp_path / 'whole'}", "--set", "engine={kind='inprocess'}")
    hosted = Hosted(potluck, recipe, run)
    joined = [hosted.join(name, source) for name, source in sources.items()]
    for number, loss in enumerate(LOSSES):
        hosted.until(lambda number=number: len(events(run, "round")) > 2 * number, 120)
        lose(hosted, loss)
    ended = hosted.coordinator.wait(240)
    assert ended.code == 0, ended.err[-3000:]
    assert [process.wait(30).result["ended"] for process in joined] == ["the run is finished"] * 3

    assert final_hash(run) == final_hash(tmp_path / "whole")
    assert [event["round"] for event in events(run, "round")] == list(range(1, ROUNDS + 1))
    assert {event["status"] for event in events(run, "contribution")} == {"ok"}
    said = [event["reason"] for event in events(run, "refused") if event["participant"] == "the server"]
    assert any("lost: " in reason and "made anew" in reason for reason in said), said
    assert "cannot use its store" in ended.err and "store.damaged-1" in ended.err


def test_a_host_starts_on_a_damaged_store_and_names_it(
    potluck: Potluck,
    tables: Tables,
    sources: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    recipe = potluck.recipe(tables, rounds={"count": 2, "local_steps": 2})
    store = tmp_path / "run" / "host" / "server" / "store"
    store.parent.mkdir(parents=True)
    store.write_text("not a store")
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    joined = [hosted.join(name, source) for name, source in sources.items()]
    ended = hosted.coordinator.wait()
    assert ended.code == 0 and str(store.with_name("store.damaged-1")) in ended.err, ended.err[-3000:]
    assert all(process.wait(20).code == 0 for process in joined)


def test_a_copied_folder_is_the_same_run_and_the_same_participant_and_is_refused(
    potluck: Potluck,
    tables: Tables,
    sources: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """On the server of the first, as on one that both were given."""
    recipe = potluck.recipe(tables, rounds={"count": 2, "local_steps": 2}, engine={"kind": "nats", "heartbeat": 0.2})
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    hosted.until(lambda: "server:" in hosted.said())
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("lock", "server.pid"))
    copied = ("--set", f"records.folder={tmp_path / 'copy'}", "--json")

    same_port = potluck("host", recipe, "--listen", f"127.0.0.1:{hosted.port}", *copied, code=11).result
    assert "address already in use" in same_port["error"] and "another host of this run" in same_port["hint"]
    where = ("--server", f"tls://127.0.0.1:{hosted.port}")
    certificate = ("--certificate", tmp_path / "run" / "host" / "server" / "certificate.pem")
    same_server = potluck("host", recipe, *where, *certificate, *copied, code=11).result
    assert "another process coordinates this run" in same_server["error"], same_server

    ada = hosted.join("ada", sources["ada"])
    hosted.until(lambda: "ready" in ada.err.read_text())
    shutil.copytree(tmp_path / "at-ada", tmp_path / "copy-of-ada", ignore=shutil.ignore_patterns("lock"))
    words = ("--invite", hosted.invite("ada"), "--part", tmp_path / "ada.toml", "--folder", tmp_path / "copy-of-ada")
    copy = potluck("join", *words, "--json", code=11).result
    assert "another process takes part as ada" in copy["error"], copy
    joined = [ada, *(hosted.join(name, sources[name]) for name in ("bob", "eve"))]
    assert hosted.coordinator.wait().code == 0, hosted.said()
    assert all(process.wait(20).code == 0 for process in joined)
