"""A message server, a coordinator's engine and participants' sites, in one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from potluck.contribution import Contribution, Task
from potluck.engine.nats.blobs import JetStreamBlobs
from potluck.engine.nats.claim import Claim
from potluck.engine.nats.connection import Access, Connection
from potluck.engine.nats.coordinator import NatsEngine
from potluck.engine.nats.identity import make_certificate, new_seed, public_key
from potluck.engine.nats.jetstream import make_streams, mend_streams
from potluck.engine.nats.post import Post
from potluck.engine.nats.presence import Members
from potluck.engine.nats.refusals import Told
from potluck.engine.nats.run_status import Presence
from potluck.engine.nats.server import Server, ServerSettings
from potluck.engine.nats.site import Site
from potluck.engine.nats.subjects import COORDINATOR, Names, permissions_of
from potluck.errors import PotluckError
from potluck.recipe.engine import Nats
from potluck.updates import codec

RUN = "0123456789ab"
Perform = Callable[[str, Task], Contribution]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """Everybody of one run at one server.

    Attributes:
        listens: Whether a coordinator's engine does.
        told: What the engine refused, and whose it was.
    """

    folder: Path
    people: Sequence[str]
    settings: Nats = field(default_factory=lambda: Nats(heartbeat=0.2))
    max_reply_bytes: int = 1 << 24
    storage: int = 1 << 28
    listens: bool = True
    told: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names, self.port = Names(RUN), free_port()
        self.seeds = {role: new_seed() for role in (*self.people, COORDINATOR)}
        self.keys = {role: public_key(seed) for role, seed in self.seeds.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.certificate = make_certificate(self.folder, ["localhost", "127.0.0.1"])
        users = {self.keys[role]: permissions_of(self.names, role, self.people) for role in self.seeds}
        where = {"host": "127.0.0.1", "port": self.port, "folder": self.folder, "secure": True}
        self.server = Server(ServerSettings(**where, users=users, storage=2 * self.storage), lambda _: None)
        self.server.start()
        self.connections: list[Connection] = []
        self.over = threading.Event()
        self.connection = self.connect(COORDINATOR)
        self.store = (self.connection, self.names, self.people, self.storage)
        make_streams(*self.store)
        self.members = Members(self.connection, self.names, self.people, self.settings.silence)
        refused = lambda who, why, count: self.told.append((who, why))  # noqa: E731
        if self.listens:
            self.engine = self.coordinate(self.members, refused)

    def coordinate(self, members: Members, refused: Told) -> NatsEngine:
        """A coordinator's engine, one at a time."""
        claim = Claim(self.connection, self.names, COORDINATOR, "here", self.settings.silence)
        claim.make(lambda: False, lambda _: None)
        presence, mend = Presence(self.connection, self.names, claim), partial(mend_streams, *self.store)
        post = self.post(COORDINATOR)
        return NatsEngine(post, members, self.settings, self.max_reply_bytes, refused, presence, mend)

    def access(self, role: str, seed: str | None = None, inbox: str | None = None) -> Access:
        urls = (f"tls://127.0.0.1:{self.port}",)
        return Access(urls, self.certificate, seed or self.seeds[role], inbox or self.names.inbox(role), role)

    def connect(self, role: str, told: Callable[[str], None] = lambda _: None) -> Connection:
        connection = Connection(self.access(role), told)
        connection.open(20)
        self.connections.append(connection)
        return connection

    def post(self, role: str) -> Post:
        connection = self.connection if role == COORDINATOR else self.connect(role)
        keys: Mapping[str, str] = self.keys if role == COORDINATOR else {COORDINATOR: self.keys[COORDINATOR]}
        blobs = JetStreamBlobs(connection, self.names)
        return Post(connection, self.names, self.seeds[role], keys, blobs, codec, self.folder / f"at-{role}")

    def site(self, name: str) -> Site:
        """A participant's end, that has said it is ready."""
        site = Site(self.post(name), name, self.settings, lambda _: None)
        site.say(status="ready", evaluates=False)
        return site

    def attend(self, name: str, perform: Perform) -> None:
        """A participant that does what it is asked, in a thread."""
        site = self.site(name)

        def work() -> None:
            while not self.over.is_set():
                received = site.next(0.5)
                if received is None or received.ends:
                    continue
                try:
                    task = site.task(received, self.over.is_set)
                    site.answer(received.name, perform(name, task), "", self.over.is_set)
                except PotluckError as error:
                    if not self.over.is_set():
                        site.answer(received.name, None, str(error), self.over.is_set)
                received.delivery.done()
            site.close()

        threading.Thread(target=work, daemon=True).start()

    def wait_for_all(self) -> None:
        until = time.monotonic() + 20
        while any(self.members.presence(name) != "ready" for name in self.people):
            assert time.monotonic() < until
            time.sleep(0.01)

    def close(self) -> None:
        self.over.set()
        if self.listens:
            self.engine.close()
        for connection in self.connections:
            connection.close()
        self.server.stop()
