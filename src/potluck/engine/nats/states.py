"""Shared states at the server: stored once for all tasks that bring one, and dropped when none does."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

from potluck.contribution import Packed, ParticipantId, TaskId
from potluck.engine.nats.background import Background
from potluck.engine.nats.blobs import Blobs
from potluck.engine.nats.refusals import SERVER
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import PotluckError

AGAIN_SECONDS = 30.0


class States:
    """Which states tasks under way need.

    Args:
        background: Where blobs are stored and dropped.
        over: Whether the engine is closed.
        said: Told what stands in the way of a state: it ends the exchange.
        refused: Told what the server did not do, which ends nothing.
    """

    def __init__(
        self,
        blobs: Blobs,
        background: Background,
        over: Callable[[], bool],
        said: Callable[[PotluckError], None],
        refused: Callable[[ParticipantId, str], None],
    ) -> None:
        self._blobs, self._background, self._over, self._said, self._refused = blobs, background, over, said, refused
        self._lock = threading.Lock()
        self._tasks: dict[str, set[TaskId]] = {}  # what needs each state
        self._stored: set[str] = set()  # states that are there, or on their way
        self._packed: dict[str, Packed] = {}  # of states that are needed
        self._brought: dict[str, float] = {}  # when each was brought again
        self._leftover = blobs.held(None)

    def need(self, digest: str, packed: Packed, task: TaskId) -> bool:
        """Note that a task needs a state, and forget those that none does; whether it must be stored now."""
        with self._lock:
            new = digest not in self._stored
            self._stored.add(digest)
            self._packed[digest] = packed
            self._tasks.setdefault(digest, set()).add(task)
            idle = [other for other, tasks in self._tasks.items() if not tasks]
        if not new:
            return False
        for other in idle:
            self._background.submit(self._drop, other)
            self._tasks.pop(other, None)
            self._packed.pop(other, None)
            self._stored.discard(other)
        if len(self._tasks) > 1:  # what an earlier session left may be needed until its tasks are asked again
            for other in self._leftover - self._tasks.keys():
                self._background.submit(self._drop, other)
            self._leftover = set()
        return True

    def store(self, digest: str) -> None:
        """Store a state behind one's back, as long as a task needs it."""
        self._background.submit(self._store, digest, self._packed[digest])

    def bring_again(self, digest: str) -> None:
        """Store a state once more that a participant waits for in vain: the server has lost of it."""
        packed, now = self._packed.get(digest), time.monotonic()
        if (
            packed is None
            or not self._tasks.get(digest)
            or now - self._brought.get(digest, -AGAIN_SECONDS) < AGAIN_SECONDS
        ):
            return
        self._brought[digest] = now
        self._refused(SERVER, f"lost: a state that is still needed, {digest[:12]}; it is brought again")
        self._background.submit(self._store, digest, packed)

    def release(self, digest: str | None, task: TaskId) -> None:
        """Note that a task needs its state no more."""
        if digest is not None and digest in self._tasks:
            self._tasks[digest].discard(task)

    def _store(self, digest: str, packed: Packed) -> None:
        if digest in self._brought and digest_of(packed) != digest:
            return  # its tensors have gone on; who needs it is late, and is given up
        try:
            self._blobs.put(None, digest, packed.parts, lambda: self._over() or not self._tasks.get(digest))
        except PotluckError as error:
            self._stored.discard(digest)
            if self._tasks.get(digest):
                self._said(error)

    def _drop(self, digest: str) -> None:
        try:
            self._blobs.drop(None, digest)
        except PotluckError as error:
            self._refused(COORDINATOR, f"a blob could not be dropped: {error}")


def digest_of(packed: Packed) -> str:
    """SHA-256 of a payload as its tensors are by now."""
    digest = hashlib.sha256()
    for part in packed.parts:
        digest.update(part)
    return digest.hexdigest()
