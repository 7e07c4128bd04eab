"""What `potluck merge` is asked for: adapters or full models, a method with its settings, and where the result goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from potluck.compose.adapter import ABOUT_FILE, CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from potluck.compose.base import load_base
from potluck.compose.lora import merge_into
from potluck.compose.merging.adapters import ADAPTER_METHODS, MEASURED, merge_adapters
from potluck.compose.merging.models import MODEL_METHODS, merge_models
from potluck.compose.statistics import load_statistics
from potluck.errors import ModelError, RecipeError
from potluck.files import appearing, storing, write_text
from potluck.models.build import embeddings

FLAGS = {"scale": "--lambda"}  # of settings whose option is not called as they are


@dataclass(frozen=True)
class Request:
    """A merge.

    Attributes:
        parts: Folders of adapters, or of full models.
        out: The folder to write, which must not exist.
        method: A name in `ADAPTER_METHODS` or `MODEL_METHODS`.
        settings: The method's, as far as they were given.
        weights: One for each part, or none.
        rank: Of a merged adapter, at most.
        base: What full models were trained from.
        into_base: The model folder that the merged adapter is added to; then ``out`` is a full model.
        statistics: Files that lie elsewhere than beside their adapters.
    """

    parts: Sequence[Path]
    out: Path
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    rank: int | None = None
    base: Path | None = None
    into_base: Path | None = None
    statistics: Sequence[Path] = ()


def carry_out(request: Request) -> dict[str, Any]:
    """Merge, write the result, and say what was done; ``potluck.json`` in the folder says it too.

    Raises:
        ModelError: A part cannot be read, or parts do not belong together.
        RecipeError: The method has no use for something given, or cannot do without something that is not.
        StorageError: The result cannot be written.
    """
    if _holds_adapters(request.parts):
        _refuse("merging adapters", base=request.base)
        return _merged_adapters(request)
    _refuse(
        "merging full models", rank=request.rank, into_base=request.into_base, statistics=request.statistics or None
    )
    method = chosen(MODEL_METHODS, request.method, request.settings)
    facts = merge_models(request.parts, request.out, method, request.weights, request.base)
    return {"model": str(request.out), **facts}


def chosen(methods: Mapping[str, type[Any]], name: str, settings: Mapping[str, Any]) -> Any:
    """A method with the settings that were given.

    Raises:
        RecipeError: There is no such method, or it has no such setting, or not of this value.
    """
    if name not in methods:
        raise RecipeError(f"there is no method {name} for this", f"choose one of {', '.join(methods)}")
    takes = [entry.name for entry in fields(methods[name])]
    for setting in settings:
        if setting not in takes:
            hint = f"it takes {', '.join(map(_flag, takes)) or 'no settings'}"
            raise RecipeError(f"{_flag(setting)} has no effect on {name}", hint)
    return methods[name](**settings)


def _merged_adapters(request: Request) -> dict[str, Any]:
    method = chosen(ADAPTER_METHODS, request.method, request.settings)
    adapters = [load_adapter(folder) for folder in request.parts]
    statistics = []
    if type(method) in MEASURED or request.statistics:
        places = request.statistics or request.parts
        if len(places) != len(adapters):
            raise RecipeError(f"{len(places)} files of statistics for {len(adapters)} adapters")
        statistics = [load_statistics(place, adapter) for place, adapter in zip(places, adapters, strict=True)]
    sources = [{"folder": str(folder), "sha256": _sha256(folder / WEIGHTS_FILE)} for folder in request.parts]
    with appearing(request.out) as folder:
        merged = merge_adapters(adapters, method, request.weights, request.rank, statistics)
        merged = replace(merged, about={**merged.about, "rank": merged.rank, "sources": sources})
        if request.into_base is None:
            save_adapter(merged, folder)
        else:
            _save_with_base(merged, request.into_base, folder)
    return {"folder" if request.into_base is None else "model": str(request.out), **merged.about}


def _save_with_base(adapter: Adapter, base_folder: Path, folder: Path) -> None:
    """The base with the adapter added to its weights, in fp32, with its tokenizer."""
    base = load_base(base_folder)
    model = base.model
    if adapter.about.get("base_hash", base.content_hash) != base.content_hash:
        raise ModelError(f"{base_folder}: not the base that the adapters were trained on", "its weights differ")
    shared = embeddings(model)
    if len(shared) == 2 and shared[0] is shared[1] and any("lm_head" in path for path in adapter.modules):
        raise ModelError(f"{base_folder}: its output head is its embedding, and an adapter cannot change one alone")
    merge_into(model, adapter)
    with storing(folder):
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(base_folder, local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
        write_text(folder / ABOUT_FILE, json.dumps(dict(adapter.about), indent=1))


def _holds_adapters(parts: Sequence[Path]) -> bool:
    kinds = set()
    for folder in parts:
        adapter = (folder / CONFIG_FILE).is_file()
        if not adapter and not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: neither an adapter nor a model", "name folders written by save_pretrained")
        kinds.add(adapter)
    if len(kinds) > 1:
        hint = "write an adapter into its base first: potluck merge ADAPTER --method sum --into-base BASE"
        raise ModelError("some of these folders are adapters, others full models", hint)
    return kinds == {True}


def _refuse(what: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"{_flag(name)} has no effect when {what}")


def _flag(setting: str) -> str:
    return FLAGS.get(setting, f"--{setting.replace('_', '-')}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
