"""What `potluck edit apply` and `potluck edit revert` are asked for: edits into a model folder, and out of it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, cast

from potluck.compose.base import Base, load_base, texts_of
from potluck.edit.contexts import Site
from potluck.edit.evaluation import Before, answered, answers_before, unchanged
from potluck.edit.facts import Edit, read_edits
from potluck.edit.grace import GraceMemory, grace_memory
from potluck.edit.kept import load_edited, save_edited, save_model
from potluck.edit.layout import layout_of
from potluck.edit.memories import attached, save_with_memory
from potluck.edit.moments import kept_moments
from potluck.edit.remembered import Memory, has_memory, load_memory, with_edits, without
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.weights import Method, WeightEditor, WeightSettings, weight_editor
from potluck.edit.wise import WiseSettings, wise_memory
from potluck.errors import EditError, RecipeError, StorageError
from potluck.files import appearing

IN_WEIGHTS = ("rome", "memit", "alphaedit")
BESIDE = ("grace", "wise")
TUNED = ("ft", "lora")


@dataclass(frozen=True)
class Request:
    """Edits of one model.

    Attributes:
        model: The folder to edit; it stays as it is.
        edits: The file of edits.
        out: The folder to write, a new one.
        method: A name in `IN_WEIGHTS`, `BESIDE` or `TUNED`.
        layers: Whose maps are edited; the method's own choice if empty.
        text: Text that shall stay as it is, for the methods in `IN_WEIGHTS`.
        at: Whose last token they edit, the subject's or the prompt's.
        at_once: Edits in one batch; all of them if 0.
        seed: Of contexts and of training.
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


def apply(request: Request, moments_folder: Path = Path("runs/moments")) -> dict[str, Any]:
    """Make edits true and write the edited model.

    Args:
        moments_folder: Where key moments are kept between calls.

    Raises:
        EditError: The edits are wrong, or cannot be made.
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
    before = answers_before(base, edits)
    layers = request.layers or default_layers(base, request.method)
    batches = _batches(edits, request.at_once)
    if request.method in TUNED:
        rank, rate = (8, 5e-3) if request.method == "lora" else (0, 5e-4)
        for batch in batches:
            fine_tune(base, batch, Tuning(layers=layers, rank=rank, learning_rate=rate, seed=request.seed))
        with appearing(request.out) as folder:
            save_model(base, folder)
        said = _said(base, edits, before)
    elif request.method in BESIDE:
        memory = _remembered(base, request, layers, batches)
        with attached(base, memory):
            said = _said(base, edits, before)
        save_with_memory(base, memory, request.out)
    else:
        editor = _written(base, request, layers, batches, moments_folder)
        said = _said(base, edits, before)
        save_edited(editor, request.out)
    return {"model": str(request.out), "method": request.method, "layers": list(layers), **said}


def _written(
    base: Base, request: Request, layers: tuple[int, ...], batches: Sequence[Sequence[Edit]], moments_folder: Path
) -> WeightEditor:
    assert request.text is not None
    method, at = cast(Method, request.method), cast(Site, request.at or "subject")
    layout = layout_of(base.model)
    moments = kept_moments(base, layout, layout.check_layers(layers), texts_of(request.text), moments_folder)
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
    before = answers_before(editor.base, edits)
    editor.settings = replace(editor.settings, seed=request.seed)
    for batch in _batches(edits, request.at_once):
        editor.write(batch)
    save_edited(editor, request.out)
    said = _said(editor.base, edits, before)
    return {"model": str(request.out), "method": request.method, "layers": list(editor.settings.layers), **said}


def _remember_more(request: Request, edits: Sequence[Edit]) -> dict[str, Any]:
    """Further edits of a model with a side memory."""
    base, memory = load_memory(request.model)
    kept = {"method": "grace" if isinstance(memory, GraceMemory) else "wise", "layers": (memory.layer,)}
    for name, value in (("method", request.method), ("layers", request.layers or kept["layers"])):
        if value != kept[name]:
            hint = "go on with the same, or begin with an unedited model"
            raise EditError(f"{request.model}: was edited with {name} {kept[name]}, not {value}", hint)
    with attached(base, memory):
        before = answers_before(base, edits)
    memory = reduce(partial(with_edits, base), _batches(edits, request.at_once), memory)
    with attached(base, memory):
        said = _said(base, edits, before)
    save_with_memory(base, memory, request.out)
    return {"model": str(request.out), "method": request.method, "layers": [memory.layer], **said}


def _check(request: Request) -> None:
    if request.out.exists():
        raise StorageError(f"{request.out}: there is something here already", "name a new folder")
    if request.method not in IN_WEIGHTS:
        for option, value in (("--text", request.text), ("--at", request.at)):
            if value is not None:
                raise RecipeError(f"{option} has no effect on {request.method}", "leave it out")
    if request.method in IN_WEIGHTS and request.text is None and not (request.model / "edits").is_dir():
        hint = "name a text of your own: its keys are what the edits leave alone"
        raise RecipeError(f"{request.method} needs --text", hint)


def _batches(edits: Sequence[Edit], at_once: int) -> list[Sequence[Edit]]:
    size = at_once or len(edits)
    return [edits[begin : begin + size] for begin in range(0, len(edits), size)]


def _said(base: Base, edits: Sequence[Edit], before: Before) -> dict[str, Any]:
    """What the model now answers by itself, as `potluck evaluate --edits` counts it, which says more."""
    told = answered(base, [(edit.prompt, edit.target) for edit in edits])
    found = {"edits": len(edits), "told": _share(told.begins), "told_exactly": _share(told.exactly)}
    if before.said:
        kept = unchanged(base, edits, before, answers_before(base, edits))
        found["neighbours_unchanged"] = _share(kept.begins)
        found["neighbours_exactly_unchanged"] = _share(kept.exactly)
    return found


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
