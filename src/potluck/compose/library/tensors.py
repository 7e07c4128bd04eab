"""Small safetensors contents with facts beside them, read without trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from potluck.errors import ModelError
from potluck.tensors import load_tensors, read_header
from potluck.untrusted import loads

_KEY = "about"  # one key for all facts: safetensors writes several in an order that changes


def packed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A safetensors content with facts in its header; equal contents have equal bytes."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return bytes(save(whole, metadata={_KEY: json.dumps(facts, sort_keys=True)}))


def unpacked(content: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32 and facts.

    Raises:
        ModelError: It is no such content, or a number in it is not finite.
    """
    try:
        facts = loads(read_header(content).about[_KEY])
        tensors = load_tensors(content)
    except (ValueError, LookupError) as error:
        raise ModelError(f"{what}: cannot be read ({error})") from None
    found = {name: tensor.float() for name, tensor in tensors.items()}
    if not isinstance(facts, dict) or not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise ModelError(f"{what}: holds NaN or infinite values")
    return found, facts
