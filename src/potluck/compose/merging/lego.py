"""LoRA-LEGO (Zhao et al., arXiv 2409.16167): adapters taken apart into rank-one units, and built again from clusters.

Steps of the paper are from its abstract and its reviews; the gauge, without which rows of two adapters' factors compare
nothing, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from potluck.compose.adapter import Factors
from potluck.compose.low_rank import canonical, concatenated

_RESTARTS = 4
_ITERATIONS = 50


@dataclass(frozen=True)
class Lego:
    """k clusters of minimal semantic units ``[row of A, column of B]`` become k units.

    Attributes:
        reweight_parameters: A centre gets the mean norm of its cluster, which averaging has shortened.
        reweight_output: A unit is multiplied by ``√(r / k)``, r the mean rank, so that what is added keeps its size.
        seed: Of k-means++.
    """

    reweight_parameters: bool = True
    reweight_output: bool = True
    seed: int = 0


def lego(parts: Sequence[Factors], clusters: int, method: Lego) -> Factors:
    """One linear map's adapters, merged.

    With as many clusters as units and both reweightings the result is the mean of the products, exactly.

    Args:
        clusters: k, the rank of the result; where there are fewer units, all stay.
    """
    fixed = [canonical(part) for part in parts if part.rank]
    units = concatenated(fixed, [1.0] * len(fixed))
    down, up = units.down.double(), units.up.double()
    gram = down @ down.T + up.T @ up
    labels = kmeans(gram, min(clusters, units.rank), torch.Generator().manual_seed(method.seed))
    average = _averaging(labels)
    scale = torch.ones(len(average), dtype=torch.float64)
    if method.reweight_parameters:
        before, after = average @ gram.diagonal().sqrt(), _norms(average, gram)
        scale *= torch.where(after > 1e-9 * before, before / after, 1.0)  # opposite units leave a centre of zero
    if method.reweight_output:
        scale *= (units.rank / len(parts) / len(average)) ** 0.5
    merge = scale[:, None] * average
    return Factors((merge @ down).float(), (up @ merge.T).float())


def kmeans(gram: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii, 2007), the best of four starts.

    Distances follow from inner products alone, ``‖xᵢ − μ_j‖² = Gᵢᵢ − 2 (G aⱼ)ᵢ + aⱼᵀ G aⱼ`` with ``μ_j = Σ aⱼᵢ xᵢ``, so
    an iteration costs O(n² k) whatever the length of x.

    Args:
        gram: Inner products of n points, float64 ``(n, n)``.

    Returns:
        Each point's cluster, ``(n,)``; every cluster has a point.
    """
    found = [_lloyd(gram, _seeds(gram, k, draw)) for _ in range(_RESTARTS)]
    return min(found, key=lambda labels: _spread(gram, labels))


def _seeds(gram: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """Points, each drawn with probability proportional to its squared distance from those before it, ``(k,)``."""
    squares, n = gram.diagonal(), len(gram)
    chosen = torch.randint(n, (1,), generator=draw)
    nearest = torch.full((n,), torch.inf, dtype=gram.dtype)
    while len(chosen) < k:
        last = int(chosen[-1])
        nearest = nearest.minimum((squares - 2 * gram[last] + squares[last]).clamp(min=0))
        nearest[chosen] = 0
        others = torch.ones(n, dtype=gram.dtype).index_fill(0, chosen, 0)  # who is left if all coincide
        chance = nearest + others * (1e-12 * squares.max() + 1e-300)
        chosen = torch.cat([chosen, torch.multinomial(chance, 1, generator=draw)])
    return chosen


def _lloyd(gram: Tensor, seeds: Tensor) -> Tensor:
    centres = one_hot(seeds, len(gram)).to(gram.dtype)
    labels = torch.full((len(gram),), -1)
    for _ in range(_ITERATIONS):
        distances = gram.diagonal()[:, None] - 2 * gram @ centres.T + _norms(centres, gram).square()
        before, labels = labels, _filled(distances)
        if torch.equal(labels, before):
            break
        centres = _averaging(labels)
    return labels


def _filled(distances: Tensor) -> Tensor:
    """The nearest centre of each point; a centre without any takes the farthest point of a cluster that has several."""
    nearest, labels = distances.min(dim=1)
    counts = labels.bincount(minlength=distances.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():
        point = int(torch.where(counts[labels] > 1, nearest, -torch.inf).argmax())
        counts[labels[point]] -= 1
        counts[empty] += 1
        labels[point] = empty
    return labels


def _averaging(labels: Tensor) -> Tensor:
    """Rows a_j that average each cluster's points, ``(k, n)``."""
    members = one_hot(labels).T.double()
    return members / members.sum(dim=1, keepdim=True)


def _norms(centres: Tensor, gram: Tensor) -> Tensor:
    return ((centres @ gram) * centres).sum(dim=1).clamp(min=0).sqrt()


def _spread(gram: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the centres."""
    average = _averaging(labels)
    counts = labels.bincount()
    return float(gram.trace() - (counts * _norms(average, gram).square()).sum())
