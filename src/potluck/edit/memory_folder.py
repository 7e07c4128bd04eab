"""A folder that holds a model with a side memory, opened to go on with: further edits, or some taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from potluck.compose.base import Base, load_base
from potluck.edit import grace, wise
from potluck.edit.facts import Edit, edit_of
from potluck.edit.grace import GraceMemory, GraceSettings
from potluck.edit.layout import layout_of
from potluck.edit.side_memory import RECORD
from potluck.edit.wise import Shard, WiseMemory, WiseSettings
from potluck.errors import EditError
from potluck.models.memory import EditedForCausalLM
from potluck.untrusted import load_json

Memory = GraceMemory | WiseMemory


def has_memory(folder: Path) -> bool:
    """Whether `potluck.edit.side_memory.save_with_memory` wrote this folder."""
    return (folder / RECORD).is_file()


def load_memory(folder: Path) -> tuple[Base, Memory]:
    """The model without its memory, and the memory.

    Raises:
        ModelError: The model cannot be used.
        EditError: Its record is damaged or does not fit, or its shards were merged into one.
    """
    whole = load_base(folder, "auto")
    try:
        record = load_json(folder / RECORD)
        model = cast(EditedForCausalLM, whole.model)
        model.detach()
        base = Base(model.edited, whole.vocabulary, whole.place)
        tensors = {name: tensor.detach().cpu() for name, tensor in model.memory.named_buffers()}
        edits = tuple(edit_of(row) for row in record["edits"])
        memory = (_codebook if record["kind"] == "codebook" else _shards)(record, edits, tensors)
        layout_of(base.model).check_layers((memory.layer,))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "`potluck edit apply --method grace` or `wise` writes such folders"
        raise EditError(f"{folder}: it is not known which edits were made here ({error})", hint) from None
    return base, memory


def with_edits(base: Base, memory: Memory, edits: Sequence[Edit]) -> Memory:
    """The memory with further edits.

    Raises:
        EditError: As `edit_with_grace` and `edit_with_wise`.
    """
    if isinstance(memory, GraceMemory):
        return grace.edit_with_grace(base, memory, edits)
    return wise.edit_with_wise(base, memory, edits)


def without(base: Base, memory: Memory, ids: Sequence[str]) -> Memory:
    """The memory without some edits.

    Raises:
        EditError: One of them is not in it.
    """
    return grace.without(memory, ids) if isinstance(memory, GraceMemory) else wise.without(base, memory, ids)


def _codebook(record: Mapping[str, Any], edits: tuple[Edit, ...], tensors: Mapping[str, Tensor]) -> Memory:
    if len(tensors["keys"]) != len(edits):
        raise ValueError("entries and edits differ in number")
    parts = (tensors["keys"], tensors["values"], tensors["radii"])
    return GraceMemory(int(record["layer"]), GraceSettings(**record["settings"]), *parts, edits)


def _shards(record: Mapping[str, Any], edits: tuple[Edit, ...], tensors: Mapping[str, Tensor]) -> Memory:
    sizes = [int(size) for size in record["shards"]]
    if len(tensors["deltas"]) != len(sizes):
        raise ValueError("its shards were merged into one, which cannot be taken apart")
    if sum(sizes) != len(edits) or min(sizes, default=1) < 1:
        raise ValueError("shards and edits differ in number")
    shares = torch.arange(len(edits)).split(sizes)
    shards = tuple(
        Shard(delta, float(threshold), tuple(edits[i] for i in share.tolist()), int(span))
        for delta, threshold, span, share in zip(
            *(tensors[name] for name in ("deltas", "thresholds", "spans")), shares, strict=True
        )
    )
    return WiseMemory(int(record["layer"]), WiseSettings(**record["settings"]), shards)
