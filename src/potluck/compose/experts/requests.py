"""What `potluck expert` is asked for: from folders to folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save_file
from torch import Tensor
from transformers import FlexOlmoForCausalLM, PreTrainedModel

from potluck.compose.adapter import save_adapter
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.compose.effect import compared, held_out, losses, stretch, stretches, warnings_of
from potluck.compose.experts import flex_olmo
from potluck.compose.experts.assembly import assembled, router_parameters, tune_router, without
from potluck.compose.experts.parts import load_expert, save_expert, stream_hash
from potluck.compose.experts.training import train_expert
from potluck.compose.lora import attached, train_adapter
from potluck.compose.training import Lesson, settled
from potluck.errors import ModelError, RecipeError
from potluck.files import appearing, storing, write_text
from potluck.models.export import save_like
from potluck.models.mixture import MixtureForCausalLM
from potluck.models.shapes import context_length
from potluck.recipe.schema import ModelFolder
from potluck.tensors import load_tensors
from potluck.untrusted import load_json

RECORD_FILE = "experts.json"
UNTUNED_FILE = "untuned_router.safetensors"
_RANK = 8
PartKind = Literal["adapter", "low-rank", "full"]
Form = Literal["mixture", "flex-olmo"]
Step = Callable[[int], None]


@dataclass(frozen=True)
class _Look:
    """Where a part's effect is seen.

    Attributes:
        own: Stretches of text of its kind, kept back unless ``seen``: there was too little.
        general: Of public text, if there is any.
    """

    own: Sequence[np.ndarray]
    general: Sequence[np.ndarray] | None
    seen: bool
    lesson: Lesson

    def at(self, model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
        device = self.lesson.device
        general = None if self.general is None else losses(model, self.general, device)
        return losses(model, self.own, device), general

    def compared(
        self, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None], out: Path
    ) -> dict[str, Any]:
        """``effect`` and ``warnings`` of a part."""
        own, general = compared(before[0], after[0], self.own, self.seen), None
        if self.general is not None and before[1] is not None and after[1] is not None:
            general = compared(before[1], after[1], self.general)
        effect = {"own": own.table()} | ({} if general is None else {"general": general.table()})
        what = f"{out}, trained at a rate of {self.lesson.learning_rate:g}"
        return {"effect": effect, "warnings": warnings_of(what, own, general)}


@dataclass(frozen=True)
class Mixed:
    """How experts are put together.

    Attributes:
        form: ``mixture``, `MixtureForCausalLM`; or ``flex-olmo``, `FlexOlmoForCausalLM`.
        experts_per_token: As many at most, beside the anchor.
        bias: Of every expert, not above 0.
        router_steps: Of tuning the router on public text.
        seed: Of tuning.
    """

    form: Form = "mixture"
    experts_per_token: int = 4
    bias: float = 0.0
    router_steps: int = 0
    seed: int = 0

    def lesson(self, device: str, length: int) -> Lesson:
        """How the router is tuned; it is the same whenever it is done again."""
        return Lesson(self.router_steps, 8, min(128, length), None, self.seed, device)


def train(
    base_folder: Path,
    data: Path,
    out: Path,
    kind: PartKind,
    lesson: Lesson,
    *,
    rank: int | None = None,
    public: Path | None = None,
    on_step: Step = lambda step: None,
) -> dict[str, Any]:
    """Train one participant's part, an adapter or an expert, and write its folder; the folder's name is its own.

    A tenth of the text is kept back, and its loss without and with the part is part of the record; the general text's
    beside it, where there is one.

    Returns:
        Where it is and what it is, its ``effect``, and ``warnings`` if it has none or does harm.

    Raises:
        RecipeError: An option has no effect on this kind of part, or one is missing.
        ModelError: The base cannot be used.
        CorpusError: A text is missing or too short.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    if kind == "full" and rank is not None:
        raise RecipeError("--rank has no effect on --as full", "leave it out, or choose --as low-rank")
    if kind != "adapter" and public is None:
        hint = "name public text, the same for everybody: the router holds this participant's text against it"
        raise RecipeError(f"--as {kind} needs --public", hint)
    base = load_base(base_folder)
    _check_length(base_folder, lesson)
    lesson = settled(lesson, base.model, "full" if kind == "full" else "low-rank")
    own, kept = held_out(texts_of(data), base.vocabulary, lesson.sequence_length)
    known = None if public is None else token_stream(texts_of(public), base.vocabulary)
    length = lesson.sequence_length
    mine = stretches(base.model, own if kept is None else kept, length)
    look = _Look(mine, None if known is None else stretches(base.model, known, length), kept is None, lesson)
    before = look.at(base.model)
    with appearing(out) as folder:
        if kind == "adapter":
            adapter = train_adapter(base, [own], lesson, rank or _RANK, on_step=on_step)
            with attached(base.model, adapter):
                found = look.compared(before, look.at(base.model), out)
            about = {"training": asdict(lesson), "effect": found["effect"]}
            save_adapter(replace(adapter, about={**adapter.about, **about}), folder)
            return {"adapter": str(out), "rank": adapter.rank, "parameters": adapter.parameters, **found}
        assert known is not None
        ranked = None if kind == "full" else rank or _RANK
        expert = train_expert(base, own, known, lesson, out.name, ranked, on_step)
        found = look.compared(before, look.at(assembled(base, [expert])), out)
        expert = replace(expert, about={**expert.about, "effect": found["effect"]})
        save_expert(expert, folder)
    facts = {"expert": str(out), "kind": kind, "rank": expert.rank, "parameters": expert.parameters}
    return {**facts, **expert.about, "warnings": found["warnings"]}


