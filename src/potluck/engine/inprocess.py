"""All participants in this process, one after the other, on the wall clock or on a simulated one."""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from potluck.contribution import (
    Contribution,
    Fields,
    ParticipantId,
    ParticipantInfo,
    Reply,
    Shelf,
    Task,
    TaskId,
    kept,
    reply_facts,
    reply_of,
)
from potluck.engine.protocol import Tasks
from potluck.errors import PotluckError
from potluck.recipe.sources import Profile

if TYPE_CHECKING:
    from torch import Tensor

Perform = Callable[[ParticipantId, Task], Contribution]
WireBytes = Callable[[Task | Contribution], int]


@dataclass(order=True)
class _Pending:
    """A task under way: due to be performed, or, once there is a reply, to arrive.

    On the virtual clock its participant works on it from ``begins`` to ``until``.
    """

    due: float
    task_id: TaskId
    to: ParticipantId = field(compare=False)
    task: Task = field(compare=False)
    sent: float = field(compare=False)
    down_bytes: int = field(compare=False)
    reply: Reply | None = field(compare=False, default=None)
    arrives: float = field(compare=False, default=0.0)
    begins: float = field(compare=False, default=0.0)
    until: float = field(compare=False, default=0.0)


_PENDING = (
    "due",
    "sent",
    "down_bytes",
    "arrives",
    "begins",
    "until",
)  # what is saved of one beside its task and its reply


