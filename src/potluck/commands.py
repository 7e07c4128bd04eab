"""What the verbs do. Each returns plain data and tells its progress to a console."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from potluck.comparison import Planned, planned_runs
from potluck.compose.base import Base, load_base, texts_of
from potluck.compose.decoding.decode import Sampling, decode
from potluck.compose.decoding.deferral import Lesson, learn_deferral
from potluck.compose.decoding.factory import Choice, opened, rule_of
from potluck.compose.decoding.gates import save_deferral
from potluck.compose.decoding.models import Here, NextToken
from potluck.corpus.shards import Corpus
from potluck.corpus.tokenizer import Vocabulary, chat_templates, load_vocabulary, save_vocabulary
from potluck.embedded import Workplace, embedded_run, environment, held_out_of, identity, prepare
from potluck.errors import (
    CheckpointError,
    CorpusError,
    Interrupted,
    MissingExtra,
    ModelError,
    RecipeError,
    RunFolderError,
    StorageError,
)
from potluck.files import name_of, nearby, storing, write_text
from potluck.local.evaluate import negative_log_likelihood
from potluck.local.generate import chat_turn, room
from potluck.local.generate import generate as continue_text
from potluck.models.build import build_model
from potluck.models.export import export_folder
from potluck.models.flat import flatten
from potluck.preflight import forecast, opened_text
from potluck.recipe import Recipe, load_recipe, recipe_toml
from potluck.recipe.engine import Nats
from potluck.recipe.load import shareable
from potluck.recipe.schema import ModelFolder, TokenizerFolder
from potluck.records.card import model_card
from potluck.records.checkpoint import Checkpoint, load_checkpoint
from potluck.records.curves import RunRecord, read_comparison, read_run, summary_table
from potluck.records.folder import POOLED, Variant, create_run, finished, how_to_go_on, locked, open_run, run_folder
from potluck.records.live import view
from potluck.records.report import write_report
from potluck.rounds.evaluation import held_out, union_of
from potluck.run import best_round, check_identity, history, newest_checkpoint
from potluck.stopping import Stopping, resumable
from potluck.terminal import labelled, warn

Result = dict[str, Any]


def train(recipe_path: Path, settings: Sequence[str], console: Console) -> Result:
    """Train together, export, report."""
    recipe, corpus = _checked_recipe(recipe_path, settings, console)
    folder, variant = run_folder(recipe), Variant("together", recipe.participant_names)
    with locked(folder):
        create_run(folder, recipe, variant)
        return _train(folder, recipe, variant, console, None, corpus)


def compare(recipe_path: Path, settings: Sequence[str], console: Console, pooled: bool) -> Result:
    """Train together, each alone, and pooled; compare."""
    recipe, corpus = _checked_recipe(recipe_path, settings, console)
    if not recipe.data.validation_fraction:
        raise RecipeError("data.validation_fraction is 0: there is no held-out text to compare on")
    if POOLED in recipe.participant_names:
        raise RecipeError(f"participants: {POOLED!r} is the name of the pooled run", "rename that participant")
    folder = run_folder(recipe)
    with locked(folder):
        trainers = (*recipe.participant_names, *((POOLED,) if pooled else ()))
        create_run(folder, recipe, Variant("comparison", trainers))
        return _compare(folder, recipe, pooled, console, corpus)


def resume(folder: Path, console: Console, number: int | None) -> Result:
    """Go on with what is in a run folder."""
    recipe, variant = open_run(folder)
    if isinstance(recipe.engine, Nats):
        raise RunFolderError(
            f"{folder}: its participants are not in one process", f"{how_to_go_on(folder)} goes on with it"
        )
    with locked(folder):
        if variant.kind != "comparison":
            return _train(folder, recipe, variant, console, number)
        if number is not None:
            raise RunFolderError(f"{folder}: --round goes with one run, this is a comparison")
        return _compare(folder, recipe, POOLED in variant.trainers, console)


def evaluate(folder: Path, console: Console, model: Path | None, number: int | None, best: bool) -> Result:
    """Held-out loss on the run's texts of the run's model, or of another model folder with its own tokenizer."""
    folder = _single_run(folder)
    if isinstance(open_run(folder)[0].engine, Nats):
        hint = "its events hold every evaluation that the participants made: `potluck report`"
        raise RecipeError(f"{folder}: a hosted run; its texts are where its participants are", hint)
    if model is not None and (best or number is not None):
        raise RecipeError("--model goes without --best and --round: they choose a checkpoint of the run")
    if model is not None:
        recipe, _ = open_run(folder)
        other = {"model": ModelFolder(path=str(model)), "tokenizer": TokenizerFolder(path=str(model))}
        workplace = prepare(recipe.model_copy(update=other), console.print)
        return {"model": str(model), **_held_out(workplace)}
    restored = _restore(folder, number, best)
    workplace = prepare(restored.recipe, console.print)
    check_identity(identity(workplace), restored.checkpoint, folder)
    workplace.network.flat.vector.copy_(restored.checkpoint.parts["shared"]["theta"])
    return {"model": str(folder), "round": restored.checkpoint.round, **_held_out(workplace)}


def generate(
    source: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    raw: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[str, bool]:
    """What a run's newest model, or an exported folder, says to a prompt.

    Args:
        temperature: Left out, it is the model's own; so is ``top_p``.
        raw: Continue the prompt, though the model has a chat template.
        say: Told what the prompt is taken for, and where the model's context ends early.

    Returns:
        The text, and whether it answers a chat turn and does not continue the prompt.

    Raises:
        RecipeError: There is no chat template to do without.
        ModelError: The model cannot be used, or the prompt fills its context.
    """
    base = _base(source)
    folder = _tokenizer_folder(source)
    chat = folder is not None and bool(chat_templates(folder))
    if raw and not chat:
        raise RecipeError("--raw has no effect: the model has no chat template, every prompt is continued", "leave it")
    context = base.vocabulary.prompt(prompt)
    if chat and not raw and folder is not None:
        say("a turn of a chat, by the model's chat template; --raw continues the prompt as a text")
        context = chat_turn(folder, prompt)
    left = room(base.model, context)
    if left < max_tokens:
        say(f"the model's context of {left + len(context)} tokens leaves room for {left}, not {max_tokens}")
    how = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return continue_text(base.model, base.vocabulary, context, **how), chat and not raw  # type: ignore[arg-type]


def _tokenizer_folder(source: Path) -> Path | None:
    """Where the tokenizer of a run or a model folder came from; ``None`` if it was made for the run."""
    if not (source / "run.json").exists():
        return source
    table = open_run(_single_run(source))[0].tokenizer
    return Path(table.path) if isinstance(table, TokenizerFolder) else None


def generate_together(
    source: Path,
    assistants: Sequence[str],
    choice: Choice,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling,
    key_from: str,
) -> Result:
    """A prompt's continuation by a base and its assistants, and what each of them was asked."""
    warnings: list[str] = []
    base, here, others = _together(source, assistants, key_from, warnings)
    vocabulary = base.vocabulary
    rule = rule_of(choice, base, others)
    context, stops = vocabulary.prompt(prompt), vocabulary.stops
    found = decode(here, others, rule, context, max_tokens=max_tokens, stops=stops, sampling=sampling)
    asked = {name: {"said": found.said[name], **asdict(counts)} for name, counts in found.counts.items()}
    text = vocabulary.tokenizer.decode(found.tokens)
    return {"prompt": prompt, "text": text, "rule": choice.rule, "models": asked, "warnings": warnings}


