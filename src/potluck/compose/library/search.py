"""Which entries a text is like, and in what proportion.

**Nearest**: the distance between mean embeddings, ``‖μ_entry − μ_text‖`` (maximum mean discrepancy; Gretton et al.,
2012). A thousand specifications are searched in two steps: random Fourier features (Rahimi and Recht, 2007) of every
mean embedding rank all of them roughly, and the kernel itself the few best.

**Mixture**: shares by maximum likelihood, each entry's points taken as a density that is some twenty times as sharp as
the kernel (Saerens et al., "Adjusting the outputs of a classifier to new a priori probabilities", 2002). Matching mean
embeddings (`nearest_mixture`), as learnware markets do, is less than half as accurate: so wide a kernel sees little
more of a text than the mean of its windows, and a sharp one nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.library.simplex import nearest_mixture
from potluck.compose.library.specification import Specification, kernel

CANDIDATES = 25
ALIKE, UNLIKE = 0.45, 0.9  # of the distance that usually lies between entries; measured in benchmarks/library.py
_SHARPNESS = 20.0
_SAMPLED = 1000  # points, to see how far they lie apart
_LEAST_SHARE = 0.02
_EM_ROUNDS = 500
_FREQUENCIES = 512
_TOGETHER = 10  # entries of a mixture by random features
_SEED = 0


@dataclass(frozen=True)
class Index:
    """All specifications of a library, stacked.

    Attributes:
        points: ``(N, K, d)``; specifications with fewer points are filled up with points of no weight.
        weights: ``(N, K)``.
        noise: What their noise adds to a squared distance, ``σ² d``, ``(N,)``.
        energies: ``‖μ_i‖²``, ``(N,)``.
        frequencies: Ω of the random Fourier features, ``(d, F)``.
        features: Mean features of every specification, ``(N, 2F)``.
        gamma: Of the kernel.
        sharpness: Of the densities: 20 over the median of ``‖z − z'‖²`` among the entries' points. (Twenty times γ is
            not the same: a base that has learned little writes text that is unlike any real one.)
    """

    names: Sequence[str]
    points: Tensor
    weights: Tensor
    noise: Tensor
    energies: Tensor
    frequencies: Tensor
    features: Tensor
    gamma: float
    sharpness: float


@dataclass(frozen=True)
class Match:
    """An entry that was found.

    Attributes:
        distance: ``‖μ_entry − μ_text‖``, from 0 to √2.
        share: Of the text, in a mixture.
    """

    name: str
    distance: float
    share: float = 1.0


def index_of(specifications: Mapping[str, Specification], gamma: float) -> Index:
    """Stack specifications for searching.

    Raises:
        ValueError: There are none.
    """
    names = sorted(specifications)
    longest = max(len(specifications[name].weights) for name in names)
    dimension = specifications[names[0]].points.shape[1]
    points, weights = torch.zeros(len(names), longest, dimension), torch.zeros(len(names), longest)
    for row, name in enumerate(names):
        count = len(specifications[name].weights)
        points[row, :count], weights[row, :count] = specifications[name].points, specifications[name].weights
    draw = torch.Generator().manual_seed(_SEED)
    frequencies = math.sqrt(2 * gamma) * torch.randn(dimension, _FREQUENCIES, generator=draw)
    energies = torch.stack([w @ kernel(z, z, gamma) @ w for z, w in zip(points, weights, strict=True)])
    features = torch.stack([w @ _features(z, frequencies) for z, w in zip(points, weights, strict=True)])
    noise = torch.tensor([dimension * specifications[name].noise ** 2 for name in names])
    some = points[weights > 0]
    some = some[:: math.ceil(len(some) / _SAMPLED)]
    between = torch.nn.functional.pdist(some).square().median() if len(some) > 1 else torch.tensor(1 / gamma)
    sharpness = _SHARPNESS / max(1e-6, float(between))
    return Index(names, points, weights, noise, energies, frequencies, features, gamma, sharpness)


def nearest(index: Index, states: Tensor, top: int = 5, candidates: int | None = CANDIDATES) -> list[Match]:
    """The entries nearest to a text, best first.

    ``‖μ_i − μ‖² = ‖μ_i‖² − 2 ⟨μ_i, μ⟩ + ‖μ‖²``, the last without bias, so that more text brings no one nearer.

    Args:
        states: The text's, ``(n, d)``, from `Yardstick.measure`.
        candidates: How many are compared by the kernel itself; ``None`` for all.
    """
    count = len(index.names)
    chosen = torch.arange(count) if candidates is None else _roughly_nearest(index, states, max(top, candidates))
    squares = index.energies[chosen] - 2 * _overlaps(index, chosen, states) + _energy(states, index.gamma)
    return [Match(index.names[int(chosen[i])], _root(squares[i])) for i in squares.argsort()[:top]]


def mixture(index: Index, states: Tensor, candidates: int = CANDIDATES) -> list[Match]:
    """Which entries a text is mixed of, and their shares, largest first; what has less than 2% is left out.

    ``argmax_w Σ_x log Σ_i w_i p_i(x)`` with ``p_i(x) = Σ_j β_ij exp(−s ‖x − z_ij‖²)``, less what noise adds to
    the square: concave, by expectation maximisation. It is over the entries that are nearest alone, and those of the
    nearest mixture, by random features.

    Args:
        states: The text's, ``(n, d)``, from `Yardstick.measure`.
    """
    alone, together = _roughly_nearest(index, states, candidates), _roughly_together(index, states)
    chosen = torch.cat([alone, together]).unique()
    densities = _densities(index, chosen, states)
    shares = _proportions(densities)
    kept = shares >= min(_LEAST_SHARE, float(shares.max()))
    shares, chosen = _proportions(densities[:, kept]), chosen[kept]
    squares = index.energies[chosen] - 2 * _overlaps(index, chosen, states) + _energy(states, index.gamma)
    order = shares.argsort(descending=True)
    return [Match(index.names[int(chosen[i])], _root(squares[i]), float(shares[i])) for i in order]


def closeness(index: Index, best: Match) -> float | None:
    """The distance of a match as a fraction of what lies between its entry and others: the median of at most 25.

    ``None`` if there are fewer than two others to tell by.
    """
    row = index.names.index(best.name)
    others = [i for i in range(len(index.names)) if i != row]
    if len(others) < 2:
        return None
    some = torch.tensor(others[:: math.ceil(len(others) / CANDIDATES)])
    between = kernel(index.points[some].flatten(0, 1), index.points[row], index.gamma) @ index.weights[row]
    overlaps = (index.weights[some] * between.view(len(some), -1)).sum(1)
    squares = index.energies[some] + index.energies[row] - 2 * overlaps
    return best.distance / max(1e-6, float(squares.clamp_min(0).sqrt().median()))


def verdict(ratio: float | None) -> str | None:
    """What a closeness says: ``alike``, ``related`` (such as another project of the field), or ``unlike``."""
    if ratio is None:
        return None
    return "alike" if ratio < ALIKE else "related" if ratio < UNLIKE else "unlike"


def _roughly_nearest(index: Index, states: Tensor, count: int) -> Tensor:
    """Places of the nearest by random features."""
    rough = index.energies - 2 * index.features @ _mean_features(index, states)
    return rough.argsort()[:count]


def _roughly_together(index: Index, states: Tensor) -> Tensor:
    """Places of the nearest mixture by random features: each the one along which the distance falls most."""
    target = _mean_features(index, states).double()
    chosen = [int(_roughly_nearest(index, states, 1))]
    mixed = index.features[chosen[0]].double()
    while len(chosen) < _TOGETHER:
        place = int((index.features @ (mixed - target).float()).argmin())
        if place in chosen:
            break
        chosen.append(place)
        picked = index.features[chosen].double()
        mixed = nearest_mixture(picked @ picked.T, picked @ target) @ picked
    return torch.tensor(chosen)


def _features(x: Tensor, frequencies: Tensor) -> Tensor:
    """``√(1/F) [cos xΩ, sin xΩ]``, whose inner products approach the kernel's, ``(n, 2F)``."""
    phases = x @ frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=1) / math.sqrt(frequencies.shape[1])


