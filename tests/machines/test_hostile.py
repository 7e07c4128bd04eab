"""What a hostile participant or a stranger can send: each is refused with its reason, and does no harm."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from potluck.aggregation.mean import WeightedMean
from potluck.contribution import Contribution, Packed, Task
from potluck.engine.nats.blobs import chunks_of
from potluck.engine.nats.bulk import Bulk
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.frames import signed
from potluck.engine.nats.identity import new_seed
from potluck.engine.nats.site import Received, Site
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import EngineError, Refused, StorageError
from potluck.recipe import parse_recipe
from potluck.records.events import Event, EventLog
from potluck.rounds.state import begin
from potluck.rounds.sync import run_rounds
from potluck.updates import codec
from potluck.updates.fragments import Fragment
from tests.machines.world import World

SIZE = 200_000  # 800 kB: a blob
HONEST = {"ann": 1.0, "bob": 3.0}
FIGURES = {"loss": 1.0, "steps": 1, "skipped_steps": 0, "tokens": 10, "examples": 1, "cursor": 1, "epoch": 0}


def update(revision: int, vector: torch.Tensor, **figures: Any) -> Contribution:
    return Contribution(kind="train", revision=revision, header={**FIGURES, **figures}, tensors={"parameters": vector})


def honest(name: str, task: Task) -> Contribution:
    return update(task.revision, torch.full((SIZE,), HONEST[name]))


@dataclass
class Attack:
    """Eve with a valid invite, and a task that she was given."""

    site: Site
    received: Received
    sent: list[bytes]

    @property
    def revision(self) -> int:
        return int(self.received.fields["revision"])

    def frame(self, packed: Packed, payload: bytes = b"", **facts: Any) -> bytes:
        said = {"run": self.site.post.names.run, "task": self.received.name, "from": "eve", "status": "ok"}
        return signed(self.site.post.seed, {**said, "message": packed.fields, **facts}, payload)

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)
        self.site.post.connection.store(self.site.post.names.reply("eve"), frame)

    def put(self, packed: Packed, chunks: list[list[memoryview]]) -> None:
        """Chunks under the name that the message gives its payload, whatever they hold."""
        digest = packed.fields["payload"]["sha256"]
        with Bulk(self.site.post.connection.access) as bulk:
            list(bulk.put(lambda n: self.site.post.names.upload("eve", f"{digest}.{n}"), enumerate(chunks)))

    def answer(self, contribution: Contribution) -> None:
        """Properly signed and sent, whatever it holds."""
        packed = codec.pack(contribution)
        self.put(packed, list(chunks_of(packed.parts)))
        self.send(self.frame(packed))


def oversized(eve: Attack) -> None:
    packed = codec.pack(update(eve.revision, torch.zeros(10)))
    fields = {**packed.fields, "payload": {"bytes": 1 << 40, "sha256": "a" * 64}}
    eve.send(eve.frame(replace(packed, fields=fields)))


def truncated(eve: Attack) -> None:
    packed = codec.pack(update(eve.revision, torch.zeros(SIZE)))
    (chunk,) = chunks_of(packed.parts)
    eve.put(packed, [[*chunk[:-1], chunk[-1][:-1000]]])
    eve.send(eve.frame(packed))


def flipped(eve: Attack) -> None:
    packed = codec.pack(update(eve.revision, torch.zeros(SIZE)))
    content = bytearray(b"".join(packed.parts))
    content[-1] ^= 1
    eve.put(packed, [[memoryview(content)]])
    eve.send(eve.frame(packed))


def not_a_number(eve: Attack) -> None:
    eve.answer(update(eve.revision, torch.full((SIZE,), torch.nan)))


def another_shape(eve: Attack) -> None:
    eve.answer(update(eve.revision, torch.zeros(SIZE // 2, 2)))


def far_away(eve: Attack) -> None:
    eve.answer(update(eve.revision, torch.full((SIZE,), 1e9)))


def foreign_revision(eve: Attack) -> None:
    eve.answer(update(eve.revision + 7, torch.zeros(SIZE)))


def bomb(eve: Attack) -> None:
    """Seventy bytes that say they are four terabytes of zeros."""
    header = json.dumps({"parameters": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    payload = len(header).to_bytes(8, "little") + header
    packed = codec.pack(update(eve.revision, torch.zeros(1)))
    named = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    like = Packed(fields={"payload": named}, parts=[memoryview(payload)])
    packed = codec.pack(update(eve.revision, torch.zeros(1)), like)
    eve.send(eve.frame(packed, payload))


def replay(eve: Attack) -> None:
    eve.answer(update(eve.revision, torch.full((SIZE,), 2.0)))  # the mean of the others: it changes nothing
    eve.send(eve.sent[0])
    eve.send(eve.sent[-2])


def garbage(eve: Attack) -> None:
    eve.send(os.urandom(300))
    eve.send(signed(eve.site.post.seed, {"run": [["deep"]], "message": "no"})[:-5] + b"}{]]]")


def somebody_elses_name(eve: Attack) -> None:
    packed = codec.pack(update(eve.revision, torch.full((SIZE,), 1e3)))
    eve.send(eve.frame(packed, **{"from": "ann"}))


def another_run(eve: Attack) -> None:
    packed = codec.pack(update(eve.revision, torch.full((SIZE,), 1e3)))
    eve.send(eve.frame(packed, run="ba9876543210"))


def forged(eve: Attack) -> None:
    """Signed with another key than eve's."""
    packed = codec.pack(update(eve.revision, torch.zeros(SIZE)))
    facts = {"run": eve.site.post.names.run, "task": eve.received.name, "from": "eve", "status": "ok"}
    eve.send(signed(new_seed(), {**facts, "message": packed.fields}))


