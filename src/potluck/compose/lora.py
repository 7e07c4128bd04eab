"""Adapters at work: additions to a frozen base's linear maps, and one trained on a participant's text."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.base import Base
from potluck.compose.training import Lesson, only_training, train_part
from potluck.errors import ModelError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj", "c_fc")
_NAMED = 4  # modules that do not fit, in one message


class LowRank(nn.Module):
    """``x -> scale · up (down x)``, whose factors may learn."""

    def __init__(self, factors: Factors, scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.detach().clone(), requires_grad=False)
        self.up = nn.Parameter(factors.up.detach().clone(), requires_grad=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(…, d_in)`` to ``(…, d_out)``."""
        return self.scale * linear(linear(x, self.down), self.up)

    def factors(self) -> Factors:
        """What it adds, scale included, on the CPU."""
        return Factors(self.down.detach().cpu().clone(), (self.scale * self.up.detach()).cpu())


class Added(nn.Module):
    """A frozen linear map and an addition: ``y = W x + addition(x)``."""

    def __init__(self, frozen: nn.Module, addition: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.addition = addition

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(…, d_in)`` to ``(…, d_out)``."""
        output: Tensor = self.frozen(x) + self.addition(x)
        return output


def linear_maps(model: nn.Module, targets: Sequence[str] = ALL_LINEAR) -> dict[str, nn.Module]:
    """The linear maps whose place ends in one of the names, in the model's order."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path.rpartition(".")[2] in targets
    }


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a linear map; GPT-2 stores its weights the other way round."""
    rows, columns = (int(size) for size in module.weight.shape)  # type: ignore[union-attr]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


@contextmanager
def added(model: PreTrainedModel, additions: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the model computes with these additions; afterwards it is the model it was.

    Raises:
        ModelError: The model has no such linear map.
    """
    frozen = {path: _linear_at(model, path) for path in additions}
    try:
        for path, addition in additions.items():
            _replace(model, path, Added(frozen[path], addition.to(model.device)))
        yield
    finally:
        for path, module in frozen.items():
            _replace(model, path, module)


def attached(model: PreTrainedModel, adapter: Adapter) -> Any:
    """A context within which the model computes with an adapter.

    Raises:
        ModelError: The adapter was not trained on a model of this shape.
    """
    check_fits(model, adapter)
    return added(model, {path: LowRank(factors) for path, factors in adapter.modules.items()})


def check_fits(model: PreTrainedModel, adapter: Adapter, place: str = "") -> None:
    """Refuse an adapter for another shape.

    Args:
        place: What the adapter is called in messages.

    Raises:
        ModelError: naming each module that does not fit, the first few of many.
    """
    wrong = [said for path, factors in adapter.modules.items() if (said := _misfit(model, path, factors))]
    if wrong:
        more = f" (and {len(wrong) - _NAMED} more)" if len(wrong) > _NAMED else ""
        hint = "is it the base the adapter was trained on?"
        raise ModelError(f"{place}: {'; '.join(wrong[:_NAMED])}{more}".removeprefix(": "), hint)


def merge_into(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to the base's own weights, ``W ← W + ΔW``, in place.

    Raises:
        ModelError: The adapter was not trained on a model of this shape, or changes a weight that something else of the
            model uses, too: an output head that is the embedding.
    """
    check_fits(model, adapter)
    for path in adapter.modules:
        others = shares_weight(model, path)
        if others:
            hint = "route or decode with the adapter beside the base, or train it without this map"
            raise ModelError(f"{path}: its weight is also {others[0]}, and an adapter cannot change one alone", hint)
    _add_to_weights(model, adapter.modules)


def copied_with(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of a model that computes with an adapter for good.

    Products go into the weights, except where a weight is used elsewhere, too: there they stand beside it.

    Raises:
        ModelError: The adapter was not trained on a model of this shape.
    """
    check_fits(model, adapter)
    copied = copy.deepcopy(model)
    beside = {path: factors for path, factors in adapter.modules.items() if shares_weight(copied, path)}
    _add_to_weights(copied, {path: f for path, f in adapter.modules.items() if path not in beside})
    for path, factors in beside.items():
        _replace(copied, path, Added(_linear_at(copied, path), LowRank(factors).to(copied.device)))
    return copied


def shares_weight(model: PreTrainedModel, path: str) -> list[str]:
    """Other names of a linear map's weight, such as the embedding's of an output head that is tied to it."""
    weight = _linear_at(model, path).weight
    everyone = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in everyone if parameter is weight and name != f"{path}.weight"]


def _add_to_weights(model: PreTrainedModel, modules: Mapping[str, Factors]) -> None:
    with torch.no_grad():
        for path, factors in modules.items():
            module: Any = _linear_at(model, path)
            delta = factors.to(module.weight.device).delta().to(module.weight.dtype)
            module.weight.add_(delta.T if isinstance(module, Conv1D) else delta)


def train_adapter(
    base: Base,
    streams: Sequence[np.ndarray],
    lesson: Lesson,
    rank: int,
    targets: Sequence[str] = ALL_LINEAR,
    start: Adapter | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Adapter:
    """A LoRA of one rank on all target maps, trained on the base held frozen.

    A is drawn as PEFT draws it (Kaiming, uniform), B is zero, ``α = 2 r``.

    Args:
        streams: Token ids; a step takes a batch of each.
        start: Go on from this adapter.

    Raises:
        ModelError: The base has none of the target maps, or ``start`` does not fit.
        CorpusError: The text is shorter than one sequence.
    """
    model = base.model
    if start is not None:
        check_fits(model, start)
        layers = {path: LowRank(factors) for path, factors in start.modules.items()}
    else:
        layers = _fresh(linear_maps(model, targets), rank, lesson.seed)
    if not layers:
        raise ModelError(f"{base.place}: has no linear map named {', '.join(targets)}")
    part = [parameter for layer in layers.values() for parameter in layer.parameters()]
    with added(model, layers), only_training(model, part):
        train_part(model, streams, lesson, on_step, "low-rank")
    transposed = any(isinstance(_linear_at(model, path), Conv1D) for path in layers)
    modules = {path: layer.factors() for path, layer in layers.items()}
    return Adapter(modules, base.place, transposed, {"base_hash": base.content_hash})


def _fresh(maps: Mapping[str, nn.Module], rank: int, seed: int) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in maps.items():
        d_in, d_out = sizes(module)
        down = (2 * torch.rand(rank, d_in, generator=draw) - 1) / math.sqrt(d_in)
        layers[path] = LowRank(Factors(down, torch.zeros(d_out, rank)), scale=2.0)
    return layers


def _misfit(model: nn.Module, path: str, factors: Factors) -> str:
    """What keeps a map's addition from this model, if anything does."""
    try:
        expected = sizes(_linear_at(model, path))
    except ModelError as error:
        return str(error)
    given = (factors.down.shape[1], factors.up.shape[0])
    if expected == given:
        return ""
    return f"{path}: the adapter maps {given[0]} to {given[1]}, the base {expected[0]} to {expected[1]}"


def _linear_at(model: nn.Module, path: str) -> nn.Module:
    try:
        module: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        raise ModelError(f"the base has no linear map {path}{_layers_there(model, path)}")
    return module


def _layers_there(model: nn.Module, path: str) -> str:
    """How many layers there are, if a path asks for one beyond them."""
    for match in re.finditer(r"\.(\d+)\.", path):
        place = path[: match.start()]
        with suppress(AttributeError):
            layers = model.get_submodule(place)
            if isinstance(layers, nn.ModuleList) and int(match[1]) >= len(layers):
                return f": its {place} are 0 to {len(layers) - 1}"
    return ""


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
