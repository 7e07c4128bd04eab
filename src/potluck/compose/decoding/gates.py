"""Whose turn it is to speak, from the base's state; and the folder that keeps what was learnt of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from potluck.errors import ModelError, StorageError
from potluck.files import name_of, storing, write_text
from potluck.tensors import load_tensors
from potluck.untrusted import load_json

WEIGHTS_FILE = "deferral.safetensors"
ABOUT_FILE = "deferral.json"
_FORMAT = "potluck deferral 1"
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Gates:
    """A row and a bias for each of K assistants.

    Attributes:
        rows: fp32 ``(K, 2 d)`` on the states of `Here.look`; or ``(K, d)``, on the last hidden state alone.
        bias: fp32 ``(K,)``.
    """

    rows: Tensor
    bias: Tensor

    def logits(self, states: Tensor) -> Tensor:
        """Of the assistants, the base's being 0: ``(…, 2 d)`` to ``(…, K)``."""
        return states[..., : self.rows.shape[1]] @ self.rows.T + self.bias

    def log_turns(self, states: Tensor) -> Tensor:
        """``log P(z)``, ``P(z) = softmax([0, w_1·s + b_1, …])``, the base first: ``(…, 2 d)`` to ``(…, K + 1)``."""
        return pad(self.logits(states), (1, 0)).log_softmax(dim=-1)


@dataclass(frozen=True)
class Deferral:
    """What was learnt for a base and its assistants.

    Attributes:
        threshold: An assistant is called where ``1 - P(base)`` is above it.
        base_hash: `Base.content_hash` of the base whose states the gates read.
        assistants: Their names, in the order of the rows.
        figures: What it came to on text that was held out.
    """

    gates: Gates
    threshold: float
    base_hash: str
    assistants: tuple[str, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)


def save_deferral(deferral: Deferral, folder: Path) -> None:
    """Write ``deferral.safetensors`` and ``deferral.json`` into a new folder.

    Raises:
        StorageError: There is something already, or the disk cannot be written.
    """
    if folder.exists():
        raise StorageError(f"{folder}: there is something here already", "name a new folder")
    figures = {name_of(place): nats for place, nats in deferral.figures.get("nats_per_token", {}).items()}
    about = {
        "format": _FORMAT,
        "base_hash": deferral.base_hash,
        "assistants": [name_of(place) for place in deferral.assistants],
        "threshold": deferral.threshold,
        "figures": {**deferral.figures, **({"nats_per_token": figures} if figures else {})},
    }
    partial = folder.with_name(f".{folder.name}.partial")
    with storing(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({"rows": deferral.gates.rows, "bias": deferral.gates.bias}, partial / WEIGHTS_FILE)
            write_text(partial / ABOUT_FILE, json.dumps(about, indent=1))
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def load_deferral(folder: Path, base_hash: str) -> Deferral:
    """What ``save_deferral`` wrote, for the base that it was learnt with.

    Raises:
        ModelError: It is missing or damaged, or was learnt with another base.
    """
    try:
        paths = (folder / ABOUT_FILE, folder / WEIGHTS_FILE)
        if paths[1].stat().st_size > _MAX_BYTES:
            raise ValueError("larger than any deferral")
        about = load_json(paths[0])
        tensors = load_tensors(paths[1])
        found = Deferral(
            Gates(tensors["rows"].float(), tensors["bias"].float()),
            float(about["threshold"]),
            str(about["base_hash"]),
            tuple(map(str, about["assistants"])),
            about["figures"],
        )
        rows, bias, count = found.gates.rows, found.gates.bias, len(found.assistants)
        if rows.ndim != 2 or bias.shape != (count,) or len(rows) != count or about["format"] != _FORMAT or not count:
            raise ValueError("rows, biases and assistants do not match")
        if not (torch.isfinite(rows).all() and torch.isfinite(bias).all() and 0 <= found.threshold <= 1):
            raise ValueError("values that are not finite, or a threshold that is no probability")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: not a learnt deferral ({error})") from None
    if found.base_hash != base_hash:
        raise ModelError(f"{folder}: was learnt with another base: its gates read other states")
    return found
