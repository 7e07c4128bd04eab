"""Participants beyond a link of 20 Mbit/s and 50 ms each way."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.records.events import read_events
from tests.machines.conftest import HERE

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Process, Tables
    from tests.machines.conftest import Network

ROUNDS = 4
CUT_SECONDS = 10.0
STEP_SECONDS = 1.0
TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial-two-machines.md"


@pytest.fixture(scope="module")
def two(tables: Tables) -> Tables:
    """Two participants with updates of 0.5 MB, which do not travel inside messages."""
    return {
        **tables,
        "participants": tables["participants"][:2],
        "model": {"layers": 2, "width": 64, "heads": 2, "feedforward": 192, "context": 64},
        "rounds": {"count": ROUNDS, "local_steps": 2, "evaluate_every": ROUNDS},
        "outer": {"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
    }


def begun(
    network: Network, tables: Tables, run: Path, before: Callable[[str], object] = lambda _: None
) -> list[Process]:
    """A coordinator here and all participants there; ``before`` is called in their processes."""
    people = {p["name"]: Path(p["source"]["path"]) for p in tables["participants"]}
    host = network.host(network.potluck.recipe(tables), run)
    return [host, *(network.join(run, name, text, lambda name=name: before(name)) for name, text in people.items())]


def ended(processes: list[Process], seconds: float = 120.0) -> list[dict[str, Any]]:
    """What they print at the end of a run that ends well; as soon as one fails, the test does."""
    until, left = time.monotonic() + seconds, processes
    while left:
        assert time.monotonic() < until, said(left)
        left = [process for process in left if not process.ends_within(0)]
        assert all(process.wait().code == 0 for process in processes if process not in left), said(processes)
        time.sleep(0.01)
    return [process.wait().result for process in processes]


def said(processes: list[Process]) -> str:
    return "\n---\n".join(process.err.read_text()[-3000:] for process in processes)


def the_same_run(potluck: Potluck, tables: Tables, run: Path, events: Callable[..., Events]) -> bool:
    """Every round counted once and in each everybody, and the weights are those of a run in one process."""
    numbers, whole = range(1, ROUNDS + 1), run.with_name("whole")
    assert [event["round"] for event in events(run, "round")] == list(numbers)
    told = [(event["round"], event["participant"], event["status"]) for event in events(run, "contribution")]
    assert told == [(number, p["name"], "ok") for number in numbers for p in tables["participants"]]
    potluck("train", potluck.recipe(tables), "--set", f"records.folder={whole}")
    return len({events(folder, "run_finished")[0]["state_hash"] for folder in (run, whole)}) == 1


# --- the link ------------------------------------------------------------------------------------


def test_the_proxy_is_slow_and_long_and_can_be_cut(loopback: Network) -> None:
    size = 1_000_000
    host, _, port = loopback.advertised.rpartition(":")
    with socket.create_server(("127.0.0.1", loopback.port)) as listener:
        began = time.monotonic()
        with socket.create_connection((host, int(port))) as there, listener.accept()[0] as here:
            connected = time.monotonic() - began
            here.settimeout(0.3)
            there.sendall(b"x")
            assert here.recv(1) == b"x"
            arrived = time.monotonic() - began - connected
            loopback.cut()
            loopback.proxy.stdout.readline()
            there.sendall(b"y")
            with pytest.raises(TimeoutError):
                here.recv(1)
            loopback.mend()
            assert here.recv(1) == b"y"
            here.settimeout(10)
            began = time.monotonic()
            there.sendall(bytes(size))
            there.shutdown(socket.SHUT_WR)
            got = sum(map(len, iter(lambda: here.recv(1 << 16), b"")))
            seconds = time.monotonic() - began
    assert connected >= 0.1 and arrived >= 0.05
    assert got == size and seconds >= 0.05 + 8 * (size - (1 << 15)) / 20e6
    assert loopback.carried() == (size + 2, 0)


# --- blocking ------------------------------------------------------------------------------------


def test_a_run_over_the_link_is_the_run_in_one_process(
    namespaces: Network, potluck: Potluck, two: Tables, events: Callable[..., Events], tmp_path: Path
) -> None:
    run = tmp_path / "hosted"
    _, *participants = ended(begun(namespaces, two, run))
    assert [participant["ended"] for participant in participants] == ["the run is finished"] * 2
    assert the_same_run(potluck, two, run, events)
    updates = sum(event["up_bytes"] for event in events(run, "contribution"))
    assert 2 * ROUNDS * 400_000 < updates < namespaces.carried()[0] < 1.1 * updates


def test_a_cut_of_ten_seconds_loses_nothing(
    network: Network, potluck: Potluck, two: Tables, events: Callable[..., Events], tmp_path: Path
) -> None:
    run = tmp_path / "hosted"
    processes = begun(network, two, run)
    network.until(lambda: bool(events(run, "round")), processes[0])
    network.cut()
    time.sleep(CUT_SECONDS)
    reached = len(events(run, "round"))
    network.mend()
    ended(processes)
    assert reached < ROUNDS, "the cut came too late"
    assert the_same_run(potluck, two, run, events)


# --- streaming -----------------------------------------------------------------------------------


def test_streaming_keeps_participants_busy(namespaces: Network, two: Tables, tmp_path: Path) -> None:
    """In local steps by a participant's own clock, from the first round's tasks to the end of the last round.

    Two of three fragments are blobs of 0.4 MB; an exchange of one takes about 2 s, up and down, and 4 steps longer:
    a step waits, as on a slow machine, so that this needs no processor and holds on a busy one.
    """
    tables = {
        **two,
        "participants": [more_text(p, tmp_path / "texts" / p["name"]) for p in two["participants"]],
        "model": {"layers": 4, "width": 64, "heads": 2, "feedforward": 192, "context": 64},
        "local": {"batch_size": 4, "sequence_length": 64},
        "rounds": {
            "count": 7,
            "local_steps": 5,
            "evaluate_every": 7,
            "streaming": {"kind": "streaming", "fragments": 3, "overlap": 4},
        },
    }
    run, notes = tmp_path / "hosted", {p["name"]: tmp_path / f"{p['name']}.steps" for p in two["participants"]}
    _, *participants = ended(begun(namespaces, tables, run, lambda name: noting_steps(notes[name])))

    found = list(read_events(run / "events.jsonl"))
    asked = next(event for event in found if event["event"] == "evaluation")
    over = [event for event in found if event["event"] == "round"][-1]
    wall = (datetime.fromisoformat(over["time"]) - datetime.fromisoformat(asked["time"])).total_seconds()
    sent = [event for event in found if event["event"] == "contribution"]
    assert {event["status"] for event in sent} == {"ok"} and max(event["up_bytes"] for event in sent) > 400_000
    busy = [sum(map(float, notes[p["participant"]].read_text().split())) for p in participants]
    assert all(b <= p["worked_seconds"] < b + 1 for b, p in zip(busy, participants, strict=True)), participants
    assert min(busy) >= 0.9 * wall, f"{busy} s of {wall} s"


def noting_steps(path: Path) -> None:
    """Let each local step of this process take a second more, and note how long they take."""
    from potluck import participant

    take = participant.local_steps

    def timed(network: Any, optimizer: Any, settings: Any, batches: Any, rates: Iterable[float], anchor: Any) -> Any:
        began = time.monotonic()
        try:
            rates = list(rates)
            time.sleep(STEP_SECONDS * len(rates))
            return take(network, optimizer, settings, batches, rates, anchor)
        finally:
            with path.open("a") as file:
                file.write(f"{time.monotonic() - began}\n")

    participant.local_steps = timed


def more_text(participant: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The participant with five times as many documents."""
    words = " ".join(path.read_text() for path in sorted(Path(participant["source"]["path"]).iterdir())).split()
    draw = random.Random(participant["name"])
    folder.mkdir(parents=True)
    for number in range(200):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=40)))
    return {**participant, "source": {"path": str(folder)}}


