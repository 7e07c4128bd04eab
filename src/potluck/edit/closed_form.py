"""From statistics of edits to what is added to a weight: ROME, MEMIT, AlphaEdit, in float64.

With keys k and residuals r of a batch as rows of K ``(E, d_in)`` and R ``(E, d_out)``: ``M = Rᵀ K``, ``G = Kᵀ K``.
Both are sums over edits, so it does not matter whose they are (CollabEdit, arXiv 2410.09508). ``C = E[k kᵀ]`` is of a
text that is to stay as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potluck.errors import EditError


def sums(keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """``M = Rᵀ K``, ``(d_out, d_in)``, and ``G = Kᵀ K``, ``(d_in, d_in)``."""
    return residuals.T @ keys, keys.T @ keys


def rome_update(key: Tensor, residual: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """``Δ = r uᵀ / (uᵀ k)`` with ``u = (C + ridge c̄ I)⁻¹ k``: after it ``(W + Δ) k = W k + r`` (arXiv 2202.05262).

    One k throughout, that of u: a mixture with the key of another prompt makes edits that destroy the model
    (arXiv 2403.07175).

    Args:
        key: ``(d_in,)``.
        residual: ``(d_out,)``.
        moment: C, ``(d_in, d_in)``; ``c̄`` is the mean of its diagonal.
    """
    u: Tensor = torch.cholesky_solve(key[:, None], _factor(regular(moment, ridge)))[:, 0]
    return torch.outer(residual, u) / (u @ key)


def memit_update(m: Tensor, g: Tensor, moment: Tensor, weight: float) -> Tensor:
    """``Δ = M (λ C + G)⁻¹`` (MEMIT, arXiv 2210.07229).

    Args:
        m, g: Summed statistics of the edits.
        moment: C; what earlier edits need may be added to it.
        weight: λ.

    Raises:
        EditError: The sum is not positive definite: what came is no sum of squares, or λ is too small.
    """
    return _right_divided(m, regular(weight * moment + g, 1e-12))


def null_space(moment: Tensor, kept: float) -> Tensor:
    """``U₀``, ``(d_in, q)``: directions that together hold at most ``1 - kept`` of the text's energy, ``tr C``.

    AlphaEdit (arXiv 2410.02355) has an absolute threshold for eigenvalues in its place, which means another thing in
    every model.

    Raises:
        EditError: There is none.
    """
    values, vectors = torch.linalg.eigh(moment)
    energy = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    free = int((energy <= 1 - kept).sum())
    if not free:
        raise EditError(f"no direction is free with {kept:g} of the energy kept", "keep less, or give more text")
    basis: Tensor = vectors[:, :free]
    return basis


def alphaedit_update(m: Tensor, g: Tensor, past: Tensor, free: Tensor, weight: float) -> Tensor:
    """``Δ = M U₀ [U₀ᵀ (G + G_p) U₀ + λ I]⁻¹ U₀ᵀ`` (AlphaEdit, arXiv 2410.02355, in the coordinates of the null space).

    Args:
        m, g: Summed statistics of the edits.
        past: ``G_p``, that of the keys of earlier edits.
        free: ``U₀`` of `null_space`.
        weight: λ ("L2").

    Raises:
        EditError: As `memit_update`.
    """
    inner = free.T @ (g + past) @ free
    inner.diagonal().add_(weight)
    return _right_divided(m @ free, inner) @ free.T


def regular(matrix: Tensor, ridge: float) -> Tensor:
    """The matrix with ``ridge`` of its mean diagonal added to its diagonal."""
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def _right_divided(a: Tensor, b: Tensor) -> Tensor:
    """``A B⁻¹`` for a positive definite B."""
    solved: Tensor = torch.cholesky_solve(a.T, _factor(b))
    right: Tensor = solved.mT.contiguous()
    return right


def _factor(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
    if int(info) or not torch.isfinite(factor).all():
        raise EditError(
            "the statistics of these edits cannot be solved: their sum is not positive definite",
            "they are not sums of squares, or the weight of the text's moment is too small",
        )
    lower: Tensor = factor
    return lower
