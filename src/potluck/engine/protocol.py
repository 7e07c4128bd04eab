"""What the rounds ask of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from potluck.contribution import Fields, ParticipantId, ParticipantInfo, Reply, Shelf, Task, TaskId

if TYPE_CHECKING:
    from torch import Tensor

Tasks = Mapping[TaskId, tuple[ParticipantId, Task]]


class Engine(Protocol):
    """Runs participants and moves tasks and contributions; the rounds are written once, against this.

    Attributes:
        remote: Participants are elsewhere: a task must name the state that it starts from.
    """

    remote: bool

    def roster(self) -> Mapping[ParticipantId, ParticipantInfo]:
        """Who takes part, in the order in which contributions are summed."""

    def send(self, to: ParticipantId, task: Task) -> TaskId:
        """Give a participant a task."""

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply in order of engine time; ``None`` after ``timeout`` seconds or if nothing is under way."""

    def cancel(self, task: TaskId) -> None:
        """Forget a task: no reply to it will come."""

    def now(self) -> float:
        """Engine time in seconds."""

    def saved(self, shelf: Shelf) -> Fields:
        """What a checkpoint must hold of the clock and of tasks under way, as JSON; tensors go on the shelf."""

    def restore(self, facts: Fields, shelf: Mapping[str, Tensor], tasks: Tasks) -> None:
        """Go on where ``saved`` left off.

        Args:
            tasks: Those that were under way and are not given up, under the numbers that they had.
        """