def slow_drip(eve: Attack) -> None:
    """All is announced, and nothing but a first byte comes."""
    packed = codec.pack(update(eve.revision, torch.zeros(SIZE)))
    eve.send(eve.frame(packed))


# In turn, one a round: what eve does, where it shows, and the reason.
ATTACKS: list[tuple[Callable[[Attack], None], str, str]] = [
    (oversized, "contribution", "oversized: 1099511627776 bytes, at most"),
    (truncated, "contribution", "chunk 0 has 799088 bytes, not 800088"),
    (flipped, "contribution", "its content does not match its hash"),
    (not_a_number, "contribution", "parameters are not finite"),
    (another_shape, "contribution", "is not the shared state's"),
    (far_away, "contribution", "rounds.max_update_norm is"),
    (foreign_revision, "contribution", "revision 13, expected 6"),
    (bomb, "contribution", "not a message of format 2"),
    (replay, "refused", "replay: task train-"),
    (garbage, "refused", "garbage: not a frame"),
    (somebody_elses_name, "refused", "says it is somebody else's"),
    (another_run, "refused", "a reply of another run"),
    (forged, "refused", "a signature that is not its sender's"),
    (slow_drip, "contribution", "no answer in time"),
]
RECIPE = {
    "participants": [{"name": name} for name in ("ann", "bob", "eve")],
    "engine": {"kind": "nats"},
    "rounds": {
        "count": len(ATTACKS), "local_steps": 1, "deadline": 3.0, "grace": 0.7, "min_contributors": 2,
        "evaluate_every": 1000, "max_update_norm": 1e6, "weights": "uniform",
    },
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "world", ("ann", "bob", "eve"), max_reply_bytes=1 << 20)
    yield found
    found.close()


def test_every_attack_is_refused_with_its_reason_and_the_run_is_unharmed(world: World, tmp_path: Path) -> None:
    for name in HONEST:
        world.attend(name, honest)
    site, sent = world.site("eve"), []

    def be_hostile() -> None:
        for attack, _, _ in ATTACKS:
            while (received := site.next(1.0)) is None:
                if world.over.is_set():
                    return
            attack(Attack(site, received, sent))
            received.delivery.done()

    world.wait_for_all()
    threading.Thread(target=be_hostile, daemon=True).start()
    recipe, events = parse_recipe(RECIPE), list[Event]()
    log = EventLog(tmp_path / "events.jsonl", listeners=(events.append,))
    world.engine.refused = lambda who, why, count: log.write("refused", participant=who, reason=why)
    shared = begin(recipe, torch.zeros(SIZE), (Fragment(((SIZE,),), (slice(0, SIZE),)),))
    names = recipe.participant_names
    run_rounds(recipe, names, world.engine, WeightedMean(SIZE), shared, log, lambda score: None, lambda: False)
    while world.engine.receive(0.5) is not None:  # what was refused last
        pass
    log.close()

    assert torch.equal(shared.theta, torch.full((SIZE,), 2.0))
    told = [event for event in events if event["event"] == "contribution"]
    assert all(event["status"] == "ok" for event in told if event["participant"] != "eve")
    for number, (attack, kind, reason) in enumerate(ATTACKS, 1):
        said = [e["reason"] for e in events if e["event"] == "refused"]
        if kind == "contribution":
            said = [e["reason"] for e in told if (e["participant"], e["round"]) == ("eve", number)]
        assert any(reason in text for text in said), (attack.__name__, said)


