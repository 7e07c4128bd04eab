"""potluck's own engine over NATS on loopback, measured as its peers in ``benchmarks.peers.wire_*`` are.

A server, a coordinator and participants are processes of their own, with TLS, signatures, a store on disk and SHA-256
at both ends. The participant sends the tensors that came back as a contribution.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Processes, Report, free_port, measure, read_json, write_json
from potluck.contribution import Contribution, Packed, Task
from potluck.engine.nats.blobs import JetStreamBlobs
from potluck.engine.nats.claim import Claim
from potluck.engine.nats.connection import Connection, access_of
from potluck.engine.nats.coordinator import NatsEngine
from potluck.engine.nats.host_keys import Place, open_premises
from potluck.engine.nats.identity import load_invite
from potluck.engine.nats.jetstream import make_streams, mend_streams
from potluck.engine.nats.post import Post
from potluck.engine.nats.presence import Members
from potluck.engine.nats.run_status import Presence
from potluck.engine.nats.server import Server
from potluck.engine.nats.site import Site
from potluck.engine.nats.subjects import COORDINATOR, Names
from potluck.recipe.engine import Nats
from potluck.updates.framing import fields_of

TENSORS = 16
STORAGE = 16 << 30


def work(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    processes.roles = {"nats-server": "server", " coordinate ": "coordinator", " participate ": "participant"}
    people = [f"p{number}" for number in range(options.pullers or 1)]
    settings = {
        "folder": str(options.folder), "port": free_port(), "people": people, "pings": options.pings,
        "transfers": options.transfers, "megabytes": options.megabytes, "pullers": options.pullers,
    }  # fmt: skip
    processes.start("coordinator", _role("coordinate", settings))
    for name in people:
        invite = options.folder / "host" / "invites" / f"{name}.toml"
        processes.until(lambda invite=invite: (options.folder / "ready").exists() and invite.exists())
        processes.start(name, _role("participate", {**settings, "name": name}))
    report.take(processes.until(lambda: read_json(options.folder / "result.json")))


def _role(name: str, settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks._wire_ours", name, json.dumps(settings)]


def coordinate(settings: dict[str, Any]) -> None:
    """Server and engine: pings, then the payload there and back, or one state for all."""
    folder, people = Path(settings["folder"]), settings["people"]
    premises = open_premises(folder / "host", "wire", people, Place(port=settings["port"]), {})
    server = Server(premises.server_settings(STORAGE), lambda _: None)
    server.start()
    connection = Connection(premises.access())
    connection.open(20)
    store = (connection, premises.names, people, STORAGE)
    make_streams(*store)
    claim = Claim(connection, premises.names, COORDINATOR, "", 60.0)
    claim.make(lambda: False, print)
    presence, mend = Presence(connection, premises.names, claim), partial(mend_streams, *store)
    blobs = JetStreamBlobs(connection, premises.names)
    codec = _codec(settings)
    post = Post(connection, premises.names, premises.seed, premises.keys, blobs, codec, folder / "incoming")
    members = Members(connection, premises.names, people, 60.0)
    engine = NatsEngine(post, members, Nats(), 1 << 40, partial(print, "refused", flush=True), presence, mend)
    (folder / "ready").touch()
    while any(members.presence(name) != "ready" for name in people):
        time.sleep(0.05)
    found = {"ping_ms": [1e3 * _there_and_back(engine, people[:1], n, {}) for n in range(settings["pings"] + 1)][1:]}
    times, state = [], _state(settings)
    for number in range(settings["transfers"]):
        next(iter(state.values()))[0] = number  # another state, another blob
        times.append(_there_and_back(engine, people, 1000 + number, state))
    down = [json.loads(path.read_text())["down"] for path in sorted(folder.glob("p0-*.json"))]
    found |= {"transfer_seconds": times}
    if not settings["pullers"]:
        found |= {"down_seconds": down, "up_seconds": [a - b for a, b in zip(times, down, strict=True)]}
    engine.end("done", 10)
    write_json(folder / "result.json", found)
    time.sleep(2)
    server.stop()


def _there_and_back(engine: NatsEngine, people: list[str], revision: int, tensors: dict[str, Any]) -> float:
    """Seconds from the task to the last reply."""
    began = time.perf_counter()
    kind = "echo" if len(people) == 1 else "pull"
    task = Task(kind=kind, revision=revision, tensors=tensors, state=str(revision), parameters={"at": time.time()})
    sent = [engine.send(name, task) for name in people]
    for _ in sent:
        reply = engine.receive(300)
        assert reply is not None and reply.status == "ok", reply
    return time.perf_counter() - began


def _state(settings: dict[str, Any]) -> dict[str, Any]:
    """Random fp32 tensors; for pullers, whose processes do without torch, as many bytes."""
    if settings["pullers"]:
        return {"bytes": bytearray(os.urandom(1 << 20)) * (settings["megabytes"] * 1_000_000 >> 20)}
    import torch

    size, generator = settings["megabytes"] * 1_000_000 // 4 // TENSORS, torch.Generator().manual_seed(0)
    return {f"w{i}": torch.rand(size, generator=generator) for i in range(TENSORS)}


def _codec(settings: dict[str, Any]) -> Any:
    if settings["pullers"]:
        return PlainCodec()
    from potluck.updates import codec

    return codec


class PlainCodec:
    """Messages whose one tensor is bytes: the engine itself needs no torch."""

    def pack(self, message: Task | Contribution, like: Packed | None = None) -> Packed:
        task = isinstance(message, Task)
        header = message.parameters if task else message.header
        fields = fields_of("task" if task else "contribution", message.kind, message.revision, header)
        if not message.tensors:
            return Packed(fields=fields)
        if like is not None:
            return Packed(fields={**fields, "payload": like.fields["payload"]}, parts=like.parts)
        (content,) = map(memoryview, message.tensors.values())
        named = {"bytes": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
        return Packed(fields={**fields, "payload": named}, parts=[content])

    def unpack(self, fields: Any, payload: bytes | Path | None) -> Task | Contribution:
        kind, revision, tensors = fields["kind"], fields["revision"], {} if payload is None else {"bytes": payload}
        if fields["message"] == "task":
            return Task(kind=kind, revision=revision, parameters=fields["header"], tensors=tensors)
        return Contribution(kind=kind, revision=revision, header=fields["header"], tensors=tensors)


def participate(settings: dict[str, Any]) -> None:
    """A site that sends back what it gets; a puller only says that it has it."""
    codec = _codec(settings)
    folder, name = Path(settings["folder"]), settings["name"]
    invite = load_invite(folder / "host" / "invites" / f"{name}.toml")
    names = Names(invite.run)
    connection = Connection(access_of(invite))
    connection.open(20)
    blobs, keys = JetStreamBlobs(connection, names), {COORDINATOR: invite.coordinator}
    post = Post(connection, names, invite.seed, keys, blobs, codec, folder / f"at-{name}")
    site = Site(post, name, Nats(), lambda _: None)
    site.say(status="ready")
    while True:
        received = site.next(5.0)
        if received is None:
            continue
        if received.ends:
            received.delivery.done()
            return
        with received.delivery.kept():
            task = site.task(received, lambda: False)
            if task.tensors:
                down = {"down": time.time() - float(task.parameters["at"])}
                write_json(folder / f"{name}-{task.revision}.json", down)
            tensors = task.tensors if task.kind == "echo" else {}
            back = Contribution(kind=task.kind, revision=task.revision, header={}, tensors=tensors)
            site.answer(received.name, back, "", lambda: False)
            received.delivery.done()


if __name__ == "__main__":
    if sys.argv[1] in ("coordinate", "participate"):
        {"coordinate": coordinate, "participate": participate}[sys.argv[1]](json.loads(sys.argv[2]))
    else:
        measure("potluck", "potluck", work)
