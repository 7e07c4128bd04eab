"""What all participants share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from potluck.aggregation.outer import OuterState, init_outer
from potluck.contribution import Reply, TaskId
from potluck.recipe import Recipe
from potluck.updates.download import Downloads
from potluck.updates.fragments import Fragment

if TYPE_CHECKING:
    from potluck.rounds.receiving import Asked


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
        late: What was asked of those who did not answer in time, if their answers still count (``rounds.late``).
        arrived: Such answers, for the next round.
    """

    theta: Tensor
    fragments: tuple[Fragment, ...]
    outer: tuple[OuterState, ...]
    downloads: Downloads
    revision: int = 0
    total_tokens: int = 0
    lost: set[str] = field(default_factory=set)
    late: dict[TaskId, Asked] = field(default_factory=dict)
    arrived: list[Reply] = field(default_factory=list)
    _digest: tuple[int, str] = (-1, "")
    _snapshot: tuple[int, Tensor] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of ``theta``: with the revision it names the state."""
        if self._digest[0] != self.revision:
            self._digest = (self.revision, hashlib.sha256(self.theta.numpy().data).hexdigest())
        return self._digest[1]

    @property
    def snapshot(self) -> Tensor:
        """``theta`` as it is now, for tasks that may be performed when it has moved on; one copy for all."""
        if self._snapshot is None or self._snapshot[0] != self.revision:
            self._snapshot = (self.revision, self.theta.clone())
        return self._snapshot[1]

    def put(self, theta: Tensor) -> None:
        """Make another state the shared one, without an outer step: everybody has to be told all of it."""
        self.theta.copy_(theta)
        self._digest, self._snapshot = (-1, ""), None
        for name in list(self.downloads.held):
            self.downloads.forget(name)


def begin(recipe: Recipe, theta: Tensor, fragments: tuple[Fragment, ...]) -> SharedState:
    """The shared state before the first round."""
    outer = tuple(init_outer(recipe.outer, fragment.take(theta)) for fragment in fragments)
    return SharedState(theta, fragments, outer, Downloads(recipe.updates.download, fragments))
