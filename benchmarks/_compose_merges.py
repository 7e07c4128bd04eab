"""One adapter out of ten, of one rank: our methods and PEFT's, each at its best setting."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._silos import Stage
from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import Adapter, Factors, load_adapter, save_adapter
from potluck.compose.lora import attached
from potluck.compose.merging.adapters import Method, Sum, TruncatedSvd, merge_adapters
from potluck.compose.merging.fisher import Fisher
from potluck.compose.merging.lego import Lego
from potluck.compose.merging.regmean import RegMean
from potluck.compose.merging.rules import DareLinear, DareTies, Della, MagnitudePruning, Sce, Ties
from potluck.compose.training import loss_on

Losses = dict[str, float]
# Times what the method gives with weights 1/N: rules that divide by who agrees give more than a mean.
SCALES = (0.1, 0.2, 0.35, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
OURS: Mapping[str, Sequence[Method]] = {
    "sum": (Sum(),),
    "svd": (TruncatedSvd(),),
    "lego": (Lego(),),
    "ties": (Ties(density=0.2), Ties(density=0.5)),
    "dare_linear": (DareLinear(density=0.5), DareLinear(density=0.8)),
    "dare_ties": (DareTies(density=0.5), DareTies(density=0.8)),
    "della": (Della(density=0.5), Della(density=0.8)),
    "sce": (Sce(),),
    "magnitude": (MagnitudePruning(density=0.2), MagnitudePruning(density=0.5)),
    "regmean": (RegMean(),),
    "fisher": (Fisher(),),
}
PEFT: Mapping[str, Sequence[dict[str, Any]]] = {
    "linear": ({},),
    "ties": ({"density": 0.2}, {"density": 0.5}),
    "dare_linear": ({"density": 0.5}, {"density": 0.8}),
    "dare_ties": ({"density": 0.5}, {"density": 0.8}),
    "magnitude_prune": ({"density": 0.5}, {"density": 0.8}),
    "svd": ({},),
    "ties_svd": ({"density": 0.2}, {"density": 0.5}),
    "dare_linear_svd": ({"density": 0.5},),
    "dare_ties_svd": ({"density": 0.5},),
    "magnitude_prune_svd": ({"density": 0.5},),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: the losses on everybody's held-out text, and the setting that was chosen."""

    method: str
    rank: int | None
    setting: str
    losses: Losses

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))


def losses(stage: Stage, streams: Mapping[str, np.ndarray], length: int, device: str) -> Losses:
    """Nats per token on everybody's text, with whatever the base's model computes now."""
    return {name: loss_on(stage.base.model, stream, length, device) for name, stream in streams.items()}


def merges(
    stage: Stage,
    adapters: Mapping[str, Adapter],
    statistics: Mapping[type[Method], Sequence[Statistics]],
    rank: int,
    length: int,
    device: str,
) -> Iterator[Row]:
    """Every merge at its best setting by the tuning texts, measured on the held-out texts."""
    parts = list(adapters.values())
    for name, settings in OURS.items():
        at_most = None if name == "sum" else rank
        candidates = [
            (str(method), merge_adapters(parts, method, _mean_weights(method, len(parts)), at_most, found))
            for method in settings
            for found in [statistics.get(type(method), ())]
        ]
        yield _best(stage, f"potluck {name}", candidates, length, device)
    with tempfile.TemporaryDirectory() as place:
        peft_merge = _peft(stage, parts, rank, Path(place))
        for name, options in PEFT.items():
            candidates = [(f"{name} {option}", peft_merge(name, option)) for option in options]
            yield _best(stage, f"PEFT {name}", candidates, length, device)


def _mean_weights(method: Method, count: int) -> list[float] | None:
    return [1.0 / count] * count if isinstance(method, Sum) else None


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """An adapter that adds so many times as much."""
    modules = {path: Factors(factors.down, scale * factors.up) for path, factors in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _best(stage: Stage, name: str, candidates: Sequence[tuple[str, Adapter]], length: int, device: str) -> Row:
    def tuned(adapter: Adapter) -> float:
        with attached(stage.base.model, adapter):
            return float(np.mean(list(losses(stage, stage.tuning, length, device).values())))

    tried = [(tuned(scaled(a, scale)), label, scale, a) for label, a in candidates for scale in SCALES]
    _, label, scale, adapter = min(tried, key=lambda found: found[0])
    with attached(stage.base.model, scaled(adapter, scale)):
        return Row(name, adapter.rank, f"{label} x {scale:g}", losses(stage, stage.held_out, length, device))


def _peft(
    stage: Stage, parts: Sequence[Adapter], rank: int, place: Path
) -> Callable[[str, Mapping[str, Any]], Adapter]:
    """PEFT's ``add_weighted_adapter`` with weights 1/N; what it made is read back from what it saves."""
    from peft import PeftModel

    for number, adapter in enumerate(parts):
        save_adapter(adapter, place / str(number))
    names = [f"a{number}" for number in range(len(parts))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(stage.base.model).cpu(), str(place / "0"), adapter_name="a0")
        for number, name in enumerate(names[1:], 1):
            model.load_adapter(str(place / str(number)), adapter_name=name)

    def merge(kind: str, option: Mapping[str, Any]) -> Adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_rank = {"svd_rank": rank} if kind.endswith("svd") else {}
            model.add_weighted_adapter(
                names, [1.0 / len(names)] * len(names), "merged", combination_type=kind, **by_rank, **option
            )
            model.save_pretrained(str(place / "out"), selected_adapters=["merged"])
            model.delete_adapter("merged")
        return load_adapter(place / "out" / "merged")

    return merge