def test_the_server_refuses_unknown_keys_and_other_peoples_subjects(world: World) -> None:
    stranger = Connection(replace(world.access("eve"), seed=new_seed()))
    with pytest.raises(Refused, match="does not know this key"):
        stranger.open(5)
    stranger.close()
    eve = world.connect("eve")
    for subject in (
        world.names.reply("ann"), world.names.task("ann"), world.names.upload("ann", f"{'0' * 64}.0"),
        world.names.about, world.names.member("ann"), "potluck.ba9876543210.reply.eve",
        f"$JS.API.STREAM.PURGE.{world.names.states}", f"$JS.API.STREAM.DELETE.{world.names.replies}",
        world.names.direct(world.names.uploads("ann"), world.names.upload("ann", f"{'0' * 64}.0")),
    ):  # fmt: skip
        with pytest.raises(Refused, match="permissions violation"):
            eve.store(subject, b"{}", patience=0.5)
    with Bulk(eve.access) as bulk, pytest.raises((EngineError, OSError, EOFError)):  # larger than the server takes
        list(bulk.put(lambda n: world.names.reply("eve"), iter([(0, [memoryview(bytes(2 << 20))])])))
    eve.store(world.names.member("eve"), b"{}")
    log = (world.folder / "server.log").read_text()
    assert "authentication error" in log and log.count("Publish Violation") >= 9 and "maximum payload" in log.lower()


def test_the_server_does_for_nobody_what_he_may_not_do_himself(world: World) -> None:
    """It answers on any subject that the asker names: asking where an answer is a command must command nothing."""
    names = world.names
    about = b"what the run is about"
    world.connection.store(names.about, about)
    world.connection.store(names.task("ann"), b"a task of ann's")
    world.engine.presence.renew()
    eve = world.connect("eve")
    commands = [
        f"$JS.API.STREAM.PURGE.{names.states}", f"$JS.API.STREAM.PURGE.{names.tasks}",
        f"$JS.API.STREAM.DELETE.{names.replies}", names.member(COORDINATOR), names.reply("ann"),
    ]  # fmt: skip

    async def ask(connection: Any) -> None:
        for command in commands:
            for asked in (names.direct(names.states, names.state("nothing")), names.direct(names.states, names.about)):
                await connection.publish(asked, b"", reply=command)
        await connection.flush()

    eve._run(ask(eve._nats), 10)
    eve.store(names.member("eve"), b"{}")
    assert world.connection.last(names.direct(names.states, names.about))[0] == about
    assert world.connection.api(f"STREAM.INFO.{names.tasks}")["state"]["messages"] == 1
    assert world.connection.api(f"STREAM.INFO.{names.replies}")["state"]["last_seq"] == 0
    said, _ = world.connection.last(names.direct(f"KV_{names.members}", names.member(COORDINATOR)))
    assert json.loads(said)["session"] == "here", "the coordinator's own"


def test_a_full_store_is_said_and_everybody_goes_on(tmp_path: Path) -> None:
    """What does not fit is refused with its reason, and what fits still comes through."""
    world = World(tmp_path / "small", ("ann", "bob"), storage=64 << 20)
    try:
        for name in ("ann", "bob"):
            world.attend(name, lambda name, task: update(task.revision, torch.zeros(10)))
        world.wait_for_all()
        large = Task(kind="train", revision=0, tensors={"parameters": torch.zeros(8 << 20)}, state="large")
        world.engine.send("ann", large)
        with pytest.raises(StorageError, match="the message server's store is full"):
            world.engine.receive(20)
        world.engine.send("bob", Task(kind="train", revision=1, state="small"))
        assert world.engine.receive(20).status == "ok"
    finally:
        world.close()


def test_whoever_dials_and_says_nothing_is_shown_the_door(world: World) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", world.port), 10) as silent:
        silent.settimeout(15)
        silent.sendall(b"\x16")  # the first byte of a TLS hello, and no more
        began = time.monotonic()
        assert silent.recv(100) == b""
        assert time.monotonic() - began < 12
    world.connect("eve").store(world.names.member("eve"), b"{}")
