"""From replies as they come to contributions that may touch the shared state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from potluck.contribution import Contribution, Reply, TaskId, kept
from potluck.engine.protocol import Engine
from potluck.errors import TrainingError
from potluck.rounds.state import SharedState

_MAX_REASON = 1000  # characters that go into the event log
FIGURES = ("loss", "steps", "skipped_steps", "tokens", "examples", "cursor", "epoch")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a reply counts: ``ok`` with its contribution, else ``failed`` or ``rejected`` with the reason."""

    status: Literal["ok", "failed", "rejected"]
    reason: str = ""
    contribution: Contribution | None = None
    update_norm: float = 0.0


def in_order(engine: Engine, sent: Mapping[TaskId, str]) -> Iterator[Reply]:
    """The replies to ``sent`` in its order, so that sums repeat bit for bit; one that is early is held back."""
    early: dict[TaskId, Reply] = {}
    for awaited in sent:
        while awaited not in early:
            reply = engine.receive()
            if reply is None:
                raise TrainingError(f"{sent[awaited]}: the engine lost a task")
            if reply.task in sent:
                early[reply.task] = reply if reply.task == awaited else kept(reply)
        yield early.pop(awaited)


def examine(reply: Reply, shared: SharedState, steps: int) -> Verdict:
    """Check what a participant sent before it touches shared state: schema, revision, shape, finite values.

    Args:
        steps: Local steps that were asked for; one who says it took more is rejected.
    """
    contribution = reply.contribution
    if contribution is None:
        return Verdict(status="failed", reason=reply.reason[:_MAX_REASON])
    parameters = contribution.tensors.get("parameters")
    if contribution.kind != "train" or parameters is None or any(key not in contribution.header for key in FIGURES):
        return Verdict(status="rejected", reason="not an update")
    if contribution.revision != shared.revision:
        return Verdict(status="rejected", reason=f"revision {contribution.revision}, expected {shared.revision}")
    if parameters.shape != shared.theta.shape or parameters.dtype != shared.theta.dtype:
        return Verdict(
            status="rejected", reason=f"{parameters.dtype} {tuple(parameters.shape)} is not the shared state's"
        )
    update_norm = float(torch.dist(parameters, shared.theta))
    if not math.isfinite(update_norm):
        return Verdict(status="rejected", reason="parameters are not finite")
    loss, *counts = (contribution.header[key] for key in FIGURES)
    if not (type(loss) is float and math.isfinite(loss) and all(type(n) is int and n >= 0 for n in counts)):
        return Verdict(status="rejected", reason="its figures are not numbers")
    if int(contribution.header["steps"]) > steps:
        return Verdict(status="rejected", reason=f"{contribution.header['steps']} local steps, {steps} were asked for")
    if 0 in (contribution.header[key] for key in ("steps", "tokens", "examples")):
        return Verdict(status="rejected", reason="no local step was taken")
    return Verdict(status="ok", contribution=contribution, update_norm=update_norm)