# --- the tutorial --------------------------------------------------------------------------------


@pytest.mark.skipif(not TUTORIAL.exists(), reason=f"there is no {TUTORIAL.name}")
def test_the_tutorial_of_two_machines(
    namespaces: Network, potluck: Potluck, two: Tables, events: Callable[..., Events], tmp_path: Path
) -> None:
    """Its recipe and its commands, word for word but for the address and, for ben, the name."""
    page = TUTORIAL.read_text().replace("run.example.org", HERE)
    host, join, status = (
        re.findall(rf"^potluck ({line}.*)$", page, re.M)[0].split()
        for line in ("host", "join --invite", "status --inv")
    )
    (machine := tmp_path / "coordinator").mkdir()
    (machine / "garden.toml").write_text(re.findall(r"file: garden.toml -->\n```toml\n(.*?)^```", page, re.M | re.S)[0])
    processes = [potluck.start(*host, before=lambda: (os.chdir(machine), namespaces.here()))]
    run = machine / "runs" / "garden"
    namespaces.until((run / "host" / "run.json").exists, processes[0])

    def there(name: str, words: list[str]) -> Process:
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(run / "host" / "invites" / f"{name}.toml", tmp_path / name)
        return potluck.start(*words, before=lambda: (os.chdir(tmp_path / name), namespaces.there()))

    assert "garden" in there("watcher", status).wait().out
    for name, participant in zip(("ada", "ben"), two["participants"], strict=True):
        more_text(participant, tmp_path / name / "texts")
        processes.append(there(name, [word.replace("ada", name) for word in join]))
    for process in processes:
        assert process.wait().code == 0, said(processes)
    assert [event["status"] for event in events(run, "contribution")] == ["ok"] * 8
    assert events(run, "run_finished")
