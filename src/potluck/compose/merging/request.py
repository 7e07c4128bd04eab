"""What `potluck merge` is asked for: adapters or full models, a method with its settings, and where the result goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import ABOUT_FILE, CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.compose.effect import compared, losses, stretch, stretches
from potluck.compose.fit import check_adapter, without_effect
from potluck.compose.lora import attached, merge_into
from potluck.compose.merging.adapters import ADAPTER_METHODS, MEASURED, merge_adapters
from potluck.compose.merging.models import MODEL_METHODS, merge_models
from potluck.compose.statistics import load_statistics
from potluck.errors import ModelError, RecipeError
from potluck.files import appearing, name_of, storing, write_text
from potluck.models.export import save_like

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
        base: What the parts were trained from; adapters are checked against it.
        into_base: The model folder that the merged adapter is added to; then ``out`` is a full model.
        statistics: Files that lie elsewhere than beside their adapters.
        data: Text whose loss is measured with the base and with the result.
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
    data: Path | None = None


@dataclass(frozen=True)
class _Look:
    """Stretches of a text, and the base's losses on them."""

    rows: Sequence[np.ndarray]
    before: Tensor

    @classmethod
    def at(cls, base: Base, data: Path) -> Self:
        rows = stretches(base.model, token_stream(texts_of(data), base.vocabulary), stretch(base.model))
        return cls(rows, losses(base.model, rows))

    def compared(self, merged: PreTrainedModel, out: Path) -> dict[str, Any]:
        """``effect`` of a merge, and ``warnings`` if it has none or does harm."""
        effect = compared(self.before, losses(merged, self.rows), self.rows)
        figures = f"{effect.before:.3f} to {effect.after:.3f} nats per token"
        said = [f"{out}: worse than the base on this text: {figures}"] if effect.harms() else []
        if not effect.change:
            said = [f"{out}: no different from the base on this text: {figures}"]
        return {"effect": effect.table(), "warnings": said}


def carry_out(request: Request) -> dict[str, Any]:
    """Merge, write the result, and say what was done; ``potluck.json`` in the folder says it too.

    Returns:
        What was done, and under ``warnings`` what is doubtful: parts that add nothing or may be another base's, a
        result that is worse than the base on the text.

    Raises:
        CorpusError: There is no text.
        ModelError: A part cannot be read, or parts do not belong together, or not to the base.
        RecipeError: The method has no use for something given, or cannot do without something that is not.
        StorageError: The result cannot be written.
    """
    if request.data is not None and request.base is None and request.into_base is None:
        raise RecipeError("--data compares with the base", "name it: --base, or --into-base for adapters")
    if _holds_adapters(request.parts):
        return _merged_adapters(request)
    _refuse(
        "merging full models", rank=request.rank, into_base=request.into_base, statistics=request.statistics or None
    )
    method = chosen(MODEL_METHODS, request.method, request.settings)
    look = None if request.data is None else _Look.at(load_base(_base_of(request)), request.data)
    facts = merge_models(request.parts, request.out, method, request.weights, request.base)
    said = {} if look is None else look.compared(load_base(request.out).model, request.out)
    return {"model": str(request.out), **facts, "warnings": [], **said}


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
    if request.base is not None and request.into_base is not None:
        raise RecipeError("--base and --into-base name the base twice", "leave one out")
    method = chosen(ADAPTER_METHODS, request.method, request.settings)
    adapters = [load_adapter(folder) for folder in request.parts]
    statistics = _statistics(request, method, adapters)
    parts = list(zip(request.parts, adapters, strict=True))
    base = None if request.base is None and request.into_base is None else load_base(_base_of(request))
    if base is None:
        doubts = [doubt for folder, adapter in parts for doubt in without_effect(adapter, str(folder))]
    else:
        doubts = [doubt for folder, adapter in parts for doubt in check_adapter(base, adapter, str(folder))]
    sources = [{"folder": name_of(folder), "sha256": _sha256(folder / WEIGHTS_FILE)} for folder in request.parts]
    effect: dict[str, Any] = {}
    look = None if base is None or request.data is None else _Look.at(base, request.data)
    with appearing(request.out) as folder:
        merged = merge_adapters(adapters, method, request.weights, request.rank, statistics)
        if base is not None and look is not None:
            with attached(base.model, merged):
                effect = look.compared(base.model, request.out)
            base.model.cpu()
        doubts += effect.pop("warnings", [])
        merged = replace(merged, about={**merged.about, "rank": merged.rank, "sources": sources, **effect})
        if request.into_base is None or base is None:
            save_adapter(merged, folder)
        else:
            _save_with_base(merged, base, folder)
    kind = "folder" if request.into_base is None else "model"
    return {kind: str(request.out), **merged.about, "warnings": doubts}


def _statistics(request: Request, method: Any, adapters: Sequence[Adapter]) -> list[Statistics]:
    if type(method) not in MEASURED and not request.statistics:
        return []
    places = request.statistics or request.parts
    if len(places) != len(adapters):
        raise RecipeError(f"{len(places)} files of statistics for {len(adapters)} adapters")
    return [load_statistics(place, adapter) for place, adapter in zip(places, adapters, strict=True)]


def _save_with_base(adapter: Adapter, base: Base, folder: Path) -> None:
    """The base with the adapter added to its weights, stored as the base is, with its tokenizer."""
    merge_into(base.model, adapter)
    with storing(folder):
        save_like(base.model, Path(base.place), folder)
        write_text(folder / ABOUT_FILE, json.dumps(dict(adapter.about), indent=1))


def _base_of(request: Request) -> Path:
    base = request.base or request.into_base
    assert base is not None
    return base


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