class InProcess:
    """The embedded engine.

    Without profiles a task is performed when its reply is received, in the order of sending, and time is the wall
    clock's. With a profile for each participant time is virtual: a task travels down at the participant's bandwidth,
    is worked on at its speed (one task at a time), and travels up; replies come in the order of their arrival, the
    same in every run.

    Args:
        roster: Who takes part, in the order in which contributions are summed.
        perform: The participants' side. A `PotluckError` from it becomes a failed reply.
        wire_bytes: Size of a message as serialised. Messages themselves are handed over, not copied.
        profiles: A simulated device for each participant, or none.
        seed: Of the draws of availability.

    Attributes:
        attempts: How often rounds from a revision have failed: who is there is drawn anew each time.
    """

    remote = False

    def __init__(
        self,
        roster: Sequence[ParticipantInfo],
        perform: Perform,
        wire_bytes: WireBytes,
        profiles: Mapping[ParticipantId, Profile] | None = None,
        seed: int = 0,
    ) -> None:
        self._roster = {info.name: info for info in roster}
        self._perform = perform
        self._wire_bytes = wire_bytes
        self._profiles = profiles
        self._seed = seed
        self._queue: list[_Pending] = []
        self._sent = 0
        self._busy_until: dict[ParticipantId, float] = {}
        self._virtual_now = 0.0
        self.attempts: dict[int, int] = {}
        self._began = time.monotonic()

    @property
    def simulated(self) -> bool:
        """Whether time is virtual, and participants may be away."""
        return bool(self._profiles)

    def roster(self) -> Mapping[ParticipantId, ParticipantInfo]:
        """Who takes part, in the order in which contributions are summed."""
        return self._roster

    def now(self) -> float:
        """Seconds since the engine began, on its clock."""
        return self._virtual_now if self._profiles else time.monotonic() - self._began

    def send(self, to: ParticipantId, task: Task) -> TaskId:
        """Give a participant a task."""
        self._sent += 1
        if self._profiles and not self._available(to, task):
            refusal = Reply(task=self._sent, participant=to, status="failed", reason="not available")
            due = self._virtual_now + 2 * _transfer(0, 1.0, self._profiles[to].latency)
            heapq.heappush(self._queue, _Pending(due, self._sent, to, task, self._virtual_now, 0, refusal))
            return self._sent
        down_bytes = self._wire_bytes(task)
        pending = _Pending(0.0, self._sent, to, task, self.now(), down_bytes)
        if self._profiles:
            profile = self._profiles[to]
            pending.arrives = self._virtual_now + _transfer(down_bytes, profile.downlink, profile.latency)
            self._schedule(pending)
        heapq.heappush(self._queue, pending)
        return self._sent

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply; ``None`` if no task is under way, or if on the virtual clock none arrives in time."""
        until = None if timeout is None else self._virtual_now + timeout
        while self._queue:
            if self._profiles and until is not None and self._queue[0].due > until:
                self._virtual_now = until
                return None
            pending = heapq.heappop(self._queue)
            self._virtual_now = max(self._virtual_now, pending.due)
            if pending.reply is not None:
                return replace(pending.reply, seconds=self.now() - pending.sent)
            began = self.now()
            reply = self._reply(pending)
            if not self._profiles:
                return replace(reply, seconds=self.now() - began)
            heapq.heappush(self._queue, replace(pending, due=self._arrival(reply), reply=kept(reply)))
        return None

    def cancel(self, task: TaskId) -> None:
        """Forget a task: no reply to it will come. One that was begun on the virtual clock takes its time."""
        gone = next((pending for pending in self._queue if pending.task_id == task), None)
        if gone is None:
            return
        self._queue.remove(gone)
        if self._profiles and gone.reply is None and gone.begins > self._virtual_now:
            self._busy_until[gone.to] = gone.begins
            for pending in sorted(self._queue, key=lambda pending: pending.task_id):
                if pending.to == gone.to and pending.task_id > task and pending.reply is None:
                    self._schedule(pending)
        heapq.heapify(self._queue)

    def saved(self, shelf: Shelf) -> Fields:
        """The virtual clock and the tasks under way on it; on the wall clock nothing is, between rounds."""
        queue = [
            {
                "id": pending.task_id,
                **{key: getattr(pending, key) for key in _PENDING},
                "reply": pending.reply and reply_facts(pending.reply, shelf),
            }
            for pending in sorted(self._queue)
        ]
        return {"now": self._virtual_now, "sent": self._sent, "busy_until": dict(self._busy_until), "queue": queue}

    def restore(self, facts: Fields, shelf: Mapping[str, Tensor], tasks: Tasks) -> None:
        """Set the virtual clock, and go on with the tasks that were under way."""
        self._virtual_now, self._sent = float(facts["now"]), int(facts["sent"])
        self._busy_until = {name: float(until) for name, until in facts["busy_until"].items()}
        self._queue = [
            _Pending(
                task_id=entry["id"],
                to=tasks[entry["id"]][0],
                task=tasks[entry["id"]][1],
                **{key: entry[key] for key in _PENDING},
                reply=None if entry["reply"] is None else reply_of(entry["reply"], shelf),
            )
            for entry in facts["queue"]
        ]
        heapq.heapify(self._queue)

    def _reply(self, pending: _Pending) -> Reply:
        failed = Reply(task=pending.task_id, participant=pending.to, status="failed", down_bytes=pending.down_bytes)
        try:
            contribution = self._perform(pending.to, pending.task)
            up_bytes = self._wire_bytes(contribution)
        except PotluckError as error:
            return replace(failed, reason=str(error))
        return replace(failed, status="ok", contribution=contribution, up_bytes=up_bytes)

    def _schedule(self, pending: _Pending) -> None:
        """One task at a time; what a task lets overlap with its reply's journey keeps the participant busy."""
        assert self._profiles is not None
        speed, asked = self._profiles[pending.to].steps_per_second, pending.task.parameters
        pending.begins = max(pending.arrives, self._busy_until.get(pending.to, 0.0))
        pending.due = pending.begins + float(asked.get("steps", 0)) / speed
        pending.until = pending.due + float(asked.get("overlap", 0)) / speed
        self._busy_until[pending.to] = pending.until

    def _arrival(self, reply: Reply) -> float:
        assert self._profiles is not None
        profile = self._profiles[reply.participant]
        return self._virtual_now + _transfer(reply.up_bytes, profile.uplink, profile.latency)

    def _available(self, to: ParticipantId, task: Task) -> bool:
        """Drawn from seed, participant, revision and attempt, so that a resumed run draws the same."""
        assert self._profiles is not None
        key = f"{self._seed}/{to}/{task.kind}/{task.revision}"
        if attempt := self.attempts.get(task.revision, 0):
            key += f"/{attempt}"
        draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        return draw < self._profiles[to].availability


def _transfer(size: int, megabits_per_second: float, latency_milliseconds: float) -> float:
    return latency_milliseconds / 1e3 + size * 8 / (megabits_per_second * 1e6)
