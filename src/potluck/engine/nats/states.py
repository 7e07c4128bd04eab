"""Shared states at the server: stored once for all tasks that bring one, and dropped when none does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from potluck.contribution import Packed, ParticipantId, TaskId
from potluck.engine.nats.blobs import Blobs
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import PotluckError


class States:
    """Which states tasks under way need.

    Args:
        helpers: Where blobs are stored and dropped.
        over: Whether the engine is closed.
        said: Told what stands in the way of a state: it ends the exchange.
        refused: Told what the server did not do, which ends nothing.
    """

    def __init__(
        self,
        blobs: Blobs,
        helpers: Executor,
        over: Callable[[], bool],
        said: Callable[[PotluckError], None],
        refused: Callable[[ParticipantId, str], None],
    ) -> None:
        self._blobs, self._helpers, self._over, self._said, self._refused = blobs, helpers, over, said, refused
        self._lock = threading.Lock()
        self._tasks: dict[str, set[TaskId]] = {}  # what needs each state
        self._stored: set[str] = set()  # states that are there, or on their way
        self._leftover = blobs.held(None)

    def need(self, digest: str, task: TaskId) -> bool:
        """Note that a task needs a state, and forget those that none does; whether it must be stored now."""
        with self._lock:
            new = digest not in self._stored
            self._stored.add(digest)
            self._tasks.setdefault(digest, set()).add(task)
            idle = [other for other, tasks in self._tasks.items() if not tasks]
        if not new:
            return False
        for other in idle:
            self._helpers.submit(self._drop, other)
            self._tasks.pop(other, None)
            self._stored.discard(other)
        if len(self._tasks) > 1:  # what an earlier session left may be needed until its tasks are asked again
            for other in self._leftover - self._tasks.keys():
                self._helpers.submit(self._drop, other)
            self._leftover = set()
        return True

    def store(self, digest: str, packed: Packed) -> None:
        """Store a state behind one's back, as long as a task needs it."""
        self._helpers.submit(self._store, digest, packed)

    def release(self, digest: str | None, task: TaskId) -> None:
        """Note that a task needs its state no more."""
        if digest is not None and digest in self._tasks:
            self._tasks[digest].discard(task)

    def _store(self, digest: str, packed: Packed) -> None:
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
