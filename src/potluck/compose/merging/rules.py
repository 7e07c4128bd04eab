"""Rules that merge task vectors entry by entry: τᵢ = θᵢ − θ₀ of N models, or ΔWᵢ of N adapters.

A rule sees one tensor at a time, as row blocks of the stacked task vectors, ``(N, rows, columns)`` in float32, so that
neither a whole model nor an adapter's product is ever needed: `Rule.fit` may pass over all blocks of the tensor, to
find thresholds and scales, and returns what combines one block. How a tensor is cut into blocks changes nothing. A
vector is one row.

What is added to the base is τ of the tables below; wᵢ are the given weights, λ is ``scale``.

==================  ==================================================================================
`TaskArithmetic`    λ Σ wᵢ τᵢ (Ilharco et al., arXiv 2212.04089)
`MagnitudePruning`  λ Σ wᵢ trim(τᵢ): the largest entries of each
`Ties`              λ times the mean of those entries of trim(τᵢ) whose sign was elected (arXiv 2306.01708)
`DareLinear`        λ Σ wᵢ drop(τᵢ): entries dropped at random, the others divided by what was kept (arXiv 2311.03099)
`DareTies`          as `Ties`, with drop in place of trim
`Della`             as `DareTies`, with large entries of a row kept more often (arXiv 2406.11617)
`Sce`               entries of large variance, weighted by energy, whose sign was elected (arXiv 2408.07990)
==================  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from potluck.compose.merging.sparsity import Blocks, dropped, magnitude_ranks, magnitude_thresholds, trim_, uniform
from potluck.errors import RecipeError

Combine = Callable[[Tensor, int], Tensor]  # a block, which it may overwrite, and its first row: (rows, columns), new
Sign = Literal["total", "frequency"]
Divisor = Literal["weights", "count"]


class Rule(Protocol):
    """What merges task vectors: a frozen dataclass that holds its hyperparameters."""

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """Look at one tensor's task vectors, and say how a block of them is combined.

        Args:
            name: The tensor's name; with the seed it decides what is drawn.
            weights: wᵢ, ``(N,)``, float32.
            blocks: Row blocks, ``(N, rows, columns)`` each, float32; not to be changed, and valid until the next.
        """
        ...


def even_weights(rule: object, count: int) -> list[float]:
    """Weights where none are given: 1/N each, so that sums are means, or 1 each where a rule divides by N itself."""
    return [1.0 if getattr(rule, "divisor", None) == "count" else 1.0 / max(1, count)] * count


def merged(rule: Rule, name: str, weights: Tensor, deltas: Tensor) -> Tensor:
    """One tensor's task vectors, ``(N, rows, columns)`` whole in memory, merged to ``(rows, columns)``."""
    return rule.fit(name, weights, lambda: [deltas])(deltas.clone(), 0)


@dataclass(frozen=True)
class TaskArithmetic:
    """``λ Σ wᵢ τᵢ`` (arXiv 2212.04089)."""

    scale: float = 1.0

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        return lambda block, first_row: self.scale * _weighted_sum(weights, block)


