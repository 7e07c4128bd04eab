"""A participant's end: the next task, the answer to it, and signs of life."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potluck.contribution import Contribution, Packed, Task
from potluck.engine.nats.claim import Claim
from potluck.engine.nats.connection import Delivery
from potluck.engine.nats.coordinator import END, Post
from potluck.engine.nats.frames import Frame, read_frame, signed
from potluck.engine.nats.subjects import COORDINATOR, token
from potluck.errors import AlreadyServed, EngineError, PotluckError
from potluck.files import without_folders
from potluck.recipe.engine import Nats

MAX_VOCABULARY_BYTES = 1 << 27
Leaving = Callable[[str, Contribution | None, int, str], None]


@dataclass(frozen=True)
class Received:
    """A task as it came.

    Attributes:
        name: The name under which it counts once.
        fields: Of its message, before its payload is fetched: kind, revision, parameters.
        seconds: How long an answer is waited for; ``None`` is for ever.
        payload_bytes: What must be fetched, or came along.
    """

    delivery: Delivery
    frame: Frame
    name: str

    @property
    def fields(self) -> Mapping[str, Any]:
        """What it says beside its tensors."""
        return self.frame.facts["message"]  # type: ignore[no-any-return]

    @property
    def seconds(self) -> float | None:
        """How long an answer is waited for."""
        return self.frame.facts.get("seconds")

    @property
    def payload_bytes(self) -> int:
        """Size of its tensors as sent."""
        named = self.fields.get("payload")
        return int(named["bytes"]) if named else 0

    @property
    def ends(self) -> bool:
        """Whether it says that the run is over."""
        return self.name == END


class Site:
    """One participant at the server.

    Args:
        post: Connection, one's own key, the coordinator's.
        name: Whose site it is.
        settings: The recipe's engine table.
        told: Told what a person should know, in words for a log.
        session: Of the folder with the participant's state, see `potluck.engine.nats.claim`.
        stop: Whether to wait no longer for another process to be gone.
        leaving: Told of each answer before its first byte goes: task, contribution, bytes, and SHA-256 of the tensors
            or, without any, of the message. What it raises keeps the answer here.

    Raises:
        AlreadyServed: Another process serves under this name.
    """

    def __init__(
        self,
        post: Post,
        name: str,
        settings: Nats,
        told: Callable[[str], None],
        session: str = "",
        stop: Callable[[], bool] = lambda: False,
        leaving: Leaving = lambda task, contribution, size, digest: None,
    ) -> None:
        self._leaving = leaving
        self.post, self.name, self._settings, self._told = post, name, settings, told
        self._said: dict[str, Any] = {}
        self._claim = Claim(post.connection, post.names, name, session, settings.silence)
        self._claim.make(stop, told)
        self._over = threading.Event()
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="potluck-heartbeat", daemon=True).start()

    def say(self, **facts: Any) -> None:
        """Change what the signs of life say, and send one; where something lies on this machine is not said."""
        self._said |= {key: without_folders(value) if key == "reason" else value for key, value in facts.items()}
        self._changed.set()

    def next(self, wait: float) -> Received | None:
        """The next task, if one comes within ``wait`` seconds.

        Raises:
            AlreadyServed: Another process has taken over.
        """
        if self._claim.lost or self._claim.stale:
            try:
                self.sign_of_life()
            except AlreadyServed:
                raise
            except EngineError:
                return None  # the server is away
        names = self.post.names
        delivery = self.post.connection.take(names.next(names.tasks, token(self.name)), wait)
        if delivery is None:
            return None
        try:
            frame = read_frame(delivery.data, self.post.keys[COORDINATOR])
            facts = frame.facts
            if facts.get("run") != names.run or facts.get("to") != self.name or not isinstance(facts.get("task"), str):
                raise EngineError("a task of another run, or for somebody else")
        except EngineError as error:
            self._told(f"refused: {error}")
            delivery.done()
            return None
        return Received(delivery, frame, facts["task"])

    def fetch(self, received: Received, give_up: Callable[[], bool]) -> bytes | Path | None:
        """A task's tensors: what came along, or a file of what was fetched, if it is not there yet.

        Raises:
            EngineError: They did not come before ``give_up``.
        """
        if received.frame.blob is None:
            return received.frame.payload
        digest, size = received.frame.blob
        path = self.post.folder / f"{digest}.safetensors"
        if not path.exists():
            for old in self.post.folder.glob("*.safetensors*"):
                if not old.name.startswith(digest):
                    old.unlink(missing_ok=True)  # what is mapped stays until it is let go
            self.post.blobs.get(None, digest, size, path, give_up)
        return path

    def task(self, received: Received, give_up: Callable[[], bool]) -> Task:
        """The task itself, with its tensors.

        Raises:
            EngineError: They did not come before ``give_up``.
            TrainingError: It is not a task.
        """
        message = self.post.codec.unpack(received.fields, self.fetch(received, give_up))
        if not isinstance(message, Task):
            raise EngineError("a contribution where a task should be")
        return replace(message, state=str(received.frame.facts.get("state", "")), seconds=received.seconds)

    def answer(self, name: str, contribution: Contribution | None, reason: str, give_up: Callable[[], bool]) -> None:
        """Send the answer to a task: a contribution, or why there is none.

        Raises:
            StorageError: The server's store stayed full.
            EngineError: The server did not come back before ``give_up``.
            PolicyError: It may not leave.
        """
        post = self.post
        facts: dict[str, Any] = {"run": post.names.run, "task": name, "from": self.name}
        if contribution is None:
            frame = signed(post.seed, {**facts, "status": "failed", "reason": without_folders(reason)})
            self._leaving(name, None, len(frame), hashlib.sha256(frame).hexdigest())
        else:
            packed: Packed = post.codec.pack(contribution)
            payload = packed.fields.get("payload")
            inline = packed.size <= self._settings.inline_bytes
            facts |= {"status": "ok", "message": packed.fields}
            frame = signed(post.seed, facts, b"".join(packed.parts) if inline else b"")
            digest = payload["sha256"] if payload else hashlib.sha256(frame).hexdigest()
            self._leaving(name, contribution, len(frame) + (0 if inline else packed.size), digest)
        post.connection.store(post.names.reply(self.name), frame, patience=600.0)
        if contribution is not None and payload and not inline:  # the coordinator fetches it as it comes
            post.blobs.put(self.name, payload["sha256"], packed.parts, give_up)

    def close(self) -> None:
        """Say no more."""
        self._over.set()
        self._changed.set()

    def sign_of_life(self) -> None:
        """Send one now.

        Raises:
            AlreadyServed: Another process has taken over.
            EngineError: The server is away.
        """
        refused = self._claim.refused
        self._claim.renew(self._said, patience=5.0)
        if self._claim.refused > refused:
            self._told(f"another process tried to take part as {self.name}, and was refused: who else has its invite?")

    def _beat(self) -> None:
        while not self._over.is_set():
            self._changed.wait(self._settings.heartbeat)
            self._changed.clear()
            if self._over.is_set() or "status" not in self._said:
                continue
            try:
                self.sign_of_life()
            except PotluckError:
                continue  # the connection says itself that the server is away


def read_about(post: Post, give_up: Callable[[], bool]) -> tuple[Mapping[str, Any], bytes | None] | None:
    """What the run is about, signed by the coordinator, and the vocabulary; ``None`` if that is not there yet.

    Raises:
        EngineError: The server is away, or it is not what the coordinator signed.
    """
    found = post.connection.last(post.names.direct(post.names.states, post.names.about))
    if found is None:
        return None
    frame = read_frame(found[0], post.keys[COORDINATOR])
    if frame.facts.get("run") != post.names.run:
        raise EngineError("the server tells of another run")
    if frame.blob is None:
        return frame.facts, frame.payload
    digest, size = frame.blob
    if size > MAX_VOCABULARY_BYTES:
        raise EngineError(f"a vocabulary of {size} bytes")
    path = post.folder / f"about-{digest}"
    post.blobs.get(None, digest, size, path, give_up)
    return frame.facts, path.read_bytes()
