"""Sums of products without ever forming one: concatenated factors, QR of both, and the SVD of a small core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potluck.compose.adapter import Factors


def concatenated(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact sum ``Σ wᵢ ΔWᵢ``, of rank ``Σ rᵢ``: ``[w₁B₁ … w_N B_N] [A₁; …; A_N]``."""
    down = torch.cat([part.down for part in parts])
    up = torch.cat([weight * part.up for weight, part in zip(weights, parts, strict=True)], dim=1)
    return Factors(down, up)


def decomposed(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a product from its factors, ``up @ down = U diag(s) Vᵀ``, with R = rank.

    ``up = Q_b R_b``, ``downᵀ = Q_a R_a``, and the SVD of the R x R core ``R_b R_aᵀ``: O((d_in + d_out) R²) where the
    SVD of the product is O(d_in d_out min(d_in, d_out)).

    Returns:
        U ``(d_out, R')``, s ``(R',)`` descending, Vᵀ ``(R', d_in)``, with ``R' = min(R, d_in, d_out)``.
    """
    left, left_core = torch.linalg.qr(factors.up)
    right, right_core = torch.linalg.qr(factors.down.T)
    u, s, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, s, vt @ right.T


def truncated(factors: Factors, rank: int) -> Factors:
    """The product nearest to ``up @ down`` among those of this rank (Eckart and Young, 1936), balanced.

    ``up' = U_k √S_k``, ``down' = √S_k V_kᵀ``; what has no more than this rank stays what it is, to rounding.
    """
    u, s, vt = decomposed(factors)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * vt[:rank], u[:, :rank] * root)


def canonical(factors: Factors) -> Factors:
    """The same product in the one gauge that adapters can be compared in.

    SVD of the product, √S on either side, and each pair's sign chosen so that the largest entry of its row of A is
    positive. Terms that are zero are left out, but one at least stays.
    """
    u, s, vt = decomposed(factors)
    kept = max(1, int((s > s[0] * 1e-6).sum()))
    u, s, vt = u[:, :kept], s[:kept], vt[:kept]
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0)
    root = s.sqrt()
    return Factors((signs * root)[:, None] * vt, u * (signs * root))


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The least k with ``Σ_{j≤k} s_j² ≥ share · Σ s_j²``."""
    energy = singular_values.double().square().cumsum(0)
    return int(torch.searchsorted(energy, share * energy[-1] * (1 - 1e-12)).item()) + 1