def assemble(
    base_folder: Path,
    parts: Sequence[Path],
    out: Path,
    how: Mixed,
    public: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Write a model of a base and its experts.

    Raises:
        RecipeError: An option has no effect, or one is missing.
        ModelError: The experts do not go together, or not with this base in this form.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    _check(how, public)
    base = load_base(base_folder)
    experts = [load_expert(part) for part in parts]
    lesson = how.lesson(device, context_length(ModelFolder(path=str(base_folder))))
    known = None if public is None else token_stream(texts_of(public), base.vocabulary)
    record: dict[str, Any] = {
        "base_hash": base.content_hash,
        "how": asdict(how),
        "public_hash": stream_hash(known) if known is not None and how.router_steps else None,
        "experts": [expert.facts for expert in experts],
    }
    with appearing(out) as folder:
        model: PreTrainedModel
        if how.form == "mixture":
            model = assembled(base, experts, how.experts_per_token, how.bias)
        else:
            assert known is not None
            model = flex_olmo.exported(base, experts, known, lesson, how.experts_per_token)
        if how.router_steps:
            assert known is not None
            _keep_untuned(model, folder)
            tune_router(model, known, lesson)
        found = {} if known is None else _on_public(base, model, known, out, device)
        _write(model, base_folder, folder, record)
    names = [expert.name for expert in experts]
    return {"model": str(out), "form": how.form, "experts": names, **_size(model), **found}


def _on_public(base: Base, model: PreTrainedModel, known: np.ndarray, out: Path, device: str) -> dict[str, Any]:
    """What a mixture does to public text."""
    rows = stretches(base.model, known, stretch(base.model))
    effect = compared(losses(base.model, rows, device), losses(model, rows, device), rows)
    return {"effect": {"general": effect.table()}, "warnings": warnings_of(str(out), None, effect)}


def remove(
    model_folder: Path, name: str, out: Path, public: Path | None = None, *, untuned: bool = False, device: str = "auto"
) -> dict[str, Any]:
    """Write the model that `assemble` would have written without this expert, bit for bit.

    A router that was tuned beside the expert has learned of it. It is put back to what it was, and tuned anew on the
    same public text, or left untuned.

    Args:
        public: The text that the router was tuned on.
        untuned: Leave the router as it was before it was tuned.

    Raises:
        ModelError: There is no such expert, or no other, or the folder is no mixture.
        RecipeError: The router was tuned and neither is given, or an option has no effect.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    record = _record(model_folder)
    how = Mixed(**record["how"])
    _check_leaving(how, public, untuned)
    base = load_base(model_folder)
    left = _left(base, record, name, _untuned(model_folder) if how.router_steps else {})
    record["experts"] = [facts for facts in record["experts"] if facts["name"] != name]
    if untuned:
        record |= {"how": asdict(replace(how, router_steps=0, seed=0)), "public_hash": None}
    with appearing(out) as folder:
        if public is not None:
            known = token_stream(texts_of(public), base.vocabulary)
            if stream_hash(known) != record["public_hash"]:
                raise ModelError(f"{public}: not the text that {model_folder} was tuned on", "or leave it --untuned")
            _keep_untuned(left, folder)
            tune_router(left, known, how.lesson(device, context_length(ModelFolder(path=str(model_folder)))))
        _write(left, model_folder, folder, record)
    return {"model": str(out), "form": how.form, "experts": [f["name"] for f in record["experts"]], **_size(left)}


def _check(how: Mixed, public: Path | None) -> None:
    if how.form == "flex-olmo" and public is None:
        raise RecipeError("--as flex-olmo needs --public", "its router's rows are held against public text")
    if how.form == "flex-olmo" and how.bias:
        raise RecipeError("--bias cannot be expressed in FlexOlmo, whose router has none", "leave out --as")
    if how.form == "mixture" and bool(public) != bool(how.router_steps):
        raise RecipeError("--public and --router-steps tune the router together", "give both, or neither")
    if how.seed and not how.router_steps:
        raise RecipeError("--seed has no effect without --router-steps")


def _check_leaving(how: Mixed, public: Path | None, untuned: bool) -> None:
    if not how.router_steps and (public or untuned):
        raise RecipeError("--public and --untuned have no effect: the router was not tuned", "leave them out")
    if how.router_steps and bool(public) == untuned:
        hint = "name the same text with --public to tune it anew, or give --untuned to go without"
        raise RecipeError("the router was tuned beside the expert, and has learned of it", hint)


def _check_length(base_folder: Path, lesson: Lesson) -> None:
    context = context_length(ModelFolder(path=str(base_folder)))
    if lesson.sequence_length > context:
        raise RecipeError(f"--sequence-length {lesson.sequence_length}: the base's context is {context} tokens")


def _left(base: Base, record: Mapping[str, Any], name: str, rows: Mapping[str, Any]) -> PreTrainedModel:
    """The loaded mixture without an expert, its router as before tuning."""
    model, how = base.model, Mixed(**record["how"])
    if not isinstance(model, MixtureForCausalLM | FlexOlmoForCausalLM):
        raise ModelError(f"{base.place}: not a mixture of experts")
    for place, parameter in router_parameters(model).items():
        if rows:
            if place not in rows or rows[place].shape != parameter.shape:
                raise ModelError(f"{base.place}/{UNTUNED_FILE}: does not fit the model", "is it damaged?")
            parameter.data.copy_(rows[place])
    if isinstance(model, MixtureForCausalLM):
        return without(model, name)
    return flex_olmo.without(model, name, [facts["name"] for facts in record["experts"]], how.experts_per_token)


def _write(model: PreTrainedModel, tokenizer_from: Path, folder: Path, record: Mapping[str, Any]) -> None:
    with storing(folder):
        save_like(model, tokenizer_from, folder)
        write_text(folder / RECORD_FILE, json.dumps(record, indent=1))


def _keep_untuned(model: PreTrainedModel, folder: Path) -> None:
    rows = {name: parameter.detach().cpu().clone() for name, parameter in router_parameters(model).items()}
    with storing(folder):
        save_file(rows, folder / UNTUNED_FILE)


def _untuned(folder: Path) -> dict[str, Any]:
    try:
        return dict(load_tensors(folder / UNTUNED_FILE))
    except ValueError as error:
        raise ModelError(f"{folder}/{UNTUNED_FILE}: cannot be read ({error})") from None


def _record(folder: Path) -> dict[str, Any]:
    try:
        table = load_json(folder / RECORD_FILE)
        how = Mixed(**table["how"])
        numbers = (how.experts_per_token, how.router_steps, how.seed)
        if not all(isinstance(number, int) for number in numbers) or how.experts_per_token < 1:
            raise ValueError("how they were put together is not said")
        if not all(isinstance(facts["name"], str) for facts in table["experts"]):
            raise ValueError("an expert has no name")
        return dict(table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "name a folder that `potluck expert assemble` wrote"
        raise ModelError(f"{folder}: no record of its experts ({error})", hint) from None


def _size(model: PreTrainedModel) -> dict[str, int]:
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}
