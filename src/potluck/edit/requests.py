"""What `potluck edit apply` and `potluck edit revert` are asked for: edits into a model folder, and out of it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, cast

from potluck.compose.base import Base, load_base, texts_of
from potluck.edit.consequences import consequences, parted, watch
from potluck.edit.contexts import Site
from potluck.edit.edited_folder import load_edited, save_edited, save_model
from potluck.edit.facts import Edit, read_edits
from potluck.edit.grace import GraceMemory, grace_memory
from potluck.edit.layout import layout_of
from potluck.edit.memory_folder import Memory, has_memory, load_memory, with_edits, without
from potluck.edit.moments import kept_moments
from potluck.edit.side_memory import attached, save_with_memory
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.weights import Method, WeightEditor, WeightSettings, weight_editor
from potluck.edit.wise import WiseSettings, wise_memory
from potluck.errors import EditError, RecipeError, StorageError
from potluck.files import appearing, name_of, storing, write_text

IN_WEIGHTS = ("rome", "memit", "alphaedit")
BESIDE = ("grace", "wise")
TUNED = ("ft", "lora")
REPORT = "edit-report.json"


@dataclass(frozen=True)
class Request:
    """Edits of one model.

    Attributes:
        model: The folder to edit; it stays as it is.
        edits: The file of edits.
        out: The folder to write, a new one.
        method: A name in `IN_WEIGHTS`, `BESIDE` or `TUNED`.
        layers: Whose maps are edited; the method's own choice if empty.
        text: Text whose loss is measured before and after, by its end; what is before it stays as it is, for the
            methods in `IN_WEIGHTS`.
        at: Whose last token they edit, the subject's or the prompt's.
        at_once: Edits in one batch; all of them if 0.
        seed: Of contexts and of training.
        strict: Write nothing if there is something to warn of.
    """

    model: Path
    edits: Path
    out: Path
    method: str
    layers: tuple[int, ...] = ()
    text: Path | None = None
    at: str | None = None
    at_once: int = 0
    seed: int = 0
    strict: bool = False


def apply(request: Request, moments_folder: Path = Path("runs/moments")) -> dict[str, Any]:
    """Make edits true, write the edited model, and measure what that did (`potluck.edit.consequences`).

    Args:
        moments_folder: Where key moments are kept between calls.

    Raises:
        EditError: The edits are wrong, cannot be made, or had no effect or did harm where that is not allowed.
        RecipeError: An option has no effect, or one is missing.
        ModelError: The model cannot be used.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    left_out: list[str] = []
    edits = read_edits(request.edits, left_out=left_out)
    _check(request)
    if request.method in IN_WEIGHTS and (request.model / "edits").is_dir():
        found = _go_on(request, edits)
    elif has_memory(request.model):
        found = _remember_more(request, edits)
    else:
        found = _begin(request, edits, moments_folder)
    return found | ({"left_out": left_out} if left_out else {})


def _begin(request: Request, edits: Sequence[Edit], moments_folder: Path) -> dict[str, Any]:
    """Edits of a model that has none."""
    base = load_base(request.model, "auto")
    protected, held = parted(_texts(request))
    watched = watch(base, edits, held, request.seed)
    layers = request.layers or default_layers(base, request.method)
    made = edited(base, request, layers, edits, protected, moments_folder)
    if isinstance(made, WeightEditor):
        found = {"tokens_protected": made.moments.count, **consequences(base, watched, request.seed)}
        return _finished(request, layers, found, partial(save_edited, made))
    with nullcontext() if made is None else attached(base, made):
        found = consequences(base, watched, request.seed)
    save = partial(_save_tuned, base) if made is None else partial(save_with_memory, base, made)
    return _finished(request, layers, found, save)


def edited(
    base: Base,
    request: Request,
    layers: tuple[int, ...],
    edits: Sequence[Edit],
    protected: Sequence[str],
    moments_folder: Path,
) -> WeightEditor | Memory | None:
    """Make edits of a model by the request's method, in place or in a memory beside it, and give the editor.

    Args:
        base: Changed by all methods but those in `BESIDE`.
        request: Its method, ``at``, ``at_once`` and seed.
        protected: Text that shall stay as it is, for the methods in `IN_WEIGHTS`.
        moments_folder: Where key moments are kept.

    Raises:
        EditError: The edits cannot be made.
    """
    batches = _batches(edits, request.at_once)
    if request.method in TUNED:
        for batch in batches:
            fine_tune(base, batch, tuning_of(request.method, layers, request.seed))
        return None
    if request.method in BESIDE:
        return _remembered(base, request, layers, batches)
    return _written(base, request, layers, batches, protected, moments_folder)


def tuning_of(method: str, layers: tuple[int, ...], seed: int) -> Tuning:
    """How ``ft`` and ``lora`` train."""
    rank, rate = (8, 1e-3) if method == "lora" else (0, 5e-4)
    return Tuning(layers=layers, rank=rank, learning_rate=rate, seed=seed)


