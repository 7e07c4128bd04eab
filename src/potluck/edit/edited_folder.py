"""An edited model as a folder: plain weights that ``from_pretrained`` loads, and beside them what was done to them.

``edits/`` holds the edits, their keys and residuals, the edited maps as they were and the key moments, so that further
edits can be made and single ones taken back (`potluck.edit.weights`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base, load_base, weights_hash
from potluck.edit.facts import edit_of
from potluck.edit.layout import layout_of
from potluck.edit.values import ValueSettings
from potluck.edit.weights import WeightEditor, WeightSettings, Written
from potluck.errors import EditError
from potluck.files import appearing, storing, write_text
from potluck.models.export import save_like
from potluck.tensors import load_tensors
from potluck.untrusted import load_json

FOLDER = "edits"
_FORMAT = "potluck-edits-2"  # 1: AlphaEdit's and ROME's settings meant something else
_PARTS = ("keys", "residuals", "after")


def save_model(base: Base, folder: Path) -> None:
    """Weights, in the types that the base's are stored in, and tokenizer, into a folder that is there.

    The model is afterwards what was stored.

    Raises:
        StorageError: It cannot be written.
    """
    save_like(base.model, Path(base.place), folder)


def save_edited(editor: WeightEditor, folder: Path) -> None:
    """The edited model and what was done to it, as a new folder.

    Raises:
        StorageError: There is something there already, or it cannot be written.
    """
    tensors: dict[str, Tensor] = {f"original.{layer}": value for layer, value in editor.originals.items()}
    tensors |= {f"moments.{name}": value for name, value in editor.moments.tensors.items()}
    tensors |= {f"held.{layer}": value for layer, value in editor.held.items()}
    for number, batch in enumerate(editor.written):
        for part in _PARTS:
            tensors |= {f"{number}.{part}.{layer}": value for layer, value in getattr(batch, part).items()}
    with appearing(folder) as being_written:
        save_model(editor.base, being_written)
        facts = {
            "format": _FORMAT,
            "settings": asdict(editor.settings),
            "moments": {"count": editor.moments.count, "base_hash": editor.moments.base_hash},
            "edited": weights_hash(editor.base.model),
            "batches": [[asdict(edit) for edit in batch.edits] for batch in editor.written],
        }
        with storing(folder):
            place = being_written / FOLDER
            place.mkdir()
            save_file({name: value.contiguous() for name, value in tensors.items()}, place / "edits.safetensors")
            write_text(place / "edits.json", json.dumps(facts, indent=1, ensure_ascii=False))


def load_edited(folder: Path) -> WeightEditor:
    """The editor that `save_edited` kept, to go on with.

    Raises:
        ModelError: The model cannot be used.
        EditError: What was done to it is missing, damaged, or the weights are not those that it led to.
    """
    base = load_base(folder, "auto")
    place = folder / FOLDER
    try:
        facts = load_json(place / "edits.json")
        tensors = load_tensors(place / "edits.safetensors")
        editor = _editor(base, facts, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "`potluck edit apply` writes folders whose edits can be taken back"
        raise EditError(f"{folder}: it is not known which edits were made here ({error})", hint) from None
    if facts["edited"] != weights_hash(editor.base.model):
        raise EditError(f"{folder}: the weights were changed since the edits were made", "edit the new model anew")
    return editor


def _editor(base: Base, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WeightEditor:
    raw = dict(facts["settings"])
    if facts["format"] == "potluck-edits-1" and raw["method"] == "memit":
        raw = {name: value for name, value in raw.items() if name not in ("kept", "null_weight", "ridge")}
    elif facts["format"] != _FORMAT:
        raise ValueError("another format")
    layers = layout_of(base.model).check_layers(raw["layers"])
    settings = WeightSettings(**{**raw, "layers": layers, "values": ValueSettings(**raw["values"])})
    named = {n.removeprefix("moments."): t for n, t in tensors.items() if n.startswith("moments.")}
    moments = Statistics("moments", named, int(facts["moments"]["count"]), str(facts["moments"]["base_hash"]))
    written = []
    for number, rows in enumerate(facts["batches"]):
        parts = [{layer: tensors[f"{number}.{part}.{layer}"] for layer in layers} for part in _PARTS]
        batch = Written(tuple(edit_of(row) for row in rows), *parts)
        if any(len(tensor) != len(batch.edits) for part in parts for tensor in part.values()):
            raise ValueError("keys and edits differ in number")
        written.append(batch)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("NaN or infinite values")
    originals = {layer: tensors[f"original.{layer}"] for layer in layers}
    held = {layer: tensors[f"held.{layer}"] for layer in layers if f"held.{layer}" in tensors}
    return WeightEditor(base, moments, settings, originals, written, held)
