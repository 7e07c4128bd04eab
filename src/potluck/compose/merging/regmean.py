"""RegMean (Jin et al., arXiv 2212.09849): the linear map that fits every participant's outputs on its own inputs.

``min_W Σᵢ ‖(W − Wᵢ) Xᵢ‖²`` has the solution ``W = (Σ Wᵢ Gᵢ)(Σ Gᵢ)⁻¹`` with ``Gᵢ = Σ x xᵀ`` over participant i's inputs
to this map: two sums, and one solve. The base's part cancels, so that W may stand for ΔW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.adapter import Factors
from potluck.compose.low_rank import concatenated
from potluck.errors import ModelError, RecipeError


@dataclass(frozen=True)
class RegMean:
    """Needs every participant's Gram matrices.

    Attributes:
        ridge: Share of the mean of a Gram matrix's diagonal that is added to all of it: in directions that nobody's
            inputs have, the result is the mean.
        off_diagonal: Factor of what is not on the diagonal; below 1 where inputs are few.
    """

    ridge: float = 1e-6
    off_diagonal: float = 1.0

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise RecipeError(f"ridge {self.ridge:g}: must not be negative")
        if not 0 <= self.off_diagonal <= 1:
            raise RecipeError(f"off_diagonal {self.off_diagonal:g}: a factor from 0 to 1")


def regmean(parts: Sequence[Factors], grams: Sequence[Tensor], weights: Sequence[float], method: RegMean) -> Factors:
    """One linear map's adapters, merged without forming a product.

    ``Σ wᵢ Bᵢ Aᵢ Gᵢ`` has the factors ``[B₁ … B_N]`` and ``[w₁ A₁ G₁; …]``, and the solve acts on the latter alone.

    Args:
        grams: Gᵢ, ``(d_in, d_in)``. If all are zero, since no text ever reached this map, the result is the mean.

    Returns:
        Rank ``Σ rᵢ``.

    Raises:
        ModelError: The Gram matrices leave directions open and there is no ridge.
    """
    if not any(bool(gram.any()) for gram in grams):
        return concatenated(parts, [weight / sum(weights) for weight in weights])
    weighted = [weight * steadied(gram, method) for weight, gram in zip(weights, grams, strict=True)]
    moments = torch.cat([part.down.double() @ gram for part, gram in zip(parts, weighted, strict=True)])
    up = concatenated(parts, [1.0] * len(parts)).up
    return Factors(solved(sum(weighted, torch.zeros(())), moments).to(up.dtype), up)


def steadied(gram: Tensor, method: RegMean) -> Tensor:
    """A participant's Gram matrix as it enters the sum, float64."""
    gram = gram.double()
    diagonal = gram.diagonal()
    return method.off_diagonal * gram + torch.diag(
        (1 - method.off_diagonal) * diagonal + method.ridge * diagonal.mean()
    )


def solved(gram: Tensor, moments: Tensor) -> Tensor:
    """``moments · gram⁻¹`` by Cholesky, both sums over participants.

    Args:
        gram: ``(d_in, d_in)``, float64.
        moments: ``Σ Wᵢ Gᵢ``, or factors of it, ``(…, d_in)``, float64.

    Raises:
        ModelError: The Gram matrix is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ModelError("the inputs leave directions open, so that nothing decides the merge there", "raise the ridge")
    return torch.cholesky_solve(moments.T, lower).T