def _finished(
    request: Request, layers: Sequence[int], found: dict[str, Any], save: Callable[[Path], None]
) -> dict[str, Any]:
    """Write the folder, and beside the model what came of the edits."""
    if request.strict and "warnings" in found:
        hint = "nothing was written; without --strict the folder is, with these warnings"
        raise EditError("; ".join(found["warnings"]), hint)
    save(request.out)
    found = {"model": str(request.out), "method": request.method, "layers": list(layers), **found}
    with storing(request.out):
        told = {**found, "model": name_of(request.out)}
        write_text(request.out / REPORT, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return found


def _save_tuned(base: Base, out: Path) -> None:
    with appearing(out) as folder:
        save_model(base, folder)


def _texts(request: Request) -> list[str]:
    return [] if request.text is None else texts_of(request.text)


def _written(
    base: Base,
    request: Request,
    layers: tuple[int, ...],
    batches: Sequence[Sequence[Edit]],
    protected: Sequence[str],
    moments_folder: Path,
) -> WeightEditor:
    method, at = cast(Method, request.method), cast(Site, request.at or "subject")
    layout = layout_of(base.model)
    moments = kept_moments(base, layout, layout.check_layers(layers), protected, moments_folder)
    editor = weight_editor(base, moments, WeightSettings(method=method, layers=layers, at=at, seed=request.seed))
    for batch in batches:
        editor.write(batch)
    return editor


def _remembered(base: Base, request: Request, layers: tuple[int, ...], batches: Sequence[Sequence[Edit]]) -> Memory:
    if len(layers) != 1:
        raise EditError(f"{request.method} has a memory beside one layer, not {len(layers)}", "name one with --layers")
    empty: Memory = grace_memory(base, layers[0])
    if request.method == "wise":
        empty = wise_memory(base, layers[0], WiseSettings(seed=request.seed))
    return reduce(partial(with_edits, base), batches, empty)


def revert(model: Path, ids: Sequence[str], out: Path) -> dict[str, Any]:
    """Write the model without some of its edits.

    Raises:
        EditError: One was never made, or it is not known what was done to this model.
        ModelError: The model cannot be used.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    if out.exists():
        raise StorageError(f"{out}: there is something here already", "name a new folder")
    if has_memory(model):
        base, memory = load_memory(model)
        memory = without(base, memory, ids)
        save_with_memory(base, memory, out)
        return {"model": str(out), "reverted": list(ids), "edits": len(memory.edits)}
    editor = load_edited(model)
    editor.revert(ids)
    save_edited(editor, out)
    return {"model": str(out), "reverted": list(ids), "edits": len(editor.edits)}


def default_layers(base: Base, method: str) -> tuple[int, ...]:
    """Layers at a sixth to a half of the depth, where causal tracing found facts in models of every size.

    Ten in a model of 30 layers change fewer answers about others than five do (docs/log.md).

    A memory is beside the last layer but one: late, but with something after it that can use what it says.
    """
    count = layout_of(base.model).count
    if method in BESIDE:
        return (max(0, count - 2),)
    first, last = count // 6, max(count // 6, count // 2 - 1)
    return (last,) if method in ("rome", "ft", "lora") else tuple(range(first, last + 1))


def _go_on(request: Request, edits: Sequence[Edit]) -> dict[str, Any]:
    """Further edits of a model whose earlier ones are known."""
    editor = load_edited(request.model)
    kept: dict[str, Any] = {name: getattr(editor.settings, name) for name in ("method", "layers", "at")}
    given = {name: getattr(request, name) or kept[name] for name in kept}
    for name, value in given.items():
        if value != kept[name]:
            hint = "go on with the same, or begin with an unedited model"
            raise EditError(f"{request.model}: was edited with {name} {kept[name]}, not {value}", hint)
    watched = watch(editor.base, edits, parted(_texts(request))[1], request.seed)
    editor.settings = replace(editor.settings, seed=request.seed)
    for batch in _batches(edits, request.at_once):
        editor.write(batch)
    found = consequences(editor.base, watched, request.seed)
    return _finished(request, editor.settings.layers, found, partial(save_edited, editor))


def _remember_more(request: Request, edits: Sequence[Edit]) -> dict[str, Any]:
    """Further edits of a model with a side memory."""
    base, memory = load_memory(request.model)
    kept = {"method": "grace" if isinstance(memory, GraceMemory) else "wise", "layers": (memory.layer,)}
    for name, value in (("method", request.method), ("layers", request.layers or kept["layers"])):
        if value != kept[name]:
            hint = "go on with the same, or begin with an unedited model"
            raise EditError(f"{request.model}: was edited with {name} {kept[name]}, not {value}", hint)
    with attached(base, memory):
        watched = watch(base, edits, parted(_texts(request))[1], request.seed)
    memory = reduce(partial(with_edits, base), _batches(edits, request.at_once), memory)
    with attached(base, memory):
        found = consequences(base, watched, request.seed)
    return _finished(request, [memory.layer], found, partial(save_with_memory, base, memory))


def _check(request: Request) -> None:
    if request.out.exists():
        raise StorageError(f"{request.out}: there is something here already", "name a new folder")
    if request.method not in IN_WEIGHTS and request.at is not None:
        raise RecipeError(f"--at has no effect on {request.method}", "leave it out")
    if request.method in IN_WEIGHTS and request.text is None and not (request.model / "edits").is_dir():
        hint = "name a text of your own: its keys are what the edits leave alone"
        raise RecipeError(f"{request.method} needs --text", hint)


def _batches(edits: Sequence[Edit], at_once: int) -> list[Sequence[Edit]]:
    size = at_once or len(edits)
    return [edits[begin : begin + size] for begin in range(0, len(edits), size)]
