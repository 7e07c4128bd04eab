"""From replies as they come to contributions that may touch the shared state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from potluck.aggregation.outer import Mean
from potluck.contribution import Contribution, Header, Reply, ReplyStatus, TaskId, kept
from potluck.engine.protocol import Engine
from potluck.errors import TrainingError
from potluck.rounds.figures import FIGURES, Limits, wrong_update
from potluck.rounds.state import SharedState
from potluck.untrusted import in_a_line
from potluck.updates.fragments import Fragment
from potluck.updates.links import Link, unpack


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a round asks for, and so what a contribution is held to.

    Attributes:
        kind: Of the task, and of the answer.
        fragment: The part of the shared state whose turn it is.
        link: How updates were made smaller; ``None`` if they are parameters in full precision.
        draw: Seeds what is random in the links.
        limits: What its local steps can come to.
        revision: Of the shared state it starts from.
        max_norm: A larger update is rejected.
    """

    kind: str
    fragment: Fragment
    link: Link | None
    draw: int
    limits: Limits
    revision: int
    max_norm: float | None = None

    @property
    def of(self) -> Mean:
        """What updates are, and so what their mean is of."""
        return "parameters" if self.link is None else "pseudo-gradient"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a reply counts: ``ok`` with its vector and figures, else ``late``, ``failed`` or ``rejected`` and why."""

    status: ReplyStatus
    reason: str = ""
    vector: Tensor | None = None
    header: Header = field(default_factory=dict)
    update_norm: float = 0.0


@dataclass
class Window:
    """How long the replies to an exchange are waited for.

    Attributes:
        ends: Engine time after which nobody is waited for; ``None`` waits for all.
        quorum: So many contributions are enough ...
        grace: ... to wait only so many seconds more; ``None`` waits on.
    """

    ends: float | None = None
    quorum: int = 0
    grace: float | None = None
    _contributed: int = 0

    def left(self, now: float) -> float | None:
        """Seconds that are left, not below 0."""
        return None if self.ends is None else max(0.0, self.ends - now)

    def note(self, reply: Reply, now: float, counts: Callable[[Reply], bool]) -> None:
        """Count a contribution, if it counts; the one that makes the quorum starts the grace."""
        if self.grace is None or self._contributed >= self.quorum or not counts(reply):
            return
        self._contributed += 1
        if self._contributed == self.quorum:
            self.ends = min(now + self.grace, now + self.grace if self.ends is None else self.ends)


def _came(reply: Reply) -> bool:
    return reply.status == "ok"


def in_order(
    engine: Engine,
    sent: Mapping[TaskId, str],
    window: Window | None = None,
    others: list[Reply] | None = None,
    counts: Callable[[Reply], bool] = _came,
) -> Iterator[Reply]:
    """The replies to ``sent`` in its order, so that sums repeat bit for bit; one that is early is held back.

    Whoever has not answered when the window closes is ``late``.

    Args:
        others: Gets the replies to tasks of earlier rounds.
        counts: Whether a reply is one of those that the window waits for.
    """
    window, early = window or Window(), dict[TaskId, Reply]()
    for awaited, name in sent.items():
        while awaited not in early:
            left = window.left(engine.now())
            reply = engine.receive(left)
            if reply is None and left is None:
                raise TrainingError(f"{name}: the engine lost a task")
            if reply is None:
                early[awaited] = Reply(task=awaited, participant=name, status="late", reason="no answer in time")
            elif reply.task in sent:
                window.note(reply, engine.now(), counts)
                early[reply.task] = reply if reply.task == awaited else kept(reply)
            elif others is not None:
                others.append(kept(reply))
        yield early.pop(awaited)


def examine(reply: Reply, shared: SharedState, asked: Asked) -> Verdict:
    """Check what a participant sent before it touches shared state: schema, revision, form, finite values, figures."""
    contribution = reply.contribution
    if contribution is None:
        return Verdict(status=reply.status, reason=in_a_line(reply.reason))
    if contribution.kind != asked.kind or any(key not in contribution.header for key in FIGURES):
        return _rejected("not an update")
    if contribution.revision != asked.revision:
        return _rejected(f"revision {contribution.revision}, expected {asked.revision}")
    if reason := wrong_update(contribution.header, asked.limits):
        return _rejected(reason)
    try:
        vector = _vector(contribution, asked)
    except TrainingError as error:
        return _rejected(str(error))
    now = asked.fragment.take(shared.theta)
    start = asked.fragment.take(shared.snapshots[asked.revision]) if asked.revision < shared.revision else now
    norm = torch.dist(vector, start) if asked.link is None else torch.linalg.norm(vector)
    if not math.isfinite(float(norm)):
        return _rejected("parameters are not finite")
    if asked.max_norm is not None and float(norm) > asked.max_norm:
        return _rejected(f"an update of norm {float(norm):.4g}, rounds.max_update_norm is {asked.max_norm:g}")
    if asked.link is None and start is not now:
        vector = vector + (now - start)  # the same step, from where the state is now
    return Verdict(status="ok", vector=vector, header=contribution.header, update_norm=float(norm))


def _vector(contribution: Contribution, asked: Asked) -> Tensor:
    """The fragment's parameters, or its pseudo-gradient decoded."""
    if asked.link is not None:
        return unpack(asked.link, contribution.tensors, asked.fragment.layout, asked.draw)
    parameters = contribution.tensors.get("parameters")
    if parameters is None:
        raise TrainingError("not an update")
    if parameters.shape != (asked.fragment.size,) or parameters.dtype != torch.float32:
        raise TrainingError(f"{parameters.dtype} {tuple(parameters.shape)} is not the shared state's")
    return parameters


def _rejected(reason: str) -> Verdict:
    return Verdict(status="rejected", reason=reason)
