"""Tasks under way, what has been answered, and answers that came before they were asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from potluck.contribution import ParticipantId, TaskId
from potluck.engine.nats.frames import Frame

Key = tuple[ParticipantId, str]


@dataclass
class Sent:
    """A task under way.

    Attributes:
        name: Under which it counts once.
        at, ends: When it was sent, and until when it is waited for, by the engine's clock.
        blob: The state that it brings, if that is a blob.
        frame: As it lies in the queue.
        asked: When it was put there last, by the monotonic clock.
        place: Where it lies in the stream.
    """

    id: TaskId
    to: ParticipantId
    name: str
    at: float
    ends: float
    down_bytes: int
    blob: str | None
    frame: bytes
    asked: float
    place: int | None = None


class UnderWay:
    """All of them, for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[Key, Sent] = {}
        self._early: dict[ParticipantId, tuple[str, Frame]] = {}
        self._answered: set[Key] = set()

    def add(self, sent: Sent) -> tuple[Frame | None, bool]:
        """Note a task; its answer if that has come already, else whether nothing is awaited of its participant."""
        with self._lock:
            name, early = self._early.pop(sent.to, ("", None))
            alone = all(to != sent.to for to, _ in self._sent)
            self._sent[sent.to, sent.name] = sent
            self._answered.discard((sent.to, sent.name))
        return (early, False) if name == sent.name else (None, alone)

    def take(self, name: ParticipantId, task: str, frame: Frame) -> tuple[Sent | None, bool]:
        """The task that a frame answers, unless its answer has come, and whether the frame is a replay.

        A participant that was interrupted sends its answer again: as long as a blob of the first is fetched that is no
        replay. After a restart an answer may come before it is asked for; it is held until then.
        """
        with self._lock:
            sent, again = self._sent.get((name, task)), (name, task) in self._answered
            if sent is None and not again:
                self._early[name] = (task, frame)
        return (None if again else sent), again and sent is None

    def answered(self, sent: Sent) -> None:
        """Note that the answer has come, or that none is wanted any more."""
        with self._lock:
            self._answered.add((sent.to, sent.name))

    def end(self, sent: Sent) -> bool:
        """Forget a task; whether it was awaited until now."""
        with self._lock:
            return self._sent.pop((sent.to, sent.name), None) is not None

    def numbered(self, number: TaskId) -> Sent | None:
        """A task by its number."""
        with self._lock:
            return next((sent for sent in self._sent.values() if sent.id == number), None)

    def awaited(self, sent: Sent) -> bool:
        """Whether a task is still under way."""
        return (sent.to, sent.name) in self._sent

    def those(self, wanted: Callable[[Sent], bool], unanswered: bool = False) -> list[Sent]:
        """Tasks under way that are ``wanted``; with ``unanswered`` only those of which no answer has come."""
        with self._lock:
            found = [sent for key, sent in self._sent.items() if not (unanswered and key in self._answered)]
        return [sent for sent in found if wanted(sent)]
