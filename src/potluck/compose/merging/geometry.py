"""Methods that give each model one coefficient per tensor, found from the angles and norms between the models.

All are rules as in `potluck.compose.merging.rules`, and need no more of a tensor than its Gram matrix
``Gᵢⱼ = ⟨xᵢ, xⱼ⟩``, one pass over its blocks: what is averaged lies in the span of the models, so the averaging is done
on coefficients. The vectors x are the models' weights, or task vectors where a base is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.merging.rules import Combine
from potluck.compose.merging.sparsity import Blocks
from potluck.errors import RecipeError

_NEARLY_PARALLEL = 0.9995  # there the angle is too small to divide by its sine


@dataclass(frozen=True)
class Linear:
    """The weighted mean, ``Σ wᵢ xᵢ / Σ wᵢ``: a model soup (arXiv 2203.05482)."""

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        return _combination(_shares(weights))


@dataclass(frozen=True)
class Slerp:
    """Of two models, along the great circle (Shoemake, 1985).

    ``[sin((1 − t) ω) x₁ + sin(t ω) x₂] / sin ω`` with ``cos ω = ⟨x₁, x₂⟩ / ‖x₁‖‖x₂‖`` and ``t = w₂ / (w₁ + w₂)``;
    a straight line where ``|cos ω| > 0.9995`` or one of them is zero.
    """

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        if len(weights) != 2:
            raise RecipeError(f"slerp merges two models, not {len(weights)}", "multislerp merges any number")
        t = _shares(weights)[1].item()
        products = gram(blocks)
        cosine = _cosines(products)[0, 1].item()
        if abs(cosine) > _NEARLY_PARALLEL or products.diagonal().min() == 0:
            return _combination(torch.tensor([1 - t, t]))
        angle = math.acos(cosine)
        parts = [math.sin((1 - t) * angle), math.sin(t * angle)]
        return _combination(torch.tensor(parts) / math.sin(angle))


@dataclass(frozen=True)
class MultiSlerp:
    """SLERP of any number: the Karcher mean of the directions, times the mean norm.

    With unit vectors uᵢ and weights that sum to one, the point m of the unit sphere with ``Σ wᵢ log_m(uᵢ) = 0``, found
    by ``m ← exp_m(Σ wᵢ log_m(uᵢ))`` from the direction of ``Σ wᵢ uᵢ``; the result is ``(Σ wᵢ ‖xᵢ‖) m``. For two models
    of one norm it is their SLERP.
    Where the directions have no mean, since all x are zero or cancel out, it is the weighted mean ``Σ wᵢ xᵢ``: a tensor
    that nobody changed stays the base's. (mergekit's ``multislerp`` takes no step from the start and refuses these; its
    ``karcher`` is this.)

    Attributes:
        steps: At most; it stops when a step is shorter than 1e-9.
    """

    steps: int = 100

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise RecipeError(f"steps {self.steps}: must not be negative")

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        shares, products = _shares(weights), gram(blocks)
        norms = products.diagonal().sqrt()
        cosines = _cosines(products)
        mean = _unit(shares, cosines)
        if mean is None:  # all are zero, or opposite directions are all alike near: the straight line, as `Slerp`
            return _combination(shares)
        for _ in range(self.steps):
            mean, length = _karcher_step(mean, shares, cosines)
            if length < 1e-9:
                break
        directions = torch.where(norms > 0, mean / norms, 0)
        return _combination((shares * norms).sum() * directions)


@dataclass(frozen=True)
class ModelStock:
    """``θ₀ + t · mean(τᵢ)``, with t from the mean cosine between task vectors (Jang et al., arXiv 2403.19522).

    ``t = N cos / (1 + (N − 1) cos)``, the foot of the perpendicular from the centre that fine-tuned models lie around.
    A tensor whose task vectors point apart (a cosine of zero or less) stays the base's.
    """

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        count = len(weights)
        if count < 2 or not torch.equal(weights, weights[:1].expand(count)):
            raise RecipeError("model_stock averages two models or more evenly", "leave out the weights")
        cosines = _cosines(gram(blocks))
        cosine = (cosines.sum() - cosines.trace()).item() / (count * (count - 1))
        t = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
        return _combination(torch.full((count,), t / count))


@dataclass(frozen=True)
class DeltaGuided:
    """``θ₀ + Σ cᵢ τᵢ`` with ``cᵢ ∝ wᵢ ‖τᵢ‖^q`` for each tensor: who moved it further says more about it.

    Our reading of CoDiEmb's hierarchical fusion (arXiv 2508.11442), whose closed form is not published.

    Attributes:
        power: q; 0 is the weighted mean.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 16:
            raise RecipeError(f"power {self.power:g}: from 0 to 16")

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        norms = gram(blocks).diagonal().sqrt()
        moved = (norms / norms.max().clamp(min=1e-300)) ** self.power
        pulls = weights * moved
        return _combination(_shares(pulls if pulls.sum() > 0 else weights))


def gram(blocks: Blocks) -> Tensor:
    """``⟨xᵢ, xⱼ⟩`` over all blocks, ``(N, N)``, float64."""
    flat = (block.flatten(1).double() for block in blocks())
    first = next(flat)
    return sum((rows @ rows.T for rows in flat), first @ first.T)


def _combination(coefficients: Tensor) -> Combine:
    numbers = coefficients.float()
    return lambda block, first_row: torch.einsum("n,nrc->rc", numbers, block)


def _shares(weights: Tensor) -> Tensor:
    """Weights that sum to one, float64."""
    if (weights < 0).any() or weights.sum() <= 0:
        raise RecipeError("a mean needs weights that are not negative, and not all zero")
    return weights.double() / weights.double().sum()


def _cosines(products: Tensor) -> Tensor:
    """Zero with a vector that is zero."""
    norms = products.diagonal().sqrt()
    lengths = norms[:, None] * norms
    return torch.where(lengths > 0, products / lengths, 0).clamp(-1, 1)


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients of the direction of ``Σ cᵢ uᵢ``, if it has one."""
    length = (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
    return coefficients / length if length > 1e-6 else None


def _karcher_step(mean: Tensor, shares: Tensor, cosines: Tensor) -> tuple[Tensor, float]:
    """``m ← exp_m(v)``, ``v = Σ wᵢ log_m(uᵢ)``, on coefficients; and the length of v.

    ``log_m(u) = θ / sin θ · (u − cos θ m)`` with ``cos θ = ⟨m, u⟩``; a vector that is zero pulls nowhere.
    """
    toward = (cosines @ mean).clamp(-1, 1)
    angles, sines = toward.acos(), (1 - toward.square()).sqrt()
    pulls = shares * torch.where(sines > 1e-6, angles / sines, 1) * cosines.diagonal()
    step = pulls - (pulls * toward).sum() * mean
    length = (step @ cosines @ step).clamp(min=0).sqrt().item()
    moved = math.cos(length) * mean + (math.sin(length) / length if length > 0 else 1.0) * step
    return moved / (moved @ cosines @ moved).sqrt(), length
