"""Which adapters are alike, and groups of them (MBC of Ostapenko et al., arXiv 2405.11157).

The paper compares flattened factors. That depends on the gauge: ``(B G⁻¹)(G A)`` is the same adapter and another
vector. Here products are compared, which no gauge changes; so that participants need no common start. The rest is as
in the paper's code: k-means on the rows of the matrix of cosines, so that adapters are alike if they are alike to the
same others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from potluck.compose.adapter import Adapter
from potluck.compose.merging.lego import kmeans
from potluck.errors import ModelError, RecipeError


def cluster_adapters(adapters: Mapping[str, Adapter], k: int, seed: int = 0) -> dict[str, int]:
    """Each adapter's group, 0 to k − 1, counted in the order in which the groups first appear.

    Raises:
        RecipeError: k is less than 1 or more than there are adapters.
        ModelError: Adapters do not fit each other, or one adds nothing.
    """
    if not 1 <= k <= len(adapters):
        raise RecipeError(f"{k} groups of {len(adapters)} adapters", "choose at least 1, at most one for each adapter")
    cosines = similarity(adapters)
    labels = kmeans(cosines @ cosines.T, k, torch.Generator().manual_seed(seed)).tolist()
    renumbered = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return {name: renumbered[label] for name, label in zip(adapters, labels, strict=True)}


def similarity(adapters: Mapping[str, Adapter]) -> Tensor:
    """Cosines between adapters as vectors of all their ΔW, float64 ``(N, N)``.

    ``⟨ΔW_i, ΔW_j⟩ = tr((B_iᵀ B_j)(A_j A_iᵀ))``, summed over linear maps, exact and without forming a product. A map
    that an adapter does not have is zero.

    Raises:
        ModelError: Adapters do not fit each other, or one adds nothing.
    """
    names = list(adapters)
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules):
        having = [number for number, name in enumerate(names) if path in adapters[name].modules]
        parts = [adapters[names[number]].modules[path] for number in having]
        if len({(part.down.shape[1], part.up.shape[0]) for part in parts}) > 1:
            raise ModelError(f"{path}: the adapters are of different shapes", "are they of one base?")
        down = torch.cat([part.down for part in parts]).double()
        up = torch.cat([part.up.T for part in parts]).double()
        owner = torch.tensor(having).repeat_interleave(torch.tensor([part.rank for part in parts]))
        by_rank = (up @ up.T) * (down @ down.T)
        by_row = by_rank.new_zeros(len(names), len(owner)).index_add_(0, owner, by_rank)
        products.index_add_(1, owner, by_row)
    norms = products.diagonal().clamp_min(0).sqrt()
    if not (norms > 0).all():
        raise ModelError(f"{names[int(norms.argmin())]}: adds nothing to the base", "leave it out")
    return products / norms / norms[:, None]