def defer(source: Path, assistants: Sequence[str], data: Path, to: Path, lesson: Lesson, key_from: str) -> Result:
    """Learn when the assistants of a base should speak, from a little text, and keep it in a folder."""
    warnings: list[str] = []
    base, here, others = _together(source, assistants, key_from, warnings)
    learnt = learn_deferral(base, here, others, texts_of(data), lesson)
    save_deferral(learnt, to)
    nats = learnt.figures["nats_per_token"]
    if not nats["deferral"] < nats[here.name]:
        warnings.append(
            f"{to}: does not help: {nats[here.name]:.4f} nats per token alone, {nats['deferral']:.4f} with it"
        )
    return {"deferral": str(to), "threshold": learnt.threshold, **learnt.figures, "warnings": warnings}


def _together(
    source: Path, assistants: Sequence[str], key_from: str, warnings: list[str]
) -> tuple[Base, Here, list[NextToken]]:
    if key_from and not any("://" in place for place in assistants):
        raise RecipeError("--api-key-env has no effect: no assistant is an endpoint")
    base = _base(source)
    here = Here(base.place, base.model, base.vocabulary.size)
    return base, here, [opened(place, base, _base, key_from, warnings.append) for place in assistants]


def _base(source: Path) -> Base:
    """A run's newest model, or an exported folder."""
    if not source.exists():
        raise ModelError(f"{source}: there is no such run or model folder", nearby(source) or "name one, as runs/first")
    if not (source / "run.json").exists():
        return load_base(source)
    restored = _restore(_single_run(source), None, False)
    return Base(restored.model.eval(), restored.vocabulary, str(source))


