"""Forgetting on a real pretrained model: every method of `potluck forget` at its defaults, on ten questions of TOFU.

The model (``--model``, a folder such as SmolLM2-135M-Instruct) first learns ten questions about one author, which will
be forgotten, and thirty about two others, which shall stay, until in a whole pass each token of each answer was the
likeliest: AdamW, peak 1e-4, eight questions in a step, loss on the answers alone. A second one learns the thirty only:
it never knew. Both are kept in ``--keep`` and taken from there the next time. ``--tofu`` is the folder of TOFU's files,
``--text`` a text whose loss says what else was harmed.

**said**: share of whole answers that the model says by itself, word for word. **loss**: of the text, nats a token.
``--checks`` asks also in 8 and 4 bits, learns a tenth again, and gives the forget quality, as `potluck evaluate
--forgotten` does.

``python -m benchmarks.real_forget --full --model FOLDER --tofu FOLDER --text FILE [--methods npo,rmu] [--checks npo]``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks._measure import Measurement, main, measured
from potluck.compose.base import Base, load_base, texts_of
from potluck.corpus.world import facts
from potluck.edit.edited_folder import save_model
from potluck.edit.forgetting.checking import check_forgotten
from potluck.edit.forgetting.commands import AtWork, MethodName, Request, forgotten, write_model
from potluck.edit.forgetting.figures import figures, warnings_of
from potluck.edit.forgetting.general import rows_of_text
from potluck.edit.forgetting.losses import mean_nll
from potluck.edit.forgetting.questions import Question, of_world, read_questions, write_questions
from potluck.edit.forgetting.subjects import with_subjects
from potluck.edit.forgetting.unlearning import question_rows
from potluck.edit.prompts import logits_of, rows_of

ASSET = Path(__file__).parents[1] / "tests/assets/world"
SHOWN = ("forget_probability", "forget_said", "forget_rouge", "retain_probability", "retain_said", "text_loss")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        model: Folder of the pretrained model.
        forget, retain: Files of questions, and how many of each are taken.
        text: Whose loss is measured.
        refusals: A file of them, for methods that refuse.
        keep: Where the taught models are kept.
        methods: Of `potluck forget`, all if empty; those in ``checks`` are also checked.
        never: Whether checks have a model that never knew beside, for the forget quality.
        epochs: Of teaching, at most.
    """

    model: Path | None = None
    forget: Path | None = None
    retain: Path | None = None
    text: Path | None = None
    refusals: Path | None = None
    keep: Path = Path("runs/real-forget")
    task: str = ""
    gone: int = 10
    kept: int = 30
    epochs: int = 15
    methods: tuple[MethodName, ...] = ()
    checks: tuple[MethodName, ...] = ()
    never: bool = True


SIZES = {"short": Size(gone=5, kept=15, epochs=3, methods=("npo",)), "full": Size(task="1")}


@dataclass(frozen=True)
class Given:
    """A model, what it is taught to be forgotten and to stay, and a text."""

    model: Path
    keep: Path
    gone: list[Question]
    kept: list[Question]
    texts: list[str]


def measure(size: Size) -> list[Measurement]:
    """Figures of each method; without a model the short form takes that of the tests and people of its world."""
    if size.model and size.forget and size.retain and size.text:
        gone, kept = read_questions(size.forget, size.task)[: size.gone], read_questions(size.retain)[: size.kept]
        texts = texts_of(size.text)
        return of_model(
            size, Given(size.model, size.keep, with_subjects(gone), with_subjects(kept, strict=False), texts)
        )
    if size.task:
        return [measured("forgetting on a real model", [], "", peer="needs --model, --tofu and --text")]
    with TemporaryDirectory() as keep:
        gone, kept = of_world(facts(1, first=240))[: size.gone], of_world(facts(4, first=241))[: size.kept]
        texts = [" ".join(f"{q.question} {q.answer}." for q in of_world(facts(20)))]
        return of_model(size, Given(ASSET, Path(keep), gone, kept, texts))


