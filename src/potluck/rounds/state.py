"""What all participants share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from potluck.aggregation.outer import OuterState, init_outer
from potluck.contribution import HeldOutText, ParticipantId, Reply, Task, TaskId
from potluck.recipe import Recipe
from potluck.updates.download import Downloads
from potluck.updates.fragments import Fragment


@dataclass(frozen=True)
class Late:
    """A task that was not answered in its round, and whose answer may count in the next; without its tensors."""

    participant: ParticipantId
    task: Task


@dataclass
class SharedState:
    """The shared parameters, and for each fragment of them an outer optimizer of its own.

    Attributes:
        theta: Flat fp32 parameters, shape ``(N,)``, in the coordinator's memory.
        fragments: Parts of theta that are exchanged in turn: one for all of it, or several (streaming).
        outer: The outer optimizer's vectors, for each fragment.
        downloads: Who holds which revision, and what has yet to be told.
        revision: Outer steps taken.
        total_tokens: Tokens of all contributions so far.
        lost: Participants whose last update did not count: what error feedback keeps of it is void.
        measured: On how much text each participant evaluated.
        outlived: Whether tasks may be performed when the round is over (``rounds.late``): they get copies of ``theta``.
        late: What was asked of those who did not answer in time, if their answers still count.
        arrived: Such answers, for the next round.
        snapshots: ``theta`` by revision, where a task that started from it is under way.
    """

    theta: Tensor
    fragments: tuple[Fragment, ...]
    outer: tuple[OuterState, ...]
    downloads: Downloads
    revision: int = 0
    total_tokens: int = 0
    lost: set[str] = field(default_factory=set)
    measured: dict[str, HeldOutText] = field(default_factory=dict)
    outlived: bool = False
    late: dict[TaskId, Late] = field(default_factory=dict)
    arrived: list[Reply] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    _digest: tuple[int, str] = (-1, "")

    @property
    def digest(self) -> str:
        """SHA-256 of ``theta``: with the revision it names the state."""
        if self._digest[0] != self.revision:
            self._digest = (self.revision, hashlib.sha256(self.theta.numpy().data).hexdigest())
        return self._digest[1]

    @property
    def given(self) -> Tensor:
        """``theta`` as tasks get it: one copy for all tasks of a revision, if they may outlive the round."""
        if not self.outlived:
            return self.theta
        if self.revision not in self.snapshots:
            self.snapshots[self.revision] = self.theta.clone()
        return self.snapshots[self.revision]

    def tidy(self) -> None:
        """Let go of the copies that no task under way started from."""
        wanted = {self.revision, *(late.task.revision for late in self.late.values())}
        self.snapshots = {revision: theta for revision, theta in self.snapshots.items() if revision in wanted}

    def put(self, theta: Tensor) -> None:
        """Make another state the shared one, without an outer step: everybody has to be told all of it."""
        self.theta.copy_(theta)
        self._digest = (-1, "")
        self.snapshots.pop(self.revision, None)
        for name in list(self.downloads.held):
            self.downloads.forget(name)


def begin(recipe: Recipe, theta: Tensor, fragments: tuple[Fragment, ...]) -> SharedState:
    """The shared state before the first round."""
    outer = tuple(init_outer(recipe.outer_rule, fragment.take(theta)) for fragment in fragments)
    downloads = Downloads(recipe.updates.download, fragments)
    return SharedState(theta, fragments, outer, downloads, outlived=recipe.keeps_late)
