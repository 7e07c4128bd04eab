"""Merging adapters: everything is done to their products, so that ranks, scalings and gauges may differ.

What an adapter does not adapt, it adds nothing to. `ADAPTER_METHODS` are the methods:

===================  ==============================================================================
`Sum`                ``Σ wᵢ ΔWᵢ`` exactly, of rank ``Σ rᵢ``
`TruncatedSvd`       the same, nearest of a given rank
`Lego`               units of all adapters, clustered (`potluck.compose.merging.lego`)
`RegMean`, `Fisher`  weighted by what the participants measured (`potluck.compose.statistics`)
rules                entry by entry (`potluck.compose.merging.rules`), then nearest of a given rank
===================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import Adapter, Factors
from potluck.compose.low_rank import concatenated, truncated
from potluck.compose.merging.fisher import Fisher, fisher_mean
from potluck.compose.merging.lego import Lego, lego
from potluck.compose.merging.regmean import RegMean, regmean
from potluck.compose.merging.rules import RULES, Combine, Rule, even_weights
from potluck.compose.merging.sketch import products, sketched
from potluck.compose.merging.summed import gram_of, information_of
from potluck.errors import ModelError, RecipeError


@dataclass(frozen=True)
class Sum:
    """``Σ wᵢ ΔWᵢ`` exactly, of rank ``Σ rᵢ``, by concatenation; weights are 1 if none are given."""


@dataclass(frozen=True)
class TruncatedSvd:
    """``Σ wᵢ ΔWᵢ``, the nearest of a given rank (Eckart and Young, 1936).

    Attributes:
        energy: Each map takes the least rank that keeps this share of the squared singular values.
    """

    energy: float | None = None

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy {self.energy:g}: a share above 0 and at most 1")


Method = Sum | TruncatedSvd | Lego | RegMean | Fisher | Rule
ADAPTER_METHODS: Mapping[str, type[Method]] = {
    "sum": Sum,
    "svd": TruncatedSvd,
    "lego": Lego,
    "regmean": RegMean,
    "fisher": Fisher,
    **RULES,
}
MEASURED: Mapping[type[Method], str] = {RegMean: "gram", Fisher: "fisher"}  # the statistics that a method needs


def merge_adapters(
    adapters: Sequence[Adapter],
    method: Method,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    statistics: Sequence[Statistics] = (),
) -> Adapter:
    """One adapter from several of the same base.

    Args:
        weights: wᵢ. If left out: 1 each for `Sum` and where a rule divides by the number of adapters itself, else 1/N.
        rank: Of the result, at most; the largest of the adapters' if left out.
        statistics: Each participant's, for `RegMean` and `Fisher`.

    Raises:
        ModelError: The adapters are of different bases or shapes, or the statistics do not belong to them.
        RecipeError: The method has no use for what is given, or cannot do without what is not.
    """
    _check_together(adapters)
    _check_settings(len(adapters), method, weights, rank)
    _check_statistics(adapters, method, statistics)
    shares = list(weights or default_weights(method, len(adapters)))
    at_most = sum if getattr(method, "energy", None) else max
    limit = rank or at_most(adapter.rank for adapter in adapters)
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.modules)
    modules = {path: _merged(method, path, adapters, statistics, shares, limit) for path in paths}
    base = next((adapter.base for adapter in adapters if adapter.base), "")
    return Adapter(modules, base, adapters[0].transposed, _about(adapters, method, shares))


def default_weights(method: Method, count: int) -> list[float]:
    """Weights where none are given."""
    return [1.0] * count if isinstance(method, Sum) else even_weights(method, count)


# --- one linear map ------------------------------------------------------------------------------


def _merged(
    method: Method,
    path: str,
    adapters: Sequence[Adapter],
    statistics: Sequence[Statistics],
    weights: Sequence[float],
    rank: int,
) -> Factors:
    parts = _aligned(adapters, path)
    rows, columns = parts[0].up.shape[0], parts[0].down.shape[1]
    match method:
        case Sum():
            return concatenated(parts, weights)
        case TruncatedSvd(energy=energy):
            return truncated(concatenated(parts, weights), rank, energy)
        case Lego():
            return lego(parts, rank, method)
        case RegMean():
            grams = [gram_of(measured, path, columns) for measured in statistics]
            return truncated(regmean(parts, grams, weights, method), rank)
        case Fisher():
            known = [information_of(measured, path, parts[0]) for measured in statistics]
            return sketched(lambda: fisher_mean(parts, known, weights, method), (rows, columns), rank)
        case _:
            combine = method.fit(path, torch.tensor(weights), lambda: products(parts))
            return sketched(lambda: _combined(combine, products(parts)), (rows, columns), rank)


def _combined(combine: Combine, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    first_row = 0
    for block in blocks:
        yield combine(block, first_row)
        first_row += block.shape[1]


def _aligned(adapters: Sequence[Adapter], path: str) -> list[Factors]:
    """Every adapter's factors of one map; who does not adapt it has none, of rank zero."""
    some = next(adapter.modules[path] for adapter in adapters if path in adapter.modules)
    nothing = Factors(some.down[:0], some.up[:, :0])
    return [adapter.modules.get(path, nothing) for adapter in adapters]


