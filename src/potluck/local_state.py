"""What a participant keeps between rounds, as values that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potluck.local.network import Network, host_vector
from potluck.local.optimizers import InnerOptimizer
from potluck.local.replicas import AdaptiveState, new_streams, restore_streams, stream_facts, stream_tensors
from potluck.local.steps import StepReport
from potluck.recipe import Recipe
from potluck.updates.fragments import Fragment
from potluck.updates.links import State, link_of


@dataclass
class LocalState:
    """What a participant keeps between rounds; with the recipe and its text it determines all it will do.

    Attributes:
        moments: The inner optimizer's moments, flat fp32 in host memory.
        optimizer_steps: Steps behind the moments.
        cursor: Sequences drawn from each of its batches.
        tokens: Tokens it has trained on.
        links: For each fragment, what the links keep: above all the residual of error feedback.
        own: Its own parameters where it does not start each round from the shared ones (streaming, eager).
        pending: First and number of the local steps that may go on while its last update travels.
        adaptive: Batch sizes and moments of an adaptive batch's streams, in place of ``moments``.
        merged: Revision of the shared state that is already mixed into ``own``.
        shared: The shared state; not saved with the rest, it comes again after a resume.
        ahead: The ``pending`` steps, if they were taken while the update travelled, and the parameters that they
            reached; not saved, they are taken again.
    """

    moments: Tensor
    optimizer_steps: int = 0
    cursor: int = 0
    tokens: int = 0
    links: tuple[State, ...] = ()
    own: Tensor | None = None
    pending: tuple[int, int] = (0, 0)
    merged: int = 0
    adaptive: AdaptiveState | None = None
    shared: Tensor | None = field(default=None, repr=False)
    ahead: tuple[StepReport, Tensor] | None = field(default=None, repr=False)


def new_state(
    network: Network, optimizer: InnerOptimizer, recipe: Recipe, fragments: tuple[Fragment, ...]
) -> LocalState:
    """The state of a participant that has done nothing yet."""
    link = link_of(recipe.updates.links)
    links = tuple(link.init(fragment.layout) for fragment in fragments)
    table = recipe.local.adaptive_batch
    if table is None:
        return LocalState(host_vector(optimizer.size, network.device), links=links)
    streams = new_streams(recipe.local, table, optimizer.size, network.device)
    return LocalState(torch.empty(0), links=links, adaptive=streams)


_COUNTERS = ("optimizer_steps", "cursor", "tokens", "merged")


def state_facts(state: LocalState) -> dict[str, Any]:
    """Its counters, as JSON."""
    streams = None if state.adaptive is None else stream_facts(state.adaptive)
    return {**{name: getattr(state, name) for name in _COUNTERS}, "pending": state.pending, "streams": streams}


def state_tensors(state: LocalState) -> dict[str, Tensor]:
    """Its tensors by name; the state's own, not copies."""
    own = {} if state.own is None else {"own": state.own}
    kept = {f"{place}.{name}": tensor for place, link in enumerate(state.links) for name, tensor in link.items()}
    streams = {} if state.adaptive is None else stream_tensors(state.adaptive)
    return {"moments": state.moments, **own, **kept, **streams}


def restore_state(state: LocalState, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put into a state what ``state_tensors`` and ``state_facts`` said of it; what was done ahead is forgotten."""
    for name in _COUNTERS:
        setattr(state, name, int(facts[name]))
    first, count = facts["pending"]
    state.pending = (int(first), int(count))
    if state.adaptive is not None:
        restore_streams(state.adaptive, facts["streams"])
    state.own = tensors["own"].clone() if "own" in tensors else None
    state.ahead = None
    for name, tensor in state_tensors(state).items():
        tensor.copy_(tensors[name])
