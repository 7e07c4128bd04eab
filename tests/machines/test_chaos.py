"""kill -9 of the coordinator, the message server and participants, at random moments of one run of 30 rounds."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from potluck.records.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from tests.conftest import Potluck, Process, Tables

ROUNDS = 30
KILLS = ["coordinator"] * 3 + ["server"] * 3 + ["participant"] * 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machines:
    """A coordinator with its server, and participants, each a process that can die."""

    def __init__(self, potluck: Potluck, recipe: Path, folder: Path, parts: dict[str, Path]) -> None:
        self.potluck, self.recipe, self.folder, self.parts = potluck, recipe, folder, parts
        self.port = free_port()
        self.coordinator = self.host()
        self.participants: dict[str, Process] = {}

    def host(self) -> Process:
        listen = f"127.0.0.1:{self.port}"
        return self.potluck.start("host", self.recipe, "--listen", listen, "--set", f"records.folder={self.folder}")

    def join(self, name: str) -> None:
        invite = self.folder / "host" / "invites" / f"{name}.toml"
        until = time.monotonic() + 30
        while not invite.exists():
            assert time.monotonic() < until, self.coordinator.err.read_text()
            time.sleep(0.01)
        self.participants[name] = self.potluck.start(
            "join",
            "--invite",
            invite,
            "--part",
            self.parts[name],
            "--folder",
            self.folder.with_name(f"at-{name}"),
            "--json",
        )

    def kill(self, what: str, draw: random.Random) -> None:
        """Kill one and start it again; the server is started again by the coordinator."""
        if what == "server":
            self.kill_server()
        elif what == "coordinator":
            self.coordinator.signal(signal.SIGKILL)
            self.coordinator.wait()
            self.coordinator = self.host()
        else:
            name = draw.choice(sorted(self.participants))
            self.participants[name].signal(signal.SIGKILL)
            self.participants[name].wait()
            self.join(name)

    def kill_server(self) -> None:
        """It may be dead already, with the coordinator that would start it again."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                os.kill(int((self.folder / "host" / "server" / "server.pid").read_text()), signal.SIGKILL)
                return
            except (OSError, ValueError):
                time.sleep(0.01)
        raise AssertionError("no server was there to be killed")

    def reached(self) -> int:
        return max(list_checkpoints(self.folder / "checkpoints"), default=-1)


def test_killed_twelve_times_the_weights_are_those_of_the_undisturbed_run(
    potluck: Potluck, tables: Tables, tmp_path: Path, final_hash: Callable[[Path], str], events: Callable[..., Any]
) -> None:
    parts = {}
    for participant in tables["participants"]:
        parts[participant["name"]] = tmp_path / f"{participant['name']}.toml"
        parts[participant["name"]].write_text(tomli_w.dumps({"source": participant["source"]}))
    recipe = potluck.recipe(
        tables,
        rounds={"count": ROUNDS, "local_steps": 2, "evaluate_every": 3},
        outer={"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
        records={"checkpoint_every": 2, "keep_last": 3},
    )
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    potluck("train", recipe, "--set", f"records.folder={whole}")

    draw = random.Random(1)
    order = draw.sample(KILLS, len(KILLS))
    machines = Machines(potluck, recipe, disturbed, parts)
    for name in parts:
        machines.join(name)
    reached = [0]
    for number, what in enumerate(order):
        # Each kill comes at some moment after the run has got a little further than at the last one.
        goal, until = min(reached[-1] + draw.choice([0, 2]), 2 * number), time.monotonic() + 60
        while machines.reached() < goal:
            assert time.monotonic() < until and not machines.coordinator.ends_within(0), story(machines)
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        machines.kill(what, draw)
        reached.append(machines.reached())
    assert machines.coordinator.wait(150).code == 0, story(machines)
    ended = [process.wait(30) for process in machines.participants.values()]

    assert [json.loads(end.out)["ended"] for end in ended] == ["the run is finished"] * len(parts)
    assert reached == sorted(reached), "a kill lost a completed round"
    rounds = [event["round"] for event in events(disturbed, "round")]
    assert rounds == list(range(1, ROUNDS + 1)), "a round was lost or counted twice"
    told = events(disturbed, "contribution")
    assert [event["participant"] for event in told] == list(parts) * ROUNDS
    assert {event["status"] for event in told} == {"ok"}, story(machines)
    assert final_hash(disturbed) == final_hash(whole)


def story(machines: Machines) -> str:
    logs = [machines.folder / "host" / "host.log", *machines.folder.parent.glob("at-*/join.log")]
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in logs if path.exists())
