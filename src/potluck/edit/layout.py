"""Where a model keeps facts: the second matrix of each layer's MLP, ``d_in`` inner features to the residual stream.

Known are decoders of Llama's type (``model.layers[i].mlp.down_proj``, also Qwen, Mistral, OLMo …) and of GPT-2's
(``transformer.h[i].mlp.c_proj``, whose weight is stored transposed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from potluck.errors import EditError, ModelError

_KINDS = (
    ("model.layers", "model.norm", "mlp.down_proj", "mlp.act_fn"),
    ("transformer.h", "transformer.ln_f", "mlp.c_proj", "mlp.act"),
)


@dataclass(frozen=True)
class Layout:
    """The edited maps of one model.

    Attributes:
        layers: Path of the list of layers.
        norm: Path of the norm after the last layer.
        down: Path of the map below a layer.
        activation: Path of the MLP's activation function below a layer.
        count: Layers.
        d_in, d_out: Of each map.
    """

    model: PreTrainedModel
    layers: str
    norm: str
    down: str
    activation: str
    count: int
    d_in: int
    d_out: int

    def path(self, layer: int) -> str:
        """Path of a layer's map."""
        return f"{self.layers}.{layer}.{self.down}"

    def map(self, layer: int) -> nn.Module:
        """A layer's map."""
        return self.model.get_submodule(self.path(layer))

    def block(self, layer: int) -> nn.Module:
        """A whole layer: its output is the residual stream, ``(B, T, d_out)``."""
        return self.model.get_submodule(f"{self.layers}.{layer}")

    def act(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The activation function of a layer's MLP."""
        return self.model.get_submodule(f"{self.layers}.{layer}.{self.activation}")

    def weight(self, layer: int) -> Tensor:
        """``W`` of a layer, ``(d_out, d_in)`` whatever the model stores: a view, writing to it writes the model."""
        module = self.map(layer)
        weight = cast(Tensor, module.weight).detach()
        return weight.T if isinstance(module, Conv1D) else weight

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers, in order.

        Raises:
            EditError: One is not there, twice, or none is given.
        """
        if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < self.count for layer in layers):
            raise EditError(f"layers {', '.join(map(str, layers)) or '(none)'}: the model has 0 to {self.count - 1}")
        return tuple(sorted(layers))


def layout_of(model: PreTrainedModel) -> Layout:
    """Find the maps.

    Raises:
        ModelError: The model is of a layout that is not known here.
    """
    for layers, norm, down, activation in _KINDS:
        try:
            blocks = cast(nn.ModuleList, model.get_submodule(layers))
            maps = [block.get_submodule(down) for block in blocks]
            model.get_submodule(norm)
            for block in blocks:
                block.get_submodule(activation)
        except AttributeError:
            continue
        shapes = {_shape(module) for module in maps}
        if len(shapes) == 1 and (shape := shapes.pop()) is not None:
            return Layout(model, layers, norm, down, activation, len(maps), d_in=shape[1], d_out=shape[0])
    raise ModelError(
        f"{type(model).__name__}: it is not known where this model keeps facts",
        "editing knows decoders of Llama's and GPT-2's type, with one MLP in each layer",
    )


@contextmanager
def watching(modules: Mapping[int, nn.Module], take: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within, ``take`` is told the key, the input and the output of every module, each time it computes.

    A module that is called by keyword alone, as attention is, has its output in place of an input.
    """

    def told(key: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: take(key, inputs[0] if inputs else first(output), first(output))

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(told(key)).remove)
        yield


def run_to(
    layout: Layout, modules: Mapping[int, nn.Module], take: Callable[[int, Tensor, Tensor], None], **batch: Any
) -> None:
    """One run of the model, watched as by `watching`, that ends with the module of the last layer.

    Args:
        modules: By layer; each computes once.
        batch: What the model gets.
    """
    last = max(modules)

    def told(layer: int, entered: Tensor, left: Tensor) -> None:
        take(layer, entered, left)
        if layer == last:
            raise _Enough

    with watching(modules, told), suppress(_Enough):
        layout.model.base_model(**batch, use_cache=False)


class _Enough(Exception):
    """Nothing that the rest of the run gives is wanted."""


@contextmanager
def altering(module: nn.Module, alter: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, a module's output (of a tuple the first) is what ``alter`` makes of it."""

    def altered(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return (alter(output[0]), *output[1:]) if isinstance(output, tuple) else alter(output)

    handle = module.register_forward_hook(altered)
    try:
        yield
    finally:
        handle.remove()


def from_layer(layout: Layout, layer: int, run: Callable[[], object]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a layer gives in one run of the model, and what makes the model's last hidden states of it.

    So that a search at one layer computes the layers below it once.

    Args:
        run: Runs the model on one batch; a cache that it goes on from is to be put back before each further run.
    """
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    reached: list[Tensor] = []
    above = range(layer + 1, layout.count)

    def note(at: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: given.update({at: (args[1:], kwargs)})

    with ExitStack() as stack:
        for at in above:
            stack.callback(layout.block(at).register_forward_pre_hook(note(at), with_kwargs=True).remove)
        stack.enter_context(watching({layer: layout.block(layer)}, lambda key, entered, left: reached.append(left)))
        with torch.no_grad():
            run()

    def resumed(hidden: Tensor) -> Tensor:
        for at in above:
            args, kwargs = given[at]
            hidden = first(layout.block(at)(hidden, *args, **kwargs))
        ended: Tensor = layout.model.get_submodule(layout.norm)(hidden)
        return ended

    return reached[0], resumed


def first(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return (module.weight.shape[0], module.weight.shape[1])
    if isinstance(module, Conv1D):
        return (module.weight.shape[1], module.weight.shape[0])
    return None


def host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU in float64: what statistics and solves are kept in."""
    return tensor.detach().to("cpu", torch.float64)
