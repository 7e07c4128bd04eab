"""What packed adapters cost: bits for each number of their factors, at an error of at most so much.

Participants' adapters (`_compose_parts.py`), trained by each on its own text, are packed as one set. Beside it stand
what else makes adapters smaller: fp16 factors of fewer ranks, those with the largest singular values over all linear
maps; and 4 or 8 bits a number, with all ranks. Errors are ``‖ΔW − ΔW'‖ / ‖ΔW‖``, the largest of all adapters.

What an error means is said in the loss of each participant's held-out text: with its own adapter unpacked less that
with the adapter itself, the mean of all participants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor

from benchmarks import _compose_parts
from benchmarks._measure import Measurement, main, measured
from benchmarks._silos import BaseSize, Stage, stage
from potluck.compose.adapter import Adapter, Factors
from potluck.compose.library.packed import unpack
from potluck.compose.library.packing import Packing, pack, relative_error
from potluck.compose.lora import attached
from potluck.compose.low_rank import canonical, decomposed
from potluck.compose.training import loss_on
from potluck.recipe.updates import Quantize
from potluck.updates import links

_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        parts: The base, and how adapters are trained.
        errors: Bounds to pack within.
        held_out: Tokens of each participant that the loss is measured on.
    """

    parts: _compose_parts.Size
    errors: tuple[float, ...] = (0.03, 0.1, 0.3)
    held_out: int = 4000


_SHORT = BaseSize(vocabulary=1024, layers=2, width=64, heads=2, feedforward=176, steps=40, local_steps=50, parties=4)
SIZES = {
    "short": Size(parts=_compose_parts.Size(base=_SHORT, seeds=(0,), max_steps=40), held_out=1000),
    "full": Size(parts=_compose_parts.FULL),
}


def measure(size: Size) -> list[Measurement]:
    seed = size.parts.seeds[0]
    place = stage(seed, size.parts.base, size.parts.device)
    adapters = _compose_parts.adapters(place, size.parts, size.parts.ranks, seed)
    return list(_measured(place, adapters, size))


def _measured(place: Stage, adapters: Mapping[str, Adapter], size: Size) -> Iterator[Measurement]:
    numbers = sum(adapter.parameters for adapter in adapters.values())
    own = _loss(place, adapters, size)
    for error in size.errors:
        packed = pack(adapters, Packing(error=error))
        bits = 8 * packed.bytes / numbers
        ranks = 16 * sum(_numbers_within(adapter, error) for adapter in adapters.values()) / numbers
        what = f"packed, error at most {error:g}"
        yield measured(what, [bits], "bits a number", peer=f"fp16 with fewer ranks: {ranks:.2f}")
        yield measured(f"{what}: loss", [_loss(place, unpack(packed), size) - own], "nats per token above")
    for width in (8, 4):
        coded = {name: _coded(adapter, width) for name, adapter in adapters.items()}
        error = max(relative_error(adapters[name], adapter) for name, adapter in coded.items())
        what = f"{width} bits, blocks of {_BLOCK}"
        yield measured(f"{what}: error", [error], "", peer=f"{width + 32 / _BLOCK:g} bits a number")
        yield measured(f"{what}: loss", [_loss(place, coded, size) - own], "nats per token above")


def _loss(place: Stage, adapters: Mapping[str, Adapter], size: Size) -> float:
    """Of each participant's text with its own adapter, the mean of all."""
    model, found = place.base.model, []
    for name, adapter in adapters.items():
        with attached(model, adapter):
            found.append(loss_on(model, place.held_out[name][: size.held_out], size.parts.length, size.parts.device))
    return mean(found)


def _numbers_within(adapter: Adapter, error: float) -> int:
    """Numbers in the factors of the terms left, when those of least worth are given up as far as the error lets."""
    squares, costs = [], []
    for factors in adapter.modules.values():
        s = decomposed(factors)[1].double().square()
        squares.append(s)
        costs.append(torch.full((len(s),), factors.down.shape[1] + factors.up.shape[0]))
    whole, cost = torch.cat(squares), torch.cat(costs)
    least_worth_first = (whole / cost).argsort()
    kept = whole[least_worth_first].cumsum(0) > error**2 * whole.sum()
    return int(cost[least_worth_first][kept].sum())


def _coded(adapter: Adapter, bits: int) -> Adapter:
    """Its balanced factors in blocks of integer codes and back."""
    through = links.link_of([Quantize(bits=bits, block=_BLOCK)])

    def there_and_back(tensor: Tensor) -> Tensor:
        layout, flat = ((tensor.numel(),),), tensor.flatten()
        return links.unpack(through, links.pack(through, flat, layout, {}, 0), layout, 0).view_as(tensor)

    fixed = {path: canonical(factors) for path, factors in adapter.modules.items()}
    modules = {path: Factors(there_and_back(f.down), there_and_back(f.up)) for path, f in fixed.items()}
    return replace(adapter, modules=modules)


if __name__ == "__main__":
    main(measure, SIZES)