@dataclass(frozen=True)
class MagnitudePruning:
    """``λ Σ wᵢ trim(τᵢ)``.

    Attributes:
        density: Share of each tensor's entries that stay: the largest. Of equals at the threshold all stay.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.density)

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        thresholds = magnitude_thresholds(blocks, self.density)
        return lambda block, first_row: self.scale * _weighted_sum(weights, trim_(block, thresholds))


@dataclass(frozen=True)
class Ties:
    """Trim, elect sign, disjoint mean (Yadav et al., arXiv 2306.01708).

    With one weight for all, "TIES" means one thing. With several it means two, and ``divisor`` chooses:

    - ``weights``, as mergekit: weights are votes. γ = sgn Σ wᵢ τᵢ, and what agrees is averaged with these weights,
      ``Σ wᵢ τᵢ [sgn τᵢ = γ] / Σ wᵢ [sgn τᵢ = γ]``. They must not be negative.
    - ``count``, as PEFT: weights only scale. γ = sgn Σ τᵢ, ``Σ wᵢ τᵢ [sgn τᵢ = γ] / Σ [sgn τᵢ = γ]``.

    Attributes:
        density: Share of each tensor's entries that stay: the largest. Of equals at the threshold all stay.
        sign: Elected by the sum of the entries (``total``) or of their signs (``frequency``); a tie elects plus.
    """

    density: float = 0.2
    sign: Sign = "total"
    divisor: Divisor = "weights"
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_choices(self.sign, self.divisor)

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        _check_votes(weights, self.divisor)
        thresholds = magnitude_thresholds(blocks, self.density)

        def combine(block: Tensor, first_row: int) -> Tensor:
            return self.scale * _disjoint_mean(trim_(block, thresholds), weights, self.sign, self.divisor)

        return combine


@dataclass(frozen=True)
class DareLinear:
    """``λ Σ wᵢ mᵢ τᵢ / p`` with ``mᵢ ~ Bernoulli(p)`` (Yu et al., arXiv 2311.03099).

    Attributes:
        density: p, the share of entries that stay.
        seed: With the tensor's name and the model's number it decides which; not how the tensor is cut.
    """

    density: float = 0.5
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.density)

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""

        def combine(block: Tensor, first_row: int) -> Tensor:
            kept = dropped(block, self.density, uniform(self.seed, name, block.shape, first_row))
            return self.scale * _weighted_sum(weights, kept)

        return combine


@dataclass(frozen=True)
class DareTies:
    """``mᵢ τᵢ / p`` as `DareLinear` draws it, then sign and mean as in `Ties`, whose ``divisor`` is explained there."""

    density: float = 0.5
    sign: Sign = "total"
    divisor: Divisor = "weights"
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_choices(self.sign, self.divisor)

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        _check_votes(weights, self.divisor)

        def combine(block: Tensor, first_row: int) -> Tensor:
            kept = dropped(block, self.density, uniform(self.seed, name, block.shape, first_row))
            return self.scale * _disjoint_mean(kept, weights, self.sign, self.divisor)

        return combine


@dataclass(frozen=True)
class Della:
    """Drop by magnitude, then sign and mean as in `Ties` (Deep et al., arXiv 2406.11617).

    An entry stays with probability ``p = density − ε + 2 ε rank / (columns − 1)``, its rank by magnitude within its
    row from 0, and is divided by p.

    Attributes:
        density: Mean share of a row's entries that stay.
        epsilon: ε, half of what the probabilities of the largest and the smallest differ by.
    """

    density: float = 0.5
    epsilon: float = 0.15
    sign: Sign = "total"
    divisor: Divisor = "weights"
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.density)
        _check_choices(self.sign, self.divisor)
        if not (self.epsilon >= 0 and self.density - self.epsilon > 0 and self.density + self.epsilon <= 1):
            raise RecipeError(
                f"density {self.density:g} with epsilon {self.epsilon:g}: both density - epsilon and density + epsilon"
                " are probabilities, above 0 and at most 1"
            )

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        _check_votes(weights, self.divisor)

        def combine(block: Tensor, first_row: int) -> Tensor:
            ranks = magnitude_ranks(block)  # 0 to 1
            keep = (self.density - self.epsilon) + 2 * self.epsilon * ranks
            kept = dropped(block, keep, uniform(self.seed, name, block.shape, first_row))
            return self.scale * _disjoint_mean(kept, weights, self.sign, self.divisor)

        return combine


@dataclass(frozen=True)
class Sce:
    """Select, calculate, erase (FuseChat, arXiv 2408.07990).

    Of a tensor's entries stay those whose variance over the models is largest; the models' coefficients are
    ``cᵢ ∝ wᵢ mean(τᵢ²)`` over what stays; sign ``γ = sgn Σ τᵢ``, and ``λ Σ cᵢ τᵢ [sgn τᵢ = γ] / Σ cᵢ [sgn τᵢ = γ]``.

    Attributes:
        select: Share of the entries that differ between the models which stays; 1 also keeps those that do not.
    """

    select: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_density(self.select, "select")

    def fit(self, name: str, weights: Tensor, blocks: Blocks) -> Combine:
        """As `Rule.fit`."""
        _check_votes(weights, "weights")
        least = torch.zeros(())
        if self.select < 1:
            (least,) = magnitude_thresholds(lambda: map(_variance, blocks()), self.select, nonzero=True)

        def selected(block: Tensor) -> Tensor:
            return block * (_variance(block) >= least) if self.select < 1 else block

        energy = sum((selected(block).double().square().sum((1, 2)) for block in blocks()), torch.zeros(()))
        coefficients = weights * (energy / energy.sum() if energy.sum() > 0 else torch.ones(())).float()

        def combine(block: Tensor, first_row: int) -> Tensor:
            kept = selected(block)
            signs = _elected(kept, torch.ones_like(weights))
            return self.scale * _mean_of_agreeing(kept, signs, coefficients, coefficients)

        return combine


RULES: Mapping[str, type[Rule]] = {
    "task_arithmetic": TaskArithmetic,
    "magnitude": MagnitudePruning,
    "ties": Ties,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "della": Della,
    "sce": Sce,
}


# --- what the rules are made of ------------------------------------------------------------------


def _weighted_sum(weights: Tensor, block: Tensor) -> Tensor:
    return torch.einsum("n,nrc->rc", weights, block)


def _variance(block: Tensor) -> Tensor:
    return block.var(dim=0, correction=0, keepdim=True)


def _disjoint_mean(kept: Tensor, weights: Tensor, sign: Sign, divisor: Divisor) -> Tensor:
    votes = weights if divisor == "weights" else torch.ones_like(weights)
    signs = _elected(kept if sign == "total" else kept.sign(), votes)
    return _mean_of_agreeing(kept, signs, weights, votes)


def _elected(ballots: Tensor, votes: Tensor) -> Tensor:
    """γ, plus or minus one for each entry: plus where the sum is zero."""
    return _weighted_sum(votes, ballots).sign_().add_(0.5).sign_()


def _mean_of_agreeing(kept: Tensor, signs: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """``Σ weightᵢ τᵢ [sgn τᵢ = γ] / Σ shareᵢ [sgn τᵢ = γ]``, zero where nothing agrees; ``kept`` is used up."""
    agreeing = kept.mul_(signs).clamp_(min=0)
    average = _weighted_sum(weights, agreeing).mul_(signs)
    return average.div_(_weighted_sum(shares, agreeing.sign_()).clamp_(min=torch.finfo(torch.float32).tiny))


def _check_density(density: float, name: str = "density") -> None:
    if not 0 < density <= 1:
        raise RecipeError(f"{name} {density:g}: a share above 0 and at most 1")


def _check_choices(sign: str, divisor: str) -> None:
    if sign not in get_args(Sign):
        raise RecipeError(f"sign {sign!r}: {' or '.join(get_args(Sign))}")
    if divisor not in get_args(Divisor):
        raise RecipeError(f"divisor {divisor!r}: {' or '.join(get_args(Divisor))}")


def _check_votes(weights: Tensor, divisor: Divisor) -> None:
    if divisor == "weights" and bool((weights < 0).any() or weights.sum() <= 0):
        raise RecipeError("a weight is negative, but the weights are votes", "subtract with task_arithmetic")
