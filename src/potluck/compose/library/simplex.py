"""The nearest mixture: a quadratic over weights that are not negative and add up to one."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 1e-9  # of the largest entry


def nearest_mixture(gram: Tensor, overlap: Tensor) -> Tensor:
    """``argmin ½ βᵀ G β − cᵀ β`` over ``β ≥ 0, Σβ = 1``, by an active set.

    Points enter a support one by one, the one first along which the objective falls most; whenever the optimum on the
    support leaves the simplex, the step stops at its edge and what became zero goes (Wolfe, "Finding the nearest point
    in a polytope", 1976). The objective falls in each step, so no support comes back and it ends, exactly.

    Args:
        gram: G, inner products of the points, ``(K, K)``, positive semidefinite up to the rounding of its type.
        overlap: c, inner products of the points with the target, ``(K,)``.

    Returns:
        β, float64 ``(K,)``.
    """
    count = len(overlap)
    g = gram.double().cpu()
    scale = g.diagonal().abs().max().clamp_min(1e-300)
    rounding = 4 * count * torch.finfo(gram.dtype).eps  # by so much a Gram matrix may fail to be positive
    g, c = g / scale + rounding * torch.eye(count, dtype=torch.float64), overlap.double().cpu() / scale
    weights = torch.zeros(count, dtype=torch.float64)
    weights[(g.diagonal() / 2 - c).argmin()] = 1.0
    support = weights > 0
    for _ in range(10 * count):
        slope = g @ weights - c
        entering = int(slope.argmin())
        if slope[entering] >= weights @ slope - _TOLERANCE or support[entering]:
            break
        support[entering] = True
        weights, support = _optimum_on(g, c, weights, support)
    return weights / weights.sum()


def _optimum_on(g: Tensor, c: Tensor, weights: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """From a point of the simplex to the optimum on a support, which shrinks where the way leads out."""
    while True:
        target = _on_the_plane(g, c, support)
        if (target[support] > 0).all():
            return target, support
        falling = support & (target <= 0)
        steps = weights[falling] / (weights[falling] - target[falling]).clamp_min(1e-300)
        weights = weights + steps.min() * (target - weights)
        gone = falling.nonzero().flatten()[steps == steps.min()]
        support = support.clone()
        support[gone] = False
        weights = weights.where(support, torch.zeros_like(weights)).clamp_min(0)


def _on_the_plane(g: Tensor, c: Tensor, support: Tensor) -> Tensor:
    """The optimum on ``Σβ = 1`` with zeros outside of a support, whatever its signs."""
    inside = support.nonzero().flatten()
    factor = torch.linalg.cholesky(g[inside][:, inside])
    both = torch.stack([c[inside], torch.ones(len(inside), dtype=torch.float64)], dim=1)
    free, ones = torch.cholesky_solve(both, factor).unbind(1)
    found = torch.zeros_like(c)
    found[inside] = free + ones * (1 - free.sum()) / ones.sum()
    return found