def _mean_features(index: Index, states: Tensor) -> Tensor:
    return _features(states, index.frequencies).mean(0)


def _overlaps(index: Index, chosen: Tensor, states: Tensor) -> Tensor:
    """``⟨μ_i, μ⟩`` for chosen entries."""
    weights = index.weights[chosen]
    means = kernel(index.points[chosen].flatten(0, 1), states, index.gamma).mean(1)
    return (weights * means.view(weights.shape)).sum(1)


def _energy(states: Tensor, gamma: float) -> Tensor:
    """``‖μ‖²`` of what the states are drawn from, without bias: no state is compared with itself."""
    count = len(states)
    if count < 2:
        return torch.tensor(1.0)
    return (kernel(states, states, gamma).sum() - count) / (count * (count - 1))


def _densities(index: Index, chosen: Tensor, states: Tensor) -> Tensor:
    """``p_i(x)`` up to a common factor, float64 ``(n, chosen)``."""
    weights, points = index.weights[chosen], index.points[chosen].flatten(0, 1)
    squares = torch.cdist(states, points).square().view(len(states), *weights.shape) - index.noise[chosen, None]
    near = squares.clamp_min(0).mul(-index.sharpness).exp()
    return (near * weights).sum(2).double() + 1e-30


def _proportions(densities: Tensor) -> Tensor:
    """Maximum-likelihood shares of a mixture of known densities ``(n, N)``, by expectation maximisation."""
    shares = torch.full((densities.shape[1],), 1 / densities.shape[1], dtype=torch.float64)
    for _ in range(_EM_ROUNDS):
        parts = densities * shares
        new = (parts / parts.sum(1, keepdim=True)).mean(0)
        if (new - shares).abs().max() < 1e-6:
            break
        shares = new
    return new


def _root(square: Tensor) -> float:
    return math.sqrt(max(0.0, float(square)))
