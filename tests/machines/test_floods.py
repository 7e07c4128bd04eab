"""What one participant pours out holds up nobody else and is dropped; what the server loses comes again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potluck.contribution import Contribution, Task
from potluck.engine.nats.bulk import Bulk
from potluck.errors import StorageError
from tests.machines.world import World

SIZE = 200_000  # 800 kB: a blob
MIB = 1 << 20


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "world", ("ann", "eve"), storage=64 * MIB)
    yield found
    found.close()


def task(revision: int) -> Task:
    theta = torch.full((SIZE,), float(revision))
    return Task(kind="train", revision=revision, tensors={"parameters": theta}, state=f"{revision}")


def answer(name: str, asked: Task) -> Contribution:
    return Contribution(kind="train", revision=asked.revision, tensors={"parameters": torch.ones(SIZE)})


def uploads(world: World, name: str) -> int:
    found = world.connection.api(f"STREAM.INFO.{world.names.uploads(name)}")
    return int(found["state"]["messages"])


def test_uploads_that_nobody_asked_for_stop_nobody_and_are_dropped(world: World) -> None:
    world.attend("ann", answer)
    eve = world.site("eve")
    world.wait_for_all()
    chunks = ((number, [memoryview(bytes(MIB))]) for number in range(100))
    with Bulk(eve.post.connection.access) as bulk, pytest.raises(StorageError, match="store is full"):
        list(bulk.put(lambda n: world.names.upload("eve", f"{'f' * 64}.{n}"), chunks))
    assert 5 < uploads(world, "eve") < 13, "her share of the room"
    for revision in range(3):
        world.engine.send("ann", task(revision))
        reply = world.engine.receive(20)
        assert reply is not None and (reply.status, reply.participant) == ("ok", "ann")
    world.engine.send("eve", task(3))
    assert uploads(world, "eve") == 0


def test_a_flood_of_garbage_is_counted_and_others_are_heard(world: World) -> None:
    world.attend("ann", answer)
    eve = world.connect("eve")
    world.site("eve")
    world.wait_for_all()
    for number in range(2000):
        eve.tell(world.names.reply("eve"), b"garbage %d" % number)
    world.engine.send("ann", task(0))
    while (reply := world.engine.receive(20)) is None or reply.status != "ok":
        assert reply is not None, "ann was not heard"
    eve.ping()
    world.engine.receive(1.0)
    told = [why for who, why in world.told if who == "eve"]
    assert 1 <= len(told) <= 4 and all("garbage: not a frame" in why for why in told)


SIGNS = [
    b"[" * 10_000,
    b"\xff",
    b'{"status": "ready"',
    {"status": ["ready"]},
    {"status": "ready", "worked_seconds": "abc"},
    {"status": "ready", "worked_seconds": 10**400},
    {"status": "ready", "holding": {"content_hash": "e", "train_tokens": 10**300}},
    {"status": "ready", "holding": [1]},
    {"status": "ready", "evaluates": "yes"},
    {"status": "ready", "environment": {"device": {"deep": [1]}}},
]


def test_a_sign_of_life_that_is_none_is_refused_and_others_are_seen(world: World) -> None:
    ann, eve = world.site("ann"), world.site("eve")
    world.wait_for_all()
    eve.close()
    raw = world.connect("eve")
    time.sleep(0.3)  # until it says no more
    for sign in SIGNS:
        raw.store(world.names.member("eve"), sign if isinstance(sign, bytes) else json.dumps(sign).encode())
        world.members.look()
    evil: dict[str, Any] = {"status": "left", "reason": "\x1b]0;title\x07[red]\n", "presence": "\x1b", "session": "x"}
    raw.store(world.names.member("eve"), json.dumps(evil).encode())
    world.members.look()
    facts = world.members.facts("eve")
    assert facts["presence"] == "left" and facts["reason"].isprintable()
    ann.say(status="left")
    until = time.monotonic() + 20
    while world.members.presence("ann") != "left":  # the thread that looks is alive
        assert time.monotonic() < until
        time.sleep(0.05)
    world.engine.receive(0.1)
    assert [why[:16] for who, why in world.told if who == "eve"] == ["no sign of life:"] * 2  # the first, the tenth


def test_a_task_a_state_and_an_answer_that_the_server_lost_come_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.engine.nats.coordinator.IDLE_SECONDS", 0.5)
    monkeypatch.setattr("potluck.engine.nats.bulk.LACKING_SECONDS", 0.5)
    ann = world.site("ann")
    world.site("eve")
    world.wait_for_all()

    def lose(stream: str) -> None:
        world.connection.api(f"STREAM.PURGE.{stream}", {})

    world.engine.send("ann", task(1))
    until = time.monotonic() + 20
    while not world.engine._post.blobs.held(None):
        assert time.monotonic() < until
    lose(world.names.tasks)
    lose(world.names.states)
    received = ann.next(20)
    assert received is not None
    ann.say(status="working", task=received.name)
    asked = ann.task(received, lambda: time.monotonic() > until)
    assert torch.equal(asked.tensors["parameters"], torch.ones(SIZE))

    def send() -> None:
        ann.answer(received.name, answer("ann", asked), "", world.over.is_set)
        received.delivery.done()

    send()
    lose(world.names.uploads("ann"))  # perhaps before it was fetched
    ann.say(status="ready", task="")
    reply = world.engine.receive(0.5)
    while reply is None:
        assert time.monotonic() < until
        if (again := ann.next(0.5)) is not None:
            assert again.name == received.name
            send()
            again.delivery.done()
        reply = world.engine.receive(0.1)
    assert reply.status == "ok"
