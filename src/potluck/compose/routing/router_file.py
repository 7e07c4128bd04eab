"""A learned router in a file: W_g and b of every linear map, and the hashes of the adapters it was learned for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from potluck.compose.adapter import Adapter
from potluck.compose.library.storage import Files
from potluck.compose.library.tensors import packed, unpacked
from potluck.compose.routing.ranks import LearnedRanks, untrained_ranks
from potluck.errors import ModelError

_MAX_BYTES = 4 << 30


def save_router(routers: Mapping[str, LearnedRanks], adapters: Mapping[str, Adapter], path: Path) -> None:
    """Write one safetensors file, whole or not at all; the adapters are named in it, not held.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    tensors = {}
    for place, layer in routers.items():
        tensors[f"{place}.router"] = layer.router.detach().cpu()
        tensors[f"{place}.bias"] = layer.bias.cpu()
    facts = {
        "version": 1,
        "active": max(layer.active for layer in routers.values()),
        "adapters": [[name, adapter_hash(adapter)] for name, adapter in adapters.items()],
    }
    Files(path.parent).write(path.name, packed(tensors, facts))


def load_router(path: Path, adapters: Mapping[str, Adapter]) -> dict[str, LearnedRanks]:
    """A router for these adapters, which must be those it was learned for, in the same order.

    Raises:
        ModelError: It is missing, damaged, or of other adapters.
        StorageError: It cannot be read.
    """
    content = Files(path.parent).read(path.name, _MAX_BYTES)
    if content is None:
        raise ModelError(f"{path}: no such router", "train one with potluck.compose.routing.ranks.train_ranks")
    tensors, facts = unpacked(content, str(path))
    if facts.get("version") != 1 or not isinstance(facts.get("active"), int):
        raise ModelError(f"{path}: not a router of this version")
    if facts.get("adapters") != [[name, adapter_hash(adapter)] for name, adapter in adapters.items()]:
        raise ModelError(
            f"{path}: a router for other adapters than {', '.join(adapters)}",
            "give the adapters it was trained for, unchanged and in their order",
        )
    routers = untrained_ranks(adapters, facts["active"])
    for place, layer in routers.items():
        for name, own in (("router", layer.router), ("bias", layer.bias)):
            _fill(own, tensors.pop(f"{place}.{name}", None), f"{path}: {place}.{name}")
    if tensors:
        raise ModelError(f"{path}: {min(tensors)} is no part of a router for these adapters")
    return routers


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over places, shapes and values of all factors."""
    digest = hashlib.sha256()
    for path, factors in sorted(adapter.modules.items()):
        for tensor in (factors.down, factors.up):
            digest.update(f"{path} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _fill(own: Tensor, stored: Tensor | None, what: str) -> None:
    if stored is None or stored.shape != own.shape:
        raise ModelError(f"{what} is missing or of another shape")
    with torch.no_grad():
        own.copy_(stored)
