"""A model in fewer bits, as it may be handed on: what was unlearned by small steps can come back (arXiv 2410.16454)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potluck.compose.base import Base

_GROUP = 64  # values that share a scale in 4 bits

Bits = Literal[4, 8]


@torch.no_grad()
def quantised(base: Base, bits: Bits) -> Base:
    """A copy whose linear maps were rounded to so many bits and back; embeddings and the head stay as they are.

    ``w ← s · round(w / s)`` with ``s = max|w| / (2^(bits−1) − 1)``, to the nearest and symmetric: of each output in 8
    bits, of each 64 inputs of an output in 4.
    """
    model = copy.deepcopy(base.model)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(rounded(module.weight, bits))
        elif isinstance(module, Conv1D):
            module.weight.copy_(rounded(module.weight.T, bits).T)
    return replace(base, model=model)


def rounded(weight: Tensor, bits: Bits) -> Tensor:
    """A weight ``(d_out, d_in)`` in so many bits."""
    highest, inputs = 2 ** (bits - 1) - 1, weight.shape[1]
    size = _GROUP if bits == 4 else inputs
    found = weight.detach().float().clone()
    for begin in range(0, inputs, size):
        group = found[:, begin : begin + size]
        scale = group.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / highest
        group.copy_((group / scale).round() * scale)
    return found.to(weight.dtype)
