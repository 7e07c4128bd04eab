"""From statistics of edits to what is added to a weight: ROME, MEMIT, AlphaEdit, in float64.

With keys k and residuals r of a batch as rows of K ``(E, d_in)`` and R ``(E, d_out)``: ``M = Rᵀ K``, ``G = Kᵀ K``.
Both are sums over edits, so it does not matter whose they are (CollabEdit, arXiv 2410.09508). ``C = E[k kᵀ]`` is of a
text that is to stay as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potluck.errors import EditError

RIDGE = 0.003  # of MEMIT: in directions that a text does not use, nothing else bounds what is written


def sums(keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """``M = Rᵀ K``, ``(d_out, d_in)``, and ``G = Kᵀ K``, ``(d_in, d_in)``."""
    return residuals.T @ keys, keys.T @ keys


def rome_update(key: Tensor, residual: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """``Δ = r uᵀ / (uᵀ k)`` with ``u = (C + ridge c̃ I)⁻¹ k``: after it ``(W + Δ) k = W k + r`` (arXiv 2202.05262).

    One k throughout, that of u: a mixture with the key of another prompt makes edits that destroy the model
    (arXiv 2403.07175).

    Args:
        key: ``(d_in,)``.
        residual: ``(d_out,)``.
        moment: C, ``(d_in, d_in)``; ``c̃`` is the median of its diagonal (`regular`).
    """
    u: Tensor = torch.cholesky_solve(key[:, None], _factor(regular(moment, ridge)))[:, 0]
    return torch.outer(residual, u) / (u @ key)


def memit_update(m: Tensor, g: Tensor, moment: Tensor, weight: float, ridge: float = RIDGE) -> Tensor:
    """``Δ = M (λ (C + ridge c̃ I) + G)⁻¹`` (MEMIT, arXiv 2210.07229, there without a ridge).

    A text of 9,000 tokens uses hardly half of 1,536 directions. Keys of one subject in several questions differ by
    little, partly in the others, and what makes that difference true is as large as you like.

    Args:
        m, g: Summed statistics of the edits; the G of earlier ones may be added to g, which then stay.
        moment: C; ``c̃`` is the median of its diagonal (`regular`).
        weight: λ.

    Raises:
        EditError: The sum is not positive definite: what came is no sum of squares, or λ is too small.
    """
    return _right_divided(m, weight * regular(moment, ridge) + g)


def null_space(moment: Tensor, free: float) -> Tensor:
    """``U₀``, ``(d_in, q)``: the share ``free`` of all directions that the text uses least.

    AlphaEdit (arXiv 2410.02355) has an absolute threshold for eigenvalues in its place, which means another thing in
    every model. So does a share of the energy ``tr C``: an attention sink alone can hold 99.9 % of it. Directions are
    counted, and what few tokens do changes nothing.

    Raises:
        EditError: There is none.
    """
    count = int(free * len(moment))
    if not count:
        raise EditError(f"no direction is free: {free:g} of {len(moment)}", "leave more of them free")
    basis: Tensor = torch.linalg.eigh(moment)[1][:, :count]
    return basis


def asked_in(g: Tensor, free: Tensor, edits: int) -> float:
    """Mean ``‖U₀ᵀ k‖²`` of a batch's keys: the unit of AlphaEdit's ridge, for keys are of another size in every layer.

    Args:
        g: ``G = Kᵀ K`` of the batch.
        edits: How many keys it is of.
    """
    return float(((g @ free) * free).sum()) / max(1, edits)


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
    """The matrix with ``ridge`` of its median diagonal added to its diagonal.

    The median is that of what most features get: an attention sink raises a few, and with them the mean, a
    thousandfold.
    """
    return matrix + ridge * matrix.diagonal().median() * torch.eye(len(matrix), dtype=matrix.dtype)


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
