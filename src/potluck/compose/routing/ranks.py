"""Rank-wise routing: every rank of every participant's adapter is an expert of its own.

``y = W x + Σ_i g_i b_i (a_i · x)`` over all ranks of all participants, of which each token uses the k with the highest
scores. A router learns the scores on a little public text (SMoRA, arXiv 2501.15103), or a rank scores itself by how
strongly it answers, without any text (after MoRA, "Little by Little": no router, scores from a rank's own activation).

A rank means something only in a fixed gauge, so every adapter is brought into `canonical` form first: its ranks are
its singular directions. The product stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.base import Base
from potluck.compose.lora import added, check_fits
from potluck.compose.low_rank import canonical, concatenated
from potluck.compose.routing.bundle import by_module
from potluck.compose.training import Lesson, only_training, train_part
from potluck.errors import RecipeError


@dataclass(frozen=True)
class Ranks:
    """How many ranks a token uses, and how a router keeps all of them in use while it learns.

    Attributes:
        active: k, over all participants together; at a linear map with fewer ranks, all of those.
        balance: u of ``b_i <- b_i + u sign(mean load - load_i)`` after each step; 0 leaves it out.
    """

    active: int = 8
    balance: float = 1e-3


class LearnedRanks(nn.Module):
    """One linear map's addition ``Σ_{i in TopK(W_g x + b)} g_i b_i (a_i · x)`` with ``g = 2 σ(W_g x)``.

    A router of zeros has g = 1: with all ranks active it begins as the exact sum of the adapters. The bias b decides
    who is chosen, and not how much it counts, as in loss-free balancing (arXiv 2408.15664).

    Attributes:
        router: W_g, ``(R, d_in)``.
        bias: b, ``(R,)``; moved by `rebalance` alone.
        load: How often each rank was chosen in training since then.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    load: Tensor

    def __init__(self, factors: Factors, active: int, router: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.active = min(active, factors.rank)
        self.router = nn.Parameter(router.clone(), requires_grad=False)
        self.register_buffer("down", factors.down, persistent=False)
        self.register_buffer("up", factors.up, persistent=False)
        self.register_buffer("bias", bias.clone())
        self.register_buffer("load", torch.zeros_like(bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(…, d_in)`` to ``(…, d_out)``."""
        scores = linear(x, self.router)
        chosen = (scores + self.bias).topk(self.active).indices
        gates = torch.zeros_like(scores).scatter(-1, chosen, 2 * scores.gather(-1, chosen).sigmoid())
        if self.training:
            self.load.index_add_(0, chosen.flatten(), self.load.new_ones(chosen.numel()))
        return linear(linear(x, self.down) * gates, self.up)

    def rebalance(self, u: float) -> None:
        """``b_i <- b_i + u sign(mean load - load_i)``, and count anew."""
        self.bias.add_(torch.sign(self.load.mean() - self.load), alpha=u)
        self.load.zero_()


class SelfActivatedRanks(nn.Module):
    """One linear map's addition ``Σ_i b_i (a_i · x)`` over the k ranks with the largest ``|a_i · x| ‖b_i‖``."""

    down: Tensor
    up: Tensor
    reach: Tensor  # ‖b_i‖, (R,)

    def __init__(self, factors: Factors, active: int) -> None:
        super().__init__()
        self.active = min(active, factors.rank)
        self.register_buffer("down", factors.down, persistent=False)
        self.register_buffer("up", factors.up, persistent=False)
        self.register_buffer("reach", factors.up.norm(dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(…, d_in)`` to ``(…, d_out)``."""
        activations = linear(x, self.down)
        chosen = (activations.abs() * self.reach).topk(self.active).indices
        kept = torch.zeros_like(activations).scatter(-1, chosen, activations.gather(-1, chosen))
        return linear(kept, self.up)


def self_activated(adapters: Mapping[str, Adapter], active: int) -> dict[str, SelfActivatedRanks]:
    """Ranks that choose themselves, by the linear map's place: for `potluck.compose.lora.added`.

    Raises:
        RecipeError: As many ranks cannot be active.
    """
    sums = _all_ranks(adapters, active)
    return {path: SelfActivatedRanks(factors, active) for path, factors in sums.items()}


def untrained_ranks(adapters: Mapping[str, Adapter], active: int, seed: int = 0) -> dict[str, LearnedRanks]:
    """Routers that choose at random and weigh all ranks nearly alike, by the linear map's place.

    Raises:
        RecipeError: As many ranks cannot be active.
    """
    draw = torch.Generator().manual_seed(seed)
    routers = {}
    for path, factors in _all_ranks(adapters, active).items():
        rows, columns = factors.down.shape
        router = 0.02 * torch.randn(rows, columns, generator=draw) / columns**0.5
        routers[path] = LearnedRanks(factors, active, router, torch.zeros(rows))
    return routers


def train_ranks(
    base: Base,
    adapters: Mapping[str, Adapter],
    streams: Sequence[np.ndarray],
    lesson: Lesson,
    settings: Ranks | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, LearnedRanks]:
    """Learn W_g alone, on public text; base and adapters stay as they are.

    Args:
        streams: Token ids; a step takes a batch of each.

    Returns:
        What routes, by the linear map's place: ``with added(base.model, found): …``.

    Raises:
        RecipeError: As many ranks cannot be active.
        ModelError: An adapter does not fit the base.
        CorpusError: The text is shorter than one sequence.
    """
    settings = settings or Ranks()
    for name, adapter in adapters.items():
        check_fits(base.model, adapter, name)
    routers = untrained_ranks(adapters, settings.active, lesson.seed)

    def between_steps(step: int) -> None:
        if step and settings.balance:
            for layer in routers.values():
                layer.rebalance(settings.balance)
        on_step(step)

    part = [layer.router for layer in routers.values()]
    with added(base.model, routers), only_training(base.model, part):
        train_part(base.model, streams, lesson, between_steps, "router")
    return routers


def _all_ranks(adapters: Mapping[str, Adapter], active: int) -> dict[str, Factors]:
    """All participants' ranks at each linear map, side by side."""
    sums = {}
    for path, parts in by_module(adapters).items():
        fixed = [canonical(part) for part in parts.values()]
        sums[path] = concatenated(fixed, [1.0] * len(fixed))
    most = max((factors.rank for factors in sums.values()), default=0)
    if not 1 <= active <= most:
        raise RecipeError(f"{active} active ranks of {most}", "choose at least 1, at most all")
    return sums
