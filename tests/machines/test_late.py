"""Answers that are still to come when a coordinator dies, or gives up one of two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from potluck.contribution import Contribution, Shelf, Task
from potluck.engine.nats.presence import Members
from tests.machines.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "world", ("ann", "eve"))
    yield found
    found.close()


def task(revision: int) -> Task:
    whole = {"parameters": torch.full((10,), float(revision))}
    return Task(kind="train", revision=revision, tensors=whole, state=f"state {revision}")


def test_a_late_answer_is_asked_for_again_by_another_session(world: World) -> None:
    eve = world.site("eve")
    world.site("ann")
    world.wait_for_all()
    world.engine.send("ann", task(0))
    late = world.engine.send("eve", task(1))
    facts = world.engine.saved(Shelf())
    world.engine.close()
    for thread in threading.enumerate():
        if thread.name == "potluck_listen":  # of the session that is over
            thread.join(10)

    members = Members(world.connection, world.names, world.people, world.settings.silence)
    members.look()
    again = world.coordinate(members, lambda *told: None)
    try:
        again.restore(facts, {}, {late: ("eve", task(1))})
        received = eve.next(20)
        assert received is not None and received.fields["revision"] == 1
        start = eve.task(received, world.over.is_set).tensors["parameters"]
        answer = Contribution(kind="train", revision=1, tensors={"parameters": start + 1})
        eve.answer(received.name, answer, "", world.over.is_set)
        reply = again.receive(20)
        assert reply is not None and (reply.task, reply.status) == (late, "ok")
        assert again.send("ann", task(2)) > late
    finally:
        again.close()


def test_one_task_is_given_up_and_the_next_of_the_same_participant_stays(world: World) -> None:
    eve = world.site("eve")
    world.site("ann")
    world.wait_for_all()
    first, second = (world.engine.send("eve", task(revision)) for revision in (0, 1))
    world.engine.cancel(first)
    received = eve.next(20)
    assert received is not None and received.fields["revision"] == 1
    eve.answer(received.name, Contribution(kind="train", revision=1), "", world.over.is_set)
    reply = world.engine.receive(20)
    assert reply is not None and reply.task == second
    assert not world.told
