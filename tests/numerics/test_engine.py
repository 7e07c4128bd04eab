"""What every engine owes the rounds; and the virtual clock, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potluck.contribution import Contribution, ParticipantInfo, Task
from potluck.engine.inprocess import InProcess
from potluck.engine.protocol import Engine
from potluck.errors import TrainingError
from potluck.recipe.engine import Nats
from potluck.recipe.sources import Profile
from potluck.updates.codec import wire_bytes
from tests.machines.world import World

NAMES = ("ann", "bob", "cem")
SIGNED = 500  # bytes that a signature, the task's name and addresses add to a message
PROFILE = Profile(steps_per_second=2.0, uplink=4.0, downlink=8.0, latency=100.0)

Perform = Callable[[str, Task], Contribution]
MakeEngine = Callable[..., Engine]


def doubled(name: str, task: Task) -> Contribution:
    """Twice the shared state; ``bob`` fails at kind ``fail``."""
    if (name, task.kind) == ("bob", "fail"):
        raise TrainingError("bob ran out of text", "give bob more")
    return Contribution(
        kind=task.kind,
        revision=task.revision,
        header={"by": name},
        tensors={"x": 2 * task.tensors.get("x", torch.ones(1000))},
    )


def task_of(kind: str = "train", revision: int = 0, value: float = 1.0, steps: int = 1) -> Task:
    tensors = {"x": torch.full((1000,), value)}
    return Task(kind=kind, revision=revision, parameters={"steps": steps}, tensors=tensors, state=str(value))


@pytest.fixture(params=["inprocess", "inprocess with profiles", "nats", "nats with blobs"])
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEngine]:
    """An engine with NAMES on its roster."""
    worlds: list[World] = []

    def make(perform: Perform = doubled) -> Engine:
        if "nats" in request.param:
            settings = Nats(heartbeat=0.2, inline_bytes=100 if "blobs" in request.param else 1 << 16)
            worlds.append(World(tmp_path / f"world-{len(worlds)}", NAMES, settings))
            for name in NAMES:
                worlds[-1].attend(name, perform)
            worlds[-1].wait_for_all()
            return worlds[-1].engine
        roster = [ParticipantInfo(name=name) for name in NAMES]
        profiles = {name: PROFILE for name in NAMES} if "profiles" in request.param else None
        return InProcess(roster, perform, wire_bytes, profiles)

    yield make
    for world in worlds:
        world.close()


def none_in_time(engine: Engine) -> bool:
    """Whether nothing comes: what is remote is waited for, and what is not is done when it is asked for."""
    return engine.receive(timeout=0.3 if engine.remote else None) is None


# --- what holds for every engine ----------------------------------------------------------------


def test_the_roster_keeps_its_order(make_engine: MakeEngine) -> None:
    assert tuple(make_engine().roster()) == NAMES


def test_every_task_gets_one_reply(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sent = {engine.send(name, task_of(value=value)): (name, value) for value in (1.0, 2.0) for name in NAMES}
    assert len(sent) == 6
    while sent:
        reply = engine.receive(timeout=20)
        name, value = sent.pop(reply.task)
        assert (reply.participant, reply.status, reply.contribution.header) == (name, "ok", {"by": name})
        assert torch.equal(reply.contribution.tensors["x"], torch.full((1000,), 2 * value))
        assert wire_bytes(reply.contribution) <= reply.up_bytes <= wire_bytes(reply.contribution) + SIGNED
    assert none_in_time(engine)


def test_a_failure_is_a_reply_with_its_reason(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for name in NAMES:
        engine.send(name, task_of("fail"))
    replies = {reply.participant: reply for reply in (engine.receive(), engine.receive(), engine.receive())}
    assert [replies[name].status for name in NAMES] == ["ok", "failed", "ok"]
    bob = replies["bob"]
    assert (bob.contribution, bob.reason) == (None, "bob ran out of text") and bob.up_bytes < SIGNED
    assert wire_bytes(task_of("fail")) <= bob.down_bytes <= wire_bytes(task_of("fail")) + SIGNED


def test_a_cancelled_task_has_no_reply(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first, second, third = (engine.send(name, task_of()) for name in NAMES)
    engine.cancel(second)
    assert {engine.receive().task, engine.receive().task} == {first, third}
    engine.cancel(first)  # too late, and harmless
    assert none_in_time(engine)


def test_receiving_nothing_is_none(make_engine: MakeEngine) -> None:
    assert none_in_time(make_engine())
    assert make_engine().receive(timeout=0.01) is None


def test_what_is_sent_is_counted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for task in (task_of(), task_of(value=2.0), Task(kind="train", revision=0, parameters={"steps": 1})):
        engine.send("ann", task)
        assert wire_bytes(task) <= engine.receive().down_bytes <= wire_bytes(task) + SIGNED


def test_time_goes_forward(make_engine: MakeEngine) -> None:
    engine = make_engine()
    times = [engine.now()]
    for name in NAMES:
        engine.send(name, task_of())
        times.append(engine.now())
    for _ in NAMES:
        reply = engine.receive()
        times.append(engine.now())
        assert 0 <= reply.seconds <= engine.now()
    assert times == sorted(times)


def test_a_reply_holds_until_the_next_is_received(make_engine: MakeEngine) -> None:
    """Though participants of one place take turns in one working memory."""
    memories: dict[str, torch.Tensor] = {}

    def perform(name: str, task: Task) -> Contribution:
        memory = memories.setdefault(name if engine.remote else "all", torch.zeros(1000))
        memory.copy_(task.tensors["x"])
        return Contribution(kind=task.kind, revision=task.revision, tensors={"x": memory})

    engine = make_engine(perform)
    values = {engine.send(name, task_of(value=float(i))): float(i) for i, name in enumerate(NAMES)}
    for _ in NAMES:
        reply = engine.receive()
        assert torch.equal(reply.contribution.tensors["x"], torch.full((1000,), values[reply.task]))


# --- the virtual clock ----------------------------------------------------------------------------


def simulated(profiles: dict[str, Profile], seed: int = 0, perform: Perform = doubled) -> InProcess:
    def size(message):  # 10 MB with tensors, 1 kB without
        return 10_000_000 if message.tensors else 1_000

    return InProcess([ParticipantInfo(name=name) for name in profiles], perform, size, profiles, seed)


def test_times_are_those_computed_by_hand() -> None:
    engine = simulated({"ann": PROFILE})
    engine.send("ann", task_of(steps=6))
    engine.send("ann", task_of(steps=4))
    first, second = engine.receive(), engine.receive()
    down, bare, up = 0.1 + 80e6 / 8e6, 0.1 + 8e3 / 8e6, 0.1 + 80e6 / 4e6
    assert first.seconds == pytest.approx(down + 3 + up)
    assert second.seconds == pytest.approx(down + 3 + 2 + up)  # one task at a time, begun when the first is done
    assert engine.now() == pytest.approx(second.seconds)
    engine.send("ann", replace(task_of(steps=2), tensors={}))
    assert engine.receive().seconds == pytest.approx(bare + 1 + up)
    assert engine.now() == pytest.approx(down + 5 + up + bare + 1 + up)


def test_replies_come_in_order_of_arrival() -> None:
    """The fastest has the slowest link; who is worked on first is not who arrives first."""
    engine = simulated(
        {
            "fast": Profile(steps_per_second=100.0, uplink=1.0),
            "slow": Profile(steps_per_second=1.0, uplink=100.0),
            "even": Profile(steps_per_second=5.0, uplink=10.0),
        }
    )
    for name in engine.roster():
        engine.send(name, task_of(steps=20))
    replies = [engine.receive() for _ in range(3)]
    assert [reply.participant for reply in replies] == ["even", "slow", "fast"]
    assert [reply.seconds for reply in replies] == sorted(reply.seconds for reply in replies)


def test_equal_arrivals_come_in_order_of_sending() -> None:
    engine = simulated({name: PROFILE for name in NAMES})
    sent = [engine.send(name, task_of()) for name in ("cem", "ann", "bob")]
    assert [engine.receive().task for _ in sent] == sent


def test_a_timeout_passes_on_the_virtual_clock() -> None:
    engine = simulated({"ann": PROFILE})
    engine.send("ann", task_of(steps=6))  # 10.1 down, 3 steps, 20.1 up
    for waited in (10.0, 20.0, 30.0):
        assert engine.receive(timeout=10.0) is None
        assert engine.now() == waited
    assert engine.receive(timeout=10.0).seconds == pytest.approx(33.2)


def availability(seed: int, share: float) -> list[tuple[str, str, float]]:
    engine = simulated({name: PROFILE.model_copy(update={"availability": share}) for name in NAMES}, seed)
    replies = []
    for revision in range(100):
        for name in NAMES:
            engine.send(name, task_of(revision=revision))
        replies += [engine.receive() for _ in NAMES]
    return [(reply.participant, reply.status, reply.seconds) for reply in replies]


def test_two_runs_are_the_same_and_draws_follow_the_seed() -> None:
    assert availability(1, 0.5) == availability(1, 0.5) != availability(2, 0.5)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_availability_is_a_probability(share: float) -> None:
    statuses = [status for _, status, _ in availability(3, share)]
    assert statuses.count("ok") == pytest.approx(300 * share, abs=4 * (300 * share * (1 - share)) ** 0.5)
