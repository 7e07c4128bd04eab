"""Merging full models from folder to folder: a few rows of one tensor at a time, whatever the models' size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.compose.adapter import ABOUT_FILE
from potluck.compose.merging.check_same_base import check_same_architecture, check_same_tensors, check_same_vocabulary
from potluck.compose.merging.geometry import DeltaGuided, Linear, ModelStock, MultiSlerp, Slerp
from potluck.compose.merging.rules import RULES, Rule, even_weights
from potluck.compose.merging.shards import StoredTensor, created, opened
from potluck.compose.merging.streaming import Stack, merge_all
from potluck.errors import RecipeError
from potluck.files import appearing, name_of, storing, write_text
from potluck.models.check import Checked, checked_folder
from potluck.models.folder import copy_generation_config, copy_own, copy_tokenizer

MODEL_METHODS: Mapping[str, type[Rule]] = {
    "linear": Linear,
    **RULES,
    "slerp": Slerp,
    "multislerp": MultiSlerp,
    "model_stock": ModelStock,
    "delta_guided": DeltaGuided,
}
WITHOUT_BASE = (Linear, Slerp)  # what they average are the weights themselves
BASE_OR_NOT = (MultiSlerp,)  # on a sphere around the base, or around zero


def merge_models(
    folders: Sequence[Path],
    out: Path,
    method: Rule,
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    *,
    max_shard_bytes: int = 2 << 30,
    on_tensor: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Merge model folders of one architecture into a new one, ``θ = θ₀ + rule(θ₁ − θ₀, …)``.

    Computed in float32 and stored as the base stores it (without a base, as the first model does), from where
    configuration and tokenizer are copied. As many tensors are worked on at once as torch has threads, each in blocks
    of rows, so that memory does not grow with the models.

    Args:
        out: A folder that does not exist; it appears when it is whole.
        method: One of `MODEL_METHODS`, with its settings.
        weights: One a model; even if left out.
        base: What the models were trained from; methods in `WITHOUT_BASE` take none.
        max_shard_bytes: Of one file, unless a tensor is larger.
        on_tensor: Told how many tensors are done, and of how many.

    Returns:
        What was merged and how, as ``potluck.json`` in the folder says it.

    Raises:
        RecipeError: Method, weights and base do not go together.
        ModelError: A model is damaged, not finite, or differs in architecture, vocabulary or shape.
        StorageError: The disk is full, or there is something at ``out``.
    """
    votes = torch.tensor(even_weights(method, len(folders)) if weights is None else list(weights), dtype=torch.float32)
    _check_request(folders, method, votes, base)
    first = folders[0] if base is None else base
    checked = _checked(first, folders)
    with ExitStack() as open_files, appearing(out) as being_written:
        models = {folder: open_files.enter_context(_weights(checked[folder])) for folder in folders}
        origin = None if base is None else open_files.enter_context(_weights(checked[base]))
        reference = models[first] if origin is None else origin
        for folder, tensors in models.items():
            check_same_tensors(first, reference, folder, tensors)
        facts = {
            **_said(method),
            "models": [name_of(folder) for folder in folders],
            "weights": votes.tolist(),
            "base": None if base is None else name_of(base),
            **_size(reference),
        }
        with created(being_written, reference, max_shard_bytes) as merged:
            stacks = [
                Stack(name, {f: models[f][name] for f in folders}, None if origin is None else origin[name], place)
                for name, place in merged.items()
            ]
            merge_all(stacks, method, votes, on_tensor)
        _carry_over(first, being_written)
        write_text(being_written / ABOUT_FILE, json.dumps(facts, indent=1))
    return facts


def _checked(first: Path, folders: Sequence[Path]) -> dict[Path, Checked]:
    """All folders, one by one and against the first."""
    checked = {folder: checked_folder(folder) for folder in (first, *folders)}
    for folder in folders:
        check_same_architecture(first, checked[first].config, folder, checked[folder].config)
        check_same_vocabulary(first, folder)
    return checked


def _said(method: Rule) -> dict[str, Any]:
    name = next((name for name, kind in MODEL_METHODS.items() if type(method) is kind), repr(method))
    return {"method": name, "settings": dict(vars(method))}


def _size(reference: Mapping[str, StoredTensor]) -> dict[str, int]:
    tensors = reference.values()
    parameters = sum(tensor.rows * tensor.columns for tensor in tensors)
    return {"tensors": len(tensors), "parameters": parameters, "bytes": sum(tensor.nbytes for tensor in tensors)}


def _check_request(folders: Sequence[Path], method: Rule, weights: Tensor, base: Path | None) -> None:
    if not folders or len(weights) != len(folders):
        raise RecipeError(f"{len(weights)} weights for {len(folders)} models", "give one weight for each model")
    if len(set(folders)) < len(folders):
        raise RecipeError("a model is named twice", "give it a larger weight instead")
    if not torch.isfinite(weights).all():
        raise RecipeError("a weight is not a finite number")
    name = type(method).__name__
    if base is None and not isinstance(method, (*WITHOUT_BASE, *BASE_OR_NOT)):
        raise RecipeError(f"{name} merges what models learned, and needs the base they learned from", "name it")
    if base is not None and isinstance(method, WITHOUT_BASE):
        raise RecipeError(f"{name} has no use for a base", "leave it out, or choose task_arithmetic")


def _weights(folder: Checked) -> AbstractContextManager[dict[str, StoredTensor]]:
    """A folder's open tensors by the model's own names, those that are tied once."""
    return opened({name: tensor for name, (_, tensor) in folder.stored.items()})


def _carry_over(source: Path, to: Path) -> None:
    """Copy configuration and tokenizer: no code, no weights, and no records of what was done to the source."""
    with storing(to):
        copy_own(source / "config.json", source, to / "config.json")
        copy_generation_config(source, to)
        copy_tokenizer(source, to)
