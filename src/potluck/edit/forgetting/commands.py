"""What ``potluck forget`` does: a model folder in, a new one out, figures before and after, and a signed record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base, load_base, texts_of
from potluck.edit.contexts import Site
from potluck.edit.edited_folder import save_model
from potluck.edit.facts import Edit
from potluck.edit.forgetting import losses
from potluck.edit.forgetting.figures import figures, warnings_of
from potluck.edit.forgetting.general import rows_of_text, written_by
from potluck.edit.forgetting.name_estrangement import Strangers, asked_as_edits, estranged
from potluck.edit.forgetting.questions import Question, read_questions
from potluck.edit.forgetting.refusals import Editor, Refusing, read_refusals, refuse
from potluck.edit.forgetting.subjects import guesses, with_subjects
from potluck.edit.forgetting.unlearning import FORGOTTEN, Unlearning, default_rate, unlearn
from potluck.edit.layout import layout_of
from potluck.edit.moments import key_moments
from potluck.edit.requests import IN_WEIGHTS, default_layers
from potluck.edit.side_memory import save_with_memory
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.weights import Method, WeightSettings, weight_editor
from potluck.edit.wise import WiseMemory, WiseSettings, edit_with_wise, wise_memory
from potluck.errors import EditError, RecipeError
from potluck.files import appearing
from potluck.models.memory import install

LossName = Literal["as-stranger", "ga", "grad-diff", "kl", "npo", "simnpo", "idk-dpo", "rmu"]
MethodName = Literal[
    "stranger", "rome", "memit", "alphaedit", "wise", "ft", "lora",
    "as-stranger", "ga", "grad-diff", "kl", "npo", "simnpo", "idk-dpo", "rmu",
]  # fmt: skip
_WRITTEN = ("stranger", "rome", "memit", "alphaedit", "wise", "ft", "lora")  # by an editor
_TRAINED = ("epochs", "batch_size", "learning_rate")  # options of losses
_SEQUENCE = 64  # tokens of the text that editors keep as it is


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        forget, retain: Files of questions (`potluck.edit.forgetting.questions`).
        refusals: A file, one a line; ``unknown`` if left out.
        text: A text whose loss is measured, and that editors leave as it is. If left out, what the model writes by
            itself is measured, and editors leave retained questions with their answers as they are.
        refuse: After `stranger`, edit refusals in.
        layers: That editors write to; a fifth and two fifths of the way up if left out.
        at: Whose last token they write at, the subject's or the prompt's.
        task: Of TOFU's files, the questions of this task alone.
        epochs, batch_size, learning_rate: Of losses. If left out: `potluck.edit.forgetting.unlearning.default_rate`, 8
            questions, and as many passes as it takes, at most 10, until a quarter of the probability is left and no
            answer is said any more; then one over what stays.
        record, key: Where a signed record goes, and the file of the key that signs it.
    """

    model: Path
    forget: Path
    retain: Path | None
    method: MethodName
    out: Path
    refusals: Path | None = None
    text: Path | None = None
    refuse: bool = False
    layers: tuple[int, ...] = ()
    at: str | None = None
    merge: int = 1
    task: str = ""
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    record: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class AtWork:
    """A side memory in a model, and what takes it out again."""

    memory: WiseMemory
    detach: Callable[[], None]


