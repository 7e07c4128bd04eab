"""One flat view of a model's trainable parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """Where one parameter lies in the flat vector: ``vector[offset : offset + size]``."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class FlatParameters:
    """A model's trainable parameters as one contiguous fp32 vector.

    Attributes:
        vector: Shape ``(N,)``. The model's parameters are views of it: writing one writes the other.
        manifest: Name, shape and offset of each parameter; tied parameters appear once.
        parameters: The model's parameters in the order of the manifest.
    """

    vector: Tensor
    manifest: tuple[Entry, ...]
    parameters: tuple[nn.Parameter, ...]

    def views(self, vector: Tensor) -> Iterator[Tensor]:
        """Another vector of the same layout, cut into the parameters' shapes."""
        return (vector[e.offset : e.offset + e.size].view(e.shape) for e in self.manifest)


def flatten(model: nn.Module, device: torch.device) -> FlatParameters:
    """Move a model to ``device`` with its trainable parameters in one vector.

    Each parameter is copied once; afterwards copying a whole model is one copy of ``vector``.
    """
    model.to(device)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # tied ones come once
    vector = torch.empty(sum(p.numel() for _, p in named), dtype=torch.float32, device=device)
    manifest, offset = [], 0
    for name, parameter in named:
        entry = Entry(name, tuple(parameter.shape), offset)
        view = vector[offset : offset + entry.size].view(entry.shape)
        view.copy_(parameter.data)
        parameter.data = view
        manifest.append(entry)
        offset += entry.size
    return FlatParameters(vector, tuple(manifest), tuple(p for _, p in named))


def frozen_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the parameters that do not learn; empty if all do."""
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    digest = hashlib.sha256()
    for name, parameter in sorted(frozen, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.float().contiguous().cpu().numpy().data)
    return digest.hexdigest() if frozen else ""


def state_hash(vector: Tensor) -> str:
    """SHA-256 of a flat vector's bytes: with its revision it names a shared state."""
    return hashlib.sha256(vector.detach().cpu().numpy().data).hexdigest()