def export(folder: Path, to: Path | None, number: int | None, best: bool) -> Result:
    """Write the run's model as a folder for `transformers`."""
    folder = _single_run(folder)
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StorageError(f"{to}: there is something here already", "name a new folder")
    return {"model": str(_export(folder, to or folder / "model", number, best))}


def _checked_recipe(path: Path, settings: Sequence[str], console: Console) -> tuple[Recipe, Corpus | None]:
    """A recipe whose participants are in this process and its text, with the warnings that a run of it deserves.

    Raises:
        RecipeError: It is wrong, or its participants are elsewhere.
    """
    recipe = load_recipe(path, settings)
    if isinstance(recipe.engine, Nats):
        hint = f"`potluck host {path}` coordinates it; or --set engine.kind=inprocess"
        raise RecipeError(f"{path}: its participants are on machines of their own", hint)
    corpus = opened_text(recipe, console.print)
    warn(forecast(recipe, corpus).warnings, console)
    return recipe, corpus


def _train(
    folder: Path, recipe: Recipe, variant: Variant, console: Console, number: int | None, corpus: Corpus | None = None
) -> Result:
    planned = Planned(folder, variant, recipe)
    with resumable(f"potluck resume {folder}") as stopping:
        _run(prepare(recipe, console.print, corpus), planned, console, "", stopping, number)
    return close_run(folder, console)


def close_run(folder: Path, console: Console) -> Result:
    """Export a finished run's model, write its report, and say what it came to."""
    model = _export(folder, folder / "model", None, False)
    record = read_run(folder)
    union = record.evaluations[-1].union
    return {
        "run": str(folder),
        "rounds": len(record.rounds),
        "total_tokens": record.total_tokens,
        "bits_per_byte": union.bits_per_byte if union is not None else None,
        "model": str(model),
        "report": _report(folder, console),
    }


def _compare(folder: Path, recipe: Recipe, pooled: bool, console: Console, corpus: Corpus | None = None) -> Result:
    with resumable(f"potluck resume {folder}") as stopping:
        workplace = prepare(recipe, console.print, corpus)
        for planned in planned_runs(recipe, folder, pooled):
            prefix = str(planned.folder.relative_to(folder)).replace("/", " ")
            with locked(planned.folder):
                if not (planned.folder / "run.json").exists():
                    create_run(planned.folder, planned.recipe, planned.variant)
                _run(workplace, planned, console, prefix, stopping, None)
    together = folder / "together"
    _export(together, together / "model", None, False)
    summary = summary_table(read_comparison(folder))
    result = {"run": str(folder), **summary, "model": str(together / "model")}
    kept = {**result, "run": folder.name, "model": "together/model"}  # it is shown to others, and may be moved
    write_text(folder / "comparison.json", json.dumps(kept, indent=1))
    return {**result, "report": _report(folder, console)}