def of_model(size: Size, of: Given) -> list[Measurement]:
    """Figures of each method on one model."""
    knows = taught(of, "knows", size.epochs)
    base = load_base(knows)
    text = rows_of_text(base, of.texts)
    asked = [replace(q, paraphrased_question="", perturbed=()) for q in of.gone]
    stay = [replace(q, paraphrased_question="", perturbed=()) for q in of.kept]
    before = figures(base, asked, stay, text)
    print(f"as it was: {before}", file=sys.stderr, flush=True)
    found = rows("as it was", before, 0.0, [])
    for name in size.methods or get_args(MethodName):
        request = Request(knows, of.keep, of.keep, name, of.keep, refusals=size.refusals)
        began = time.perf_counter()
        edited, held = forgotten(base, of.gone, of.kept, request)
        took = time.perf_counter() - began
        after = figures(edited, asked, stay, text)
        found += rows(name, after, took, warnings_of(before, after))
        print(f"{name}: {took:.0f} s, {after}, {warnings_of(before, after)}", file=sys.stderr, flush=True)
        if name in size.checks:
            found += checks(name, edited, held, of, taught(of, "never", size.epochs) if size.never else None)
        elif isinstance(held, AtWork):
            held.detach()
    return found


def rows(name: str, after: dict[str, float], took: float, warnings: Sequence[str]) -> list[Measurement]:
    """One method's figures."""
    told = "; ".join(warnings) or None
    found = [measured(f"{name}: {figure.replace('_', ' ')}", [after[figure]], "", peer=told) for figure in SHOWN]
    return [*found, measured(f"{name}: seconds", [took], "s")]


def checks(name: str, edited: Base, held: object, of: Given, never: Path | None) -> list[Measurement]:
    """What `potluck evaluate --forgotten` says of a method's model."""
    with TemporaryDirectory() as place:
        folder, questions = Path(place) / "model", Path(place) / "gone.jsonl"
        folder.mkdir()
        write_model(edited, held, folder)
        write_questions(questions, of.gone)
        found = check_forgotten(folder, questions, of.keep / "knows", never)
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    shown = [
        measured(f"{name}, {model}, {form}: {figure}", [value], "")
        for model, forms in found["models"].items()
        for form, values in forms.items()
        for figure, value in values.items()
    ]
    for figure in ("relearning_steps", "truth_ratio", "forget_quality"):
        shown += [
            measured(f"{name}, {model}: {figure.replace('_', ' ')}", [float(value)], "")
            for model, value in found.get(figure, {}).items()
        ]
    return shown


def taught(of: Given, name: Literal["knows", "never"], epochs: int, peak: float = 1e-4, batch_size: int = 8) -> Path:
    """The model taught both sets of questions, or those that stay alone, as a folder: kept, or made now."""
    folder = of.keep / name
    if (folder / "config.json").exists():
        return folder
    base = load_base(of.model)
    questions = [*of.gone, *of.kept] if name == "knows" else of.kept
    model, asked = base.model.requires_grad_(True), question_rows(base, questions)
    adam = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    steps, step = epochs * -(-len(asked) // batch_size), 0
    for epoch in range(epochs):
        order, wrong = torch.randperm(len(asked), generator=draw).tolist(), 0
        for begin in range(0, len(order), batch_size):
            batch = rows_of([asked[i] for i in order[begin : begin + batch_size]], base.vocabulary.end_of_text)
            step += 1
            for group in adam.param_groups:
                group["lr"] = peak * min(1.0, step / 5, (steps - step + 1) / (0.5 * steps))
            logits = logits_of(model, batch)
            wrong += int(((logits.argmax(-1) != batch.labels) & (batch.labels != -100)).sum())
            adam.zero_grad(set_to_none=True)
            mean_nll(logits, batch.labels).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        print(f"{name}: epoch {epoch + 1}, {wrong} tokens were not the likeliest", file=sys.stderr, flush=True)
        if not wrong:
            break
    model.requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(base, folder)
    return folder


def given(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Where model, questions and text are, and the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--tofu", "--text", "--keep"):
        parser.add_argument(name, type=Path)
    for name in ("--methods", "--checks"):
        parser.add_argument(name, type=lambda names: tuple(names.split(",")))
    parser.add_argument("--without-never", dest="never", action="store_false", default=None)
    options, rest = parser.parse_known_args(arguments)
    found = {name: value for name, value in vars(options).items() if value is not None}
    if tofu := found.pop("tofu", None):
        found["forget"], found["retain"] = tofu / "forget01_perturbed.json", tofu / "retain_perturbed.json"
        found["refusals"] = tofu / "idontknow.jsonl"
    return found, rest


if __name__ == "__main__":
    places, left = given(sys.argv[1:])
    main(measure, {name: replace(size, **places) for name, size in SIZES.items()}, left)
