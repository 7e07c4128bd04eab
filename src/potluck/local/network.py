"""The one model instance of a process, and what it computes on."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from potluck.errors import RecipeError
from potluck.models.flat import FlatParameters, flatten, frozen_hash
from potluck.recipe.schema import Compute


@dataclass(frozen=True)
class Network:
    """A model whose parameters are views of one flat vector; participants take turns in it.

    Attributes:
        autocast: Forward passes run in bf16 where that is safe; parameters and moments stay fp32.
    """

    model: PreTrainedModel
    flat: FlatParameters
    device: torch.device
    autocast: bool

    @cached_property
    def layout(self) -> list[list[Any]]:
        """What must be the same wherever the flat vector is to mean the same: its manifest, and what is frozen."""
        learns: list[list[Any]] = [[entry.name, list(entry.shape)] for entry in self.flat.manifest]
        frozen = frozen_hash(self.model)
        return [*learns, ["frozen", frozen]] if frozen else learns

    def precision(self) -> AbstractContextManager[object]:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()


def place(model: PreTrainedModel, compute: Compute) -> Network:
    """Put a model on the recipe's device.

    Raises:
        RecipeError: The device does not exist, or the model cannot recompute activations.
    """
    device = device_named(compute.device)
    flat = flatten(model, device)
    if compute.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise RecipeError(f"compute.gradient_checkpointing: not for a {model.config.model_type} model")
        model.activation_checkpointing_enable()
    if compute.compile:
        _import_setuptools()
        model.compile()
    autocast = compute.precision == "bf16" or (compute.precision == "auto" and device.type == "cuda")
    return Network(model, flat, device, autocast)


def _import_setuptools() -> None:
    """Before torch's compiling threads import it at once; beside the interpreter's `distutils`, not in its place.

    Taking its place, which is setuptools' default, fails now and then with an assertion.
    """
    os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    with suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import setuptools  # noqa: F401


def token_losses(network: Network, tokens: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of each token given those before it in its sequence, in nats.

    Args:
        tokens: int64 ``(batch, length + 1)``; the first of a sequence is only context.
        reduction: ``mean`` or ``sum`` over the ``batch x length`` predictions.
    """
    logits = next_logits(network, tokens).float()
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


def next_logits(network: Network, tokens: Tensor) -> Tensor:
    """What the network says of each token but the first of a sequence, in the precision it computes with.

    Args:
        tokens: int64 ``(batch, length + 1)``.

    Returns:
        ``(batch, length, vocabulary)``.
    """
    with network.precision():
        logits: Tensor = network.model(input_ids=tokens[:, :-1], use_cache=False).logits
    return logits


def host_vector(size: int, device: torch.device) -> Tensor:
    """Zeros in host memory, pinned if a GPU is to copy them."""
    return torch.zeros(size, dtype=torch.float32, pin_memory=device.type == "cuda")


def device_named(name: str) -> torch.device:
    """The recipe's ``compute.device``.

    Raises:
        RecipeError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"compute.device {name!r} cannot be used: {reason}", 'set compute.device = "auto"') from None
    return device