def _run(
    workplace: Workplace, planned: Planned, console: Console, prefix: str, stopping: Stopping, number: int | None
) -> None:
    """Start or continue one run, shown live; a finished one is left as it is."""
    if number is None and finished(planned.folder):
        return
    if stopping():
        raise Interrupted(f"before {prefix or 'the first round'}")
    checkpoint = newest_checkpoint(planned.folder, number)
    past = history(planned.folder, checkpoint)
    if past and past[0]["environment"] != environment(workplace.network):
        warn(["versions, device or threads changed: the last bits may differ"], console)
    with view(console, planned.recipe.name, prefix, past) as listener:
        run = embedded_run(workplace, planned.variant, planned.folder, planned.recipe, (listener,), checkpoint)
        del checkpoint, past  # the run has copied what it needs
        save_vocabulary(workplace.corpus.vocabulary, planned.folder / "tokenizer")
        run.finish(stopping)


@dataclass(frozen=True)
class _Restored:
    recipe: Recipe
    vocabulary: Vocabulary
    model: PreTrainedModel
    checkpoint: Checkpoint


def _restore(folder: Path, number: int | None, best: bool) -> _Restored:
    """The model of a run's checkpoint, on the CPU.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the run's recipe or tokenizer.
    """
    recipe, _ = open_run(folder)
    vocabulary = load_vocabulary(folder / "tokenizer")
    if best and number is not None:
        raise RecipeError("--best and --round both choose a checkpoint: give one of them")
    checkpoint = load_checkpoint(folder / "checkpoints", number, only="shared")
    if best and checkpoint.facts["best"] is None:
        raise CheckpointError(f"{folder}: nobody evaluated, so no checkpoint is the best")
    if best and best_round(checkpoint.facts) != checkpoint.round:
        checkpoint = load_checkpoint(folder / "checkpoints", best_round(checkpoint.facts), only="shared")
    if checkpoint.facts["tokenizer"] != vocabulary.content_hash:
        raise CheckpointError(f"{folder}/tokenizer: not the tokenizer this checkpoint was trained with")
    model = build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed)
    vector, theta = flatten(model, torch.device("cpu")).vector, checkpoint.parts["shared"]["theta"]
    if vector.shape != theta.shape:
        raise CheckpointError(f"{folder}: the checkpoint holds {theta.numel()} parameters, the recipe {vector.numel()}")
    vector.copy_(theta)
    return _Restored(recipe, vocabulary, model, checkpoint)


def _single_run(folder: Path) -> Path:
    """A run folder; of a comparison, the run together."""
    _, variant = open_run(folder)
    return folder / "together" if variant.kind == "comparison" else folder


def _held_out(workplace: Workplace) -> Result:
    results = {}
    for name, holding in workplace.corpus.holdings.items():
        if held_out_of(holding) is None:
            continue
        stream, size = holding.validation.tokens, holding.validation.text_bytes
        nats, tokens = negative_log_likelihood(workplace.network, stream, workplace.recipe.local.sequence_length)
        results[name] = held_out(nats, tokens, size)
    if not results:
        raise CorpusError("no participant holds out any text: there is nothing to evaluate on")
    return {"participants": results, "union": {**union_of(results), "of": list(results)}}


def _export(folder: Path, to: Path, number: int | None, best: bool) -> Path:
    """Write the model folder beside its place, then move it there."""
    restored = _restore(folder, number, best)
    recipe, vocabulary = restored.recipe, restored.vocabulary
    record = read_run(folder, restored.checkpoint.facts["events_position"])
    partial = to.with_name(f".{to.name}.partial")
    with storing(to):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            export_folder(
                restored.model, recipe.tokenizer, vocabulary.tokenizer, vocabulary.end_of_text, partial, recipe.model
            )
            write_text(partial / "README.md", _card(restored, record))
            write_text(partial / "recipe.toml", shareable(recipe_toml(recipe)))
            shutil.rmtree(to, ignore_errors=True)
            partial.rename(to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return to


def _card(restored: _Restored, record: RunRecord) -> str:
    recipe, model = restored.recipe, restored.model
    base = name_of(recipe.model.path) if isinstance(recipe.model, ModelFolder) else None
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return model_card(
        record, shareable(recipe_toml(recipe)), base, frozen, model.config.model_type.startswith("potluck_")
    )


def _report(folder: Path, console: Console) -> str | None:
    try:
        return str(write_report(folder))
    except MissingExtra as missing:
        labelled(console, "no report", "yellow", f"{missing}; {missing.hint}")
        return None
