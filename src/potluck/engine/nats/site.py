"""A participant's end: the next task, the answer to it, and signs of life."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from potluck.contribution import Contribution, Packed, Task
from potluck.engine.nats.claim import Claim
from potluck.engine.nats.connection import Delivery
from potluck.engine.nats.frames import END, Frame, TaskFacts, facts_of, payload_of, read_frame, signed
from potluck.engine.nats.post import Post
from potluck.engine.nats.refusals import Refusals, refusal
from potluck.engine.nats.subjects import COORDINATOR, token
from potluck.errors import AlreadyServed, Damaged, EngineError, PotluckError
from potluck.files import without_folders
from potluck.recipe.engine import Nats
from potluck.untrusted import in_a_line

SIGN_SECONDS = 5.0  # that a sign of life may take ...
AWAY_SECONDS = 1.0  # ... and a goodbye, if the server is known to be away
Leaving = Callable[[str, Contribution | None, int, str], None]


@dataclass(frozen=True)
class Received:
    """A task as it came.

    Attributes:
        facts: What its frame says; of the message kind, revision and arguments, before its payload is fetched.
    """

    delivery: Delivery
    frame: Frame
    facts: TaskFacts

    @property
    def name(self) -> str:
        """The name under which it counts once."""
        return self.facts.task

    @property
    def fields(self) -> Mapping[str, Any]:
        """What it says beside its tensors."""
        return self.facts.message

    @property
    def seconds(self) -> float | None:
        """How long an answer is waited for; ``None`` is for ever."""
        return self.facts.seconds

    @property
    def payload_bytes(self) -> int:
        """Size of its tensors as sent."""
        named = payload_of(self.frame.facts)
        return 0 if named is None else named[1]

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
        self._refusals = Refusals(lambda who, why, count: told(f"refused ({count}): {why}"))
        self._claim = Claim(post.connection, post.names, name, session, settings.silence)
        self._claim.make(stop, told)
        self._over = threading.Event()
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="potluck-heartbeat", daemon=True).start()

    def say(self, **facts: Any) -> None:
        """Change what the signs of life say, and send one; where something lies on this machine is not said."""
        told = {key: without_folders(value) if key == "reason" else value for key, value in facts.items()}
        self._said = {**self._said, **told}
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
            facts = facts_of(TaskFacts, frame)
            if facts.run != names.run or facts.to != self.name:
                raise EngineError("a task of another run, or for somebody else")
        except Exception as error:  # whatever a message does to its reader, it ends here
            self._refusals.add(COORDINATOR, refusal(error))
            delivery.done()
            return None
        return Received(delivery, frame, facts)

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
            try:
                self.post.blobs.get(None, digest, size, path, give_up, lambda: self.say(lacks=digest))
            finally:
                self._said = {key: value for key, value in self._said.items() if key != "lacks"}
        return path

    def task(self, received: Received, give_up: Callable[[], bool]) -> Task:
        """The task itself, with its tensors.

        Raises:
            EngineError: They did not come before ``give_up``.
            TrainingError: It is not a task.
        """
        message = self.post.codec.unpack(received.fields, self.fetch(received, give_up))
        if not isinstance(message, Task):
            raise Damaged("a contribution where a task should be")
        return replace(message, state=received.facts.state, seconds=received.seconds)

    def answer(
        self,
        name: str,
        contribution: Contribution | None,
        reason: str,
        give_up: Callable[[], bool],
        status: Literal["failed", "defect"] = "failed",
    ) -> None:
        """Send the answer to a task: a contribution, or why there is none.

        Args:
            status: Of an answer without a contribution.

        Raises:
            StorageError: The server's store stayed full.
            EngineError: The server did not come back before ``give_up``.
            PolicyError: It may not leave.
        """
        post = self.post
        facts: dict[str, Any] = {"run": post.names.run, "task": name, "from": self.name}
        if contribution is None:
            frame = signed(post.seed, {**facts, "status": status, "reason": in_a_line(without_folders(reason))})
            self._leaving(name, None, len(frame), hashlib.sha256(frame).hexdigest())
        else:
            packed: Packed = post.codec.pack(contribution)
            payload = packed.fields.get("payload")
            inline = packed.size <= self._settings.inline_bytes
            facts |= {"status": "ok", "message": packed.fields}
            frame = signed(post.seed, facts, b"".join(packed.parts) if inline else b"")
            digest = payload["sha256"] if payload else hashlib.sha256(frame).hexdigest()
            self._leaving(name, contribution, len(frame) + (0 if inline else packed.size), digest)
        post.connection.store(post.names.reply(self.name), frame, patience=600.0, give_up=give_up)
        if contribution is not None and payload and not inline:  # the coordinator fetches it as it comes
            post.blobs.put(self.name, payload["sha256"], packed.parts, give_up)

    def leave(self) -> None:
        """Say goodbye, then no more; a server that is away is not waited for.

        Raises:
            AlreadyServed: Another process has taken over.
            EngineError: The server is away.
        """
        self._said = {**self._said, "status": "left", "task": ""}
        self.close()
        self._claim.renew(self._said, AWAY_SECONDS if self.post.connection.away else SIGN_SECONDS)

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
        self._claim.renew(self._said, SIGN_SECONDS)
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
