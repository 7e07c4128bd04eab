"""Merging adapters from sums alone, for those who show nobody their adapter: RegMean and Fisher from masked sums.

A participant sends two matrices for every map, which mean something only when everybody's are added up
(`potluck.aggregation.statistics.SummedStatistics`); the merge is one solve on the two sums. Who leaves is subtracted,
and the solve repeated.

=========  ====================  ====================
kind       PATH.weight           PATH.product
=========  ====================  ====================
`RegMean`  ``Σ Gᵢ``              ``Σ ΔWᵢ Gᵢ``
`Fisher`   ``Σ Fᵢ``              ``Σ Fᵢ ∘ ΔWᵢ``
=========  ====================  ====================
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import Adapter, Factors
from potluck.compose.merging import fisher, regmean
from potluck.compose.merging.fisher import Fisher, Information
from potluck.compose.merging.regmean import RegMean
from potluck.compose.merging.sketch import sketched

Method = RegMean | Fisher


def summands(adapter: Adapter, measured: Statistics, method: Method) -> Statistics:
    """What one participant sends, float64."""
    tensors: dict[str, Tensor] = {}
    for path, factors in adapter.modules.items():
        weight, product = _pair(factors, path, measured, method)
        tensors |= {f"{path}.weight": weight, f"{path}.product": product}
    return Statistics(_kind(method), tensors, measured.count, measured.base_hash)


def merged_from_sums(sums: Statistics, method: Method, rank: int, base: str = "", transposed: bool = False) -> Adapter:
    """The adapter of this rank nearest to the merge.

    Args:
        sums: Of everybody's `summands`.
        base: What the result says its base is.
        transposed: As in `Adapter`.

    Raises:
        ModelError: The Gram matrices leave directions open and there is no ridge.
        ValueError: Sums of another kind.
    """
    if sums.kind != _kind(method):
        raise ValueError(f"{sums.kind} statistics, not {_kind(method)}")
    modules = {}
    for name in sums.tensors:
        path, found, _ = name.rpartition(".weight")
        if found:
            merged = _solved(sums.tensors[name], sums.tensors[f"{path}.product"], method).float()
            modules[path] = sketched(partial(iter, [merged]), (merged.shape[0], merged.shape[1]), rank)
    return Adapter(modules, base, transposed, {"base_hash": sums.base_hash})


def gram_of(measured: Statistics, path: str, columns: int) -> Tensor:
    """One map's Gram matrix; zero from a participant who does not adapt it, and so has no say there."""
    gram = measured.tensors.get(f"{path}.gram")
    return torch.zeros(columns, columns, dtype=torch.float64) if gram is None else gram.double()


def information_of(measured: Statistics, path: str, factors: Factors) -> Information:
    """One map's Fisher information; zero from a participant who does not adapt it, and so has no say there."""
    rows = measured.tensors.get(f"{path}.rows", torch.zeros(factors.up.shape[0]))
    columns = measured.tensors.get(f"{path}.columns", torch.zeros(factors.down.shape[1]))
    return Information(rows.double() / measured.count, columns.double() / measured.count)


def _pair(factors: Factors, path: str, measured: Statistics, method: Method) -> tuple[Tensor, Tensor]:
    if isinstance(method, RegMean):
        gram = regmean.steadied(gram_of(measured, path, factors.down.shape[1]), method)
        return gram, factors.up.double() @ (factors.down.double() @ gram)
    precision = information_of(measured, path, factors).of(slice(None), method)
    return precision, precision * factors.delta()


def _solved(weight: Tensor, product: Tensor, method: Method) -> Tensor:
    return regmean.solved(weight, product) if isinstance(method, RegMean) else fisher.solved(weight, product)


def _kind(method: Method) -> str:
    return "regmean sums" if isinstance(method, RegMean) else "fisher sums"