def _about(adapters: Sequence[Adapter], method: Method, weights: Sequence[float]) -> dict[str, Any]:
    name = next(name for name, kind in ADAPTER_METHODS.items() if isinstance(method, kind))
    hashes = [adapter.about["base_hash"] for adapter in adapters if "base_hash" in adapter.about]
    base = {"base_hash": hashes[0]} if hashes else {}
    return {"method": name, "settings": dict(vars(method)), "weights": list(weights), **base}


# --- what is refused -----------------------------------------------------------------------------


def _check_together(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise ModelError("there is no adapter to merge")
    hashes = {adapter.about["base_hash"] for adapter in adapters if adapter.about.get("base_hash")}
    named = {adapter.base for adapter in adapters if adapter.base}
    everybodys_hash = all(adapter.about.get("base_hash") for adapter in adapters)
    if len(hashes) > 1 or (len(named) > 1 and not everybodys_hash):
        hint = "if it is one base by several names, let base_model_name_or_path in adapter_config.json agree"
        raise ModelError(f"the adapters are of different bases: {', '.join(sorted(named or hashes))}", hint)
    if len({adapter.transposed for adapter in adapters}) > 1:
        raise ModelError("one adapter is for maps stored transposed (fan_in_fan_out), another is not")
    forms: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for path, factors in adapter.modules.items():
            form = (factors.up.shape[0], factors.down.shape[1])
            if forms.setdefault(path, form) != form:
                raise ModelError(f"{path}: one adapter adds {form[0]} x {form[1]}, another {forms[path]}")


def _check_settings(count: int, method: Method, weights: Sequence[float] | None, rank: int | None) -> None:
    if weights is not None:
        if isinstance(method, Lego):
            raise RecipeError("LoRA-LEGO knows no weights", "scale the adapters, or merge them with svd")
        if len(weights) != count or not all(isfinite(weight) for weight in weights) or not any(weights):
            raise RecipeError(f"{count} adapters need as many finite weights, not all zero")
        if isinstance(method, RegMean | Fisher) and min(weights) < 0:
            raise RecipeError("a weight is negative, but here weights are shares", "subtract with svd or sum")
    if rank is not None and (isinstance(method, Sum) or rank < 1):
        raise RecipeError("sum keeps every rank" if isinstance(method, Sum) else "the rank must be positive", "use svd")


def _check_statistics(adapters: Sequence[Adapter], method: Method, statistics: Sequence[Statistics]) -> None:
    kind = MEASURED.get(type(method))
    if kind is None and statistics:
        raise RecipeError("the method has no use for statistics", "they are for regmean and fisher")
    if kind and (len(statistics) != len(adapters) or any(known.kind != kind for known in statistics)):
        raise RecipeError(f"the method needs the {kind} statistics of every adapter", "see potluck.compose.statistics")
    if len({known.base_hash for known in statistics}) > 1:
        raise ModelError("the statistics were measured on different bases")
