"""A participant's streams: models that it trains side by side from the shared state, each with a batch of its own.

In each round every stream takes its local steps from the shared state, on draws of its own and with moments of its own.
What the participant contributes is their mean by requested batch, ``x = sum_j b_j x_j / sum_j b_j``. From time to time
the two streams with the smallest requests are merged, until one is left.

Source: AdLoCo, arXiv 2508.18182. There each stream is a run of DiLoCo with a shared state of its own, and merging
averages those; here all streams of all participants share one, so that merging concerns their moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potluck.local.adaptive import adaptive_steps, next_batch_size
from potluck.local.network import Network, host_vector
from potluck.local.optimizers import InnerOptimizer
from potluck.local.steps import StepReport
from potluck.recipe.adaptive import AdaptiveBatch
from potluck.recipe.local import Local


@dataclass
class Stream:
    """One model's state between rounds.

    Attributes:
        moments: The inner optimizer's moments, flat fp32 in host memory.
        batch_size: Sequences it asks for in a local step.
        optimizer_steps: Steps behind the moments.
    """

    moments: Tensor
    batch_size: int
    optimizer_steps: int = 0


@dataclass
class AdaptiveState:
    """All streams of a participant.

    Attributes:
        streams: Those that are left, at least one.
        rounds: Rounds that they have trained.
    """

    streams: list[Stream]
    rounds: int = 0


def new_streams(settings: Local, table: AdaptiveBatch, size: int, device: torch.device) -> AdaptiveState:
    """Streams that have done nothing yet.

    Args:
        size: Length of an optimizer's moments.
        device: Of the network.
    """
    return AdaptiveState([Stream(host_vector(size, device), settings.batch_size) for _ in range(table.streams)])


def stream_steps(
    network: Network,
    optimizer: InnerOptimizer,
    settings: Local,
    table: AdaptiveBatch,
    state: AdaptiveState,
    draw: Callable[[int], Sequence[Tensor]],
    rates: Sequence[float],
    anchor: Tensor | None,
) -> StepReport:
    """A round of all streams from the network's parameters; leaves their mean in the network, and may merge two.

    Args:
        draw: The next so many sequences, from each text that there is; streams draw one after the other.
        rates: Learning rate of each step as a fraction of its peak, the same for all streams.
        anchor: As for ``local_steps``.

    Raises:
        NotFinite: As ``local_steps``; what was done until then stays done.
    """
    theta, several = network.flat.vector, len(state.streams) > 1
    start, mean = (theta.clone(), theta.clone()) if several else (theta, theta)  # of one stream nothing is copied
    reports, weight = [], 0
    for stream in state.streams:
        theta.copy_(start)
        reports.append(_one_stream(network, optimizer, settings, table, stream, draw, rates, anchor))
        weight += stream.batch_size
        mean.lerp_(theta, stream.batch_size / weight)  # the first, at weight 1, is taken as it is
    theta.copy_(mean)
    state.rounds += 1
    if state.rounds % table.merge_every == 0 and len(state.streams) > 1:
        merge_smallest(state)
    return _together(reports)


def merge_smallest(state: AdaptiveState) -> None:
    """Merge the two streams that ask for least; of two that ask alike, the earlier. The larger request is kept."""
    victim, survivor = sorted(state.streams, key=lambda stream: stream.batch_size)[:2]
    share = victim.batch_size / (victim.batch_size + survivor.batch_size)
    survivor.moments.lerp_(victim.moments, share)
    state.streams = [stream for stream in state.streams if stream is not victim]


def stream_tensors(state: AdaptiveState) -> dict[str, Tensor]:
    """The part of a checkpoint that is tensors; they are the state's own, to be written in a restore."""
    return {f"moments-{place}": stream.moments for place, stream in enumerate(state.streams)}


def stream_facts(state: AdaptiveState) -> dict[str, Any]:
    """The part of a checkpoint that is JSON."""
    return {
        "rounds": state.rounds,
        "batch_sizes": [stream.batch_size for stream in state.streams],
        "optimizer_steps": [stream.optimizer_steps for stream in state.streams],
    }


def restore_streams(state: AdaptiveState, facts: Mapping[str, Any]) -> None:
    """Make a new state what ``stream_facts`` told of one; its tensors are to be written after that.

    Raises:
        KeyError, TypeError, ValueError: It tells of no streams, or of more than there were at first.
    """
    sizes, steps = facts["batch_sizes"], facts["optimizer_steps"]
    if not sizes:
        raise ValueError("no streams")
    del state.streams[len(sizes) :]
    for stream, size, done in zip(state.streams, sizes, steps, strict=True):
        stream.batch_size, stream.optimizer_steps = int(size), int(done)
    state.rounds = int(facts["rounds"])


def _one_stream(
    network: Network,
    optimizer: InnerOptimizer,
    settings: Local,
    table: AdaptiveBatch,
    stream: Stream,
    draw: Callable[[int], Sequence[Tensor]],
    rates: Sequence[float],
    anchor: Tensor | None,
) -> StepReport:
    if not settings.keep_optimizer:
        stream.moments.zero_()
        stream.optimizer_steps = 0
    optimizer.bind(stream.moments, stream.optimizer_steps)
    try:
        report, norms = adaptive_steps(network, optimizer, settings, table, stream.batch_size, draw, rates, anchor)
    finally:  # what a failing participant has done stays done
        stream.optimizer_steps = optimizer.steps
        optimizer.release(stream.moments)
    stream.batch_size = next_batch_size(stream.batch_size, norms, table)
    return report


def _together(reports: Sequence[StepReport]) -> StepReport:
    """One report of all streams: the steps of the one that took most, the tokens of all, the loss per token."""
    if len(reports) == 1:
        return reports[0]
    tokens = sum(r.tokens for r in reports)
    return StepReport(
        steps=max(r.steps for r in reports),
        skipped_steps=max(r.skipped_steps for r in reports),
        loss=sum(r.loss * r.tokens for r in reports) / max(1, tokens),
        tokens=tokens,
        examples=sum(r.examples for r in reports),
    )