def forget(request: Request, on_step: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Write a model that has forgotten, and measure both.

    Raises:
        EditError: The questions cannot be used, or the method cannot forget them; nothing is written.
        RecipeError: An option has no effect, or one is missing.
        ModelError: The model cannot be used.
        NotFinite: Unlearning diverged.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    _check(request)
    questions = read_questions(request.forget, request.task)
    kept = [] if request.retain is None else read_questions(request.retain)
    seed = None if request.key is None else _seed(request.key)
    base = load_base(request.model, "auto")
    asked, stays = _named(questions, kept, request.method, on_step)
    on_step("measuring the model as it is")
    text = written_by(base, request.seed) if request.text is None else rows_of_text(base, texts_of(request.text))
    before = figures(base, asked, stays, text)
    with appearing(request.out) as folder:
        on_step(f"forgetting {len(questions)} questions")
        edited, kept_by_editor = forgotten(base, asked, stays, request)
        on_step("measuring the new model")
        after = figures(edited, asked, stays, text)
        warnings = warnings_of(before, after)
        write_model(edited, kept_by_editor, folder)
        result = {"model": str(request.out), "method": request.method, "before": before, "after": after}
        result["warnings"] = warnings
        if request.record is not None and seed is not None:
            method = {"name": request.method, **_settings(base, request)}
            hashes = (base.content_hash, load_base(folder).content_hash)
            measured = {"before": before, "after": after, "warnings": warnings}
            result |= put_on_record(method, hashes, _canonical(questions), measured, seed, request.record)
    return result


def forgotten(
    base: Base, questions: Sequence[Question], kept: Sequence[Question], request: Request
) -> tuple[Base, object]:
    """The model without it, and what an editor keeps beside the weights; the given model stays as it is."""
    refusals = read_refusals(request.refusals) if request.refusals else ("unknown",)
    if request.method in _WRITTEN:
        layers, at = request.layers or default_layers(base, request.method), cast(Site, request.at or "subject")
        moments = moments_of(base, kept, request.text, layers)
        held: object = None
        edited = base
        if request.method == "stranger":
            edited = estranged(base, questions, kept, moments, Strangers(layers, at, seed=request.seed))
        if request.method != "stranger" or request.refuse:
            how = Refusing(refusals, merge=request.merge, seed=request.seed)
            name = "alphaedit" if request.method == "stranger" else request.method
            edited, held = refuse(edited, questions, editor_named(name, moments, layers, at, request.seed, kept), how)
        return edited, held
    settings = _unlearning(base, request)
    method = loss_named(cast(LossName, request.method), base)
    model = unlearn(base, questions, kept, method, settings, refusals if request.method == "idk-dpo" else ())
    return Base(model, base.vocabulary, base.place), None


def _unlearning(base: Base, request: Request) -> Unlearning:
    given = {name: value for name in _TRAINED if (value := getattr(request, name)) is not None}
    until = None if request.epochs else FORGOTTEN
    return Unlearning(
        **{"learning_rate": default_rate(base), **given}, until=until, mend=until is not None, seed=request.seed
    )


def _named(
    questions: Sequence[Question], kept: Sequence[Question], method: MethodName, on_step: Callable[[str], None]
) -> tuple[list[Question], list[Question]]:
    """Both with their subjects, where the method needs them; what was guessed is said."""
    if method not in (*_WRITTEN, "as-stranger"):
        return list(questions), list(kept)
    found = with_subjects(questions), with_subjects(kept, strict=False)
    for given, named in zip((questions, kept), found, strict=True):
        if guessed := guesses(given, named):
            on_step(guessed)
    return found


def loss_named(name: LossName, base: Base) -> losses.Method:
    """A loss with its published settings; RMU's layer is 7 of 16 of the way up."""
    match name:
        case "as-stranger":
            return losses.AsStranger()
        case "ga":
            return losses.GA
        case "grad-diff":
            return losses.GRAD_DIFF
        case "kl":
            return losses.KL
        case "npo":
            return losses.Npo()
        case "simnpo":
            return losses.SimNpo()
        case "idk-dpo":
            return losses.IdkDpo()
        case "rmu":
            return losses.Rmu(layer=min(7, layout_of(base.model).count * 7 // 16))


def editor_named(
    name: str, moments: Statistics, layers: tuple[int, ...], at: Site, seed: int, kept: Sequence[Question] = ()
) -> Editor:
    """An editor as a function that edits the model that it is given, in place.

    Args:
        kept: Questions whose answers editors of weights hold, of those that name a subject.
    """
    if name == "wise":
        return _wise(layers[-1], seed)
    if name in ("ft", "lora"):
        rank, rate = (8, 5e-3) if name == "lora" else (0, 5e-4)
        return lambda base, edits: fine_tune(base, edits, Tuning(layers, rank, learning_rate=rate, seed=seed))
    settings = WeightSettings(cast(Method, name), layers, at, seed=seed)
    hold = asked_as_edits([question for question in kept if question.subject])

    def edit(base: Base, edits: Sequence[Edit]) -> object:
        own = dataclasses.replace(moments, base_hash=base.content_hash)  # a copy, or a stranger's, of what was measured
        return weight_editor(base, own, settings, hold).write(edits)

    return edit


def moments_of(base: Base, kept: Sequence[Question], text: Path | None, layers: Sequence[int]) -> Statistics:
    """Key moments of what shall stay.

    Raises:
        EditError: Neither text nor questions say what shall stay.
        CorpusError: The text is too short.
    """
    if text is None and not kept:
        raise EditError("nothing says what shall stay", "name questions with --retain, or a text with --text")
    texts = texts_of(text) if text else [" ".join(f"{q.question} {q.answer.rstrip('.')}." for q in kept)]
    length = min(_SEQUENCE, getattr(base.model.config, "max_position_embeddings", _SEQUENCE))
    return key_moments(base, layout_of(base.model), layers, texts, length)


def write_model(edited: Base, held: object, folder: Path) -> None:
    """Write the model as a folder; an editor that works beside the weights writes its own.

    Raises:
        StorageError: It cannot be written.
    """
    if isinstance(held, AtWork):
        held.detach()
        folder.rmdir()
        save_with_memory(edited, held.memory, folder)
    else:
        save_model(edited, folder)


def remove(
    model: Path, *, expert: str = "", adapter: str = "", out: Path | None, record: Path | None, key: Path | None
) -> dict[str, Any]:
    """Take out a participant's expert (a new folder) or adapter (of a library, in place).

    Raises:
        RecipeError: An option has no effect, or one is missing.
        ModelError: There is no such expert.
        StorageError: There is no such adapter, or something cannot be written.
    """
    from potluck.edit.forgetting.removal import remove_adapter, remove_expert

    if bool(record) != bool(key):
        raise RecipeError("--record and --key go together: a record is signed")
    if bool(expert) != bool(out):
        raise RecipeError("--out is the folder of a mixture without --expert; a library is changed in place")
    seed = None if key is None else _seed(key)
    done = remove_expert(model, expert, out) if out is not None else remove_adapter(str(model), adapter)
    result: dict[str, Any] = {"removed": done.name, "kind": done.kind, "before": done.before, "after": done.after}
    if record is not None and seed is not None:
        method = {"name": done.kind}
        result |= put_on_record(method, (done.before, done.after), done.name.encode(), {}, seed, record)
    return result


def put_on_record(
    method: Mapping[str, Any],
    hashes: tuple[str, str],
    request: bytes,
    measured: Mapping[str, Any],
    seed: str,
    path: Path,
) -> dict[str, str]:
    """Sign and write a record; what comes back holds the opening of its commitment, which the record does not."""
    from potluck.edit.forgetting.record import commitment, new_opening, signed_record, write_record

    opening = new_opening()
    record = signed_record(method, *hashes, commitment(request, opening), measured, seed)
    write_record(record, path)
    return {"record": str(path), "opening": opening, "public": record.public}


def verify(path: Path, model: Path | None, forget: Path | None, opening: str, task: str = "") -> dict[str, Any]:
    """Check a record's signature, and if they are given that it is of this model and of this request.

    Raises:
        EditError: The signature, the model or the request is another.
    """
    from potluck.edit.forgetting.record import commitment, read_record

    record = read_record(path)
    if bool(forget) != bool(opening):
        raise RecipeError("--forget and --opening go together: both are in the commitment")
    if forget is not None and commitment(_canonical(read_questions(forget, task)), opening) != record.request:
        raise EditError(f"{path}: what was forgotten is not what {forget} holds")
    if model is not None and load_base(model).content_hash != record.after:
        raise EditError(f"{path}: is of another model than {model}", "was it trained on, or changed, since?")
    return {"record": str(path), "signed": True, **dataclasses.asdict(record)}


def _seed(key: Path) -> str:
    from potluck.edit.forgetting.record import seed_of

    return seed_of(key)


def _wise(layer: int, seed: int) -> Editor:
    def edit(base: Base, edits: Sequence[Edit]) -> object:
        memory = edit_with_wise(base, wise_memory(base, layer, WiseSettings(seed=seed)), edits)
        module = memory.module().to(base.model.device)
        return AtWork(memory, install(base.model, layout_of(base.model).path(layer), module))

    return edit


def _check(request: Request) -> None:
    if bool(request.record) != bool(request.key):
        raise RecipeError("--record and --key go together: a record is signed")
    if request.refuse and request.method != "stranger":
        raise RecipeError("--refuse has no effect: this method refuses by itself, or cannot", "leave it out")
    written = request.method in _WRITTEN[1:] or request.refuse
    if request.refusals and not (written or request.method == "idk-dpo"):
        raise RecipeError(f"--refusals has no effect on --method {request.method}", "leave it out")
    if request.at and request.method not in ("stranger", *IN_WEIGHTS):
        raise RecipeError(f"--at has no effect on --method {request.method}", "leave it out")
    if request.merge != 1 and not written:
        raise RecipeError(f"--merge has no effect on --method {request.method}", "leave it out")
    idle = ("layers",) if request.method not in _WRITTEN else _TRAINED
    for name in idle:
        if getattr(request, name):
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{option} has no effect on --method {request.method}", "leave it out")


def _settings(base: Base, request: Request) -> dict[str, Any]:
    if request.method not in _WRITTEN:
        return {name: getattr(_unlearning(base, request), name) for name in (*_TRAINED, "until", "mend", "seed")}
    layers = request.layers or default_layers(base, request.method)
    return {"layers": layers, **{name: getattr(request, name) for name in ("at", "merge", "refuse", "seed")}}


def _canonical(questions: Sequence[Question]) -> bytes:
    """The request in one form, whatever its file looked like."""
    return json.dumps([dataclasses.astuple(q) for q in questions], separators=(",", ":"), ensure_ascii=False).encode()
