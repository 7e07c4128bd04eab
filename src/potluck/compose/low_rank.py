"""Sums of products without ever forming one: concatenated factors, and a decomposition of their small Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potluck.compose.adapter import Factors

_NOISE = 1e-15  # eigenvalues below this share of the largest are rounding in float64


def concatenated(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact sum ``Σ wᵢ ΔWᵢ``, of rank ``Σ rᵢ``: ``[w₁B₁ … w_N B_N] [A₁; …; A_N]``."""
    down = torch.cat([part.down for part in parts])
    up = torch.cat([weight * part.up for weight, part in zip(weights, parts, strict=True)], dim=1)
    return Factors(down, up)


def decomposed(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a product from its factors, ``up @ down = U diag(s) Vᵀ``.

    Returns:
        U ``(d_out, R')``, s ``(R',)`` descending, Vᵀ ``(R', d_in)``, with R' the rank, but 1 for zero.
    """
    up, down, kind = factors.up.double(), factors.down.double(), factors.up.dtype
    left, s, right = _mixtures(up, down)
    return (up @ left).to(kind), s.to(kind), (right @ down).to(kind)


def truncated(factors: Factors, rank: int | None = None, energy: float | None = None) -> Factors:
    """The product nearest to ``up @ down`` among those of this rank (Eckart and Young, 1936), balanced.

    ``up' = U_k √S_k``, ``down' = √S_k V_kᵀ``; what has no more than this rank stays what it is, to rounding.

    Args:
        rank: k, at most.
        energy: k is the least that keeps this share of ``Σ s²``.
    """
    up, down, kind = factors.up.double(), factors.down.double(), factors.up.dtype
    left, s, right = _mixtures(up, down)
    k = min(rank or len(s), len(s) if energy is None else rank_for_energy(s, energy))
    root = s[:k].sqrt()
    return Factors((root[:, None] * right[:k] @ down).to(kind), (up @ (left[:, :k] * root)).to(kind))


def _mixtures(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X ``(R, R')`` and Y ``(R', R)`` that mix a product's R terms: ``U = up X``, ``Vᵀ = Y down``; and s.

    ``upᵀ up = P Λ Pᵀ``, so ``up = Q C`` with ``C = √Λ Pᵀ`` and Q orthonormal. Then ``(up down)(up down)ᵀ =
    Q (C down downᵀ Cᵀ) Qᵀ``, and E, the eigenvectors of the R x R matrix in the middle, give ``U = Q E`` and
    ``Vᵀ = S⁻¹ Eᵀ C down``: O((d_in + d_out) R²), where the SVD of the product is O(d_in d_out min(d_in, d_out)).
    In float64, whose squares hold all that float32 holds; each term is balanced first, so that none is lost in them.
    """
    balance = (down.norm(dim=1) / up.norm(dim=0)).sqrt()
    balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0)
    up, down = up * balance, down / balance[:, None]
    eigenvalues, p = _spectrum(up.T @ up)
    core = eigenvalues.sqrt()[:, None] * p.T
    squares, e = _spectrum(core @ (down @ down.T) @ core.T)
    s = squares.sqrt()
    left, right = p @ (e / eigenvalues.sqrt()[:, None]), (e.T @ core) / s[:, None]
    return balance[:, None] * left, s, right / balance


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of a positive semidefinite matrix, without what is noise."""
    values, vectors = torch.linalg.eigh(gram)
    kept = max(1, int((values > _NOISE * values[-1]).sum())) if len(values) else 0
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    return values.clamp(min=torch.finfo(values.dtype).tiny), vectors


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
