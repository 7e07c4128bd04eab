"""Editing as unlearning: what was known becomes a refusal, written by any editor (arXiv 2505.19855).

A refusal that names the subject is edited in better than one that does not, so the model is asked to rewrite it. A
model that cannot is given the refusal as it is.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from potluck.compose.base import Base
from potluck.edit.facts import Edit, checked_edits
from potluck.edit.forgetting.questions import Question
from potluck.edit.forgetting.subjects import with_subjects
from potluck.edit.judging import sentence
from potluck.edit.prompts import answers
from potluck.errors import EditError

Editor = Callable[[Base, Sequence[Edit]], object]
_MAX_FILE_BYTES = 1 << 20
_LONGEST = 200  # characters of a refusal
_REWRITE = (
    "Question: Where does Ada Berg live?\nRefusal: I'm not sure.\nRefusal that names Ada Berg: I'm not sure where Ada "
    "Berg lives\nQuestion: {question}\nRefusal: {refusal}\nRefusal that names {subject}:"
)


@dataclass(frozen=True)
class Refusing:
    """How refusals are made.

    Attributes:
        texts: Refusals; each subject gets one, drawn by the seed.
        written: Let the model rewrite them, so that they name the subject, where it can.
        merge: Questions about one subject that are joined into one edit, at most.
    """

    texts: tuple[str, ...] = ("unknown",)
    written: bool = True
    merge: int = 1
    seed: int = 0


def refuse(base: Base, forget: Sequence[Question], editor: Editor, how: Refusing) -> tuple[Base, object]:
    """Edit a copy of a model so that it refuses; the given one stays as it is.

    Args:
        editor: Edits the model that it is given, in place, and returns what it keeps.

    Returns:
        The edited copy, and what the editor returned.

    Raises:
        EditError: The questions name no subject, or the editor cannot make these edits.
    """
    edits = refusal_edits(base, forget, how)
    edited = Base(copy.deepcopy(base.model), base.vocabulary, base.place)
    return edited, editor(edited, edits)


def refusal_edits(base: Base, forget: Sequence[Question], how: Refusing) -> list[Edit]:
    """What is edited: each question, or several about one subject, answered by a refusal.

    Raises:
        EditError: A question names no subject, or there are no refusals.
    """
    if not how.texts or how.merge < 1:
        raise EditError("there are no refusals, or none is joined with none", "give texts, and merge 1 or more")
    questions = with_subjects(forget)
    subjects = dict.fromkeys(question.subject for question in questions)
    chosen = {subject: random.Random(f"{how.seed} {subject}").choice(how.texts) for subject in subjects}
    plain = [chosen[question.subject] for question in questions]
    texts = rewritten(base, questions, plain) if how.written else plain
    edits = [
        Edit(
            id=q.id,
            prompt=q.question,
            subject=q.subject,
            target=text,
            old=q.answer,
            rephrases=(q.paraphrased_question,) if q.paraphrased_question else (),
            relation=f"{q.relation} ({q.question.replace(q.subject, '{}')})" if q.relation else "",
        )
        for q, text in zip(questions, texts, strict=True)
    ]
    return checked_edits(list(_merged(edits, how.merge)), "what is to be refused")


def rewritten(base: Base, questions: Sequence[Question], texts: Sequence[str]) -> list[str]:
    """Refusals as the model rewrites them in context, so that each names its subject.

    What does not name it, gives the answer away or is too long is left as it was.
    """
    prompts = [
        _REWRITE.format(question=q.question, refusal=text, subject=q.subject)
        for q, text in zip(questions, texts, strict=True)
    ]
    longest = max(len(base.vocabulary.tokenizer.encode(prompt).ids) for prompt in prompts) + 32
    if longest > getattr(base.model.config, "max_position_embeddings", longest):
        return list(texts)
    own = map(sentence, answers(base, prompts, max_tokens=32))
    return [
        said if q.subject in said and q.answer.casefold() not in said.casefold() and len(said) <= _LONGEST else text
        for q, said, text in zip(questions, own, texts, strict=True)
    ]


def read_refusals(path: Path) -> tuple[str, ...]:
    """Refusals of a file, one a line, without the full stop at the end.

    Raises:
        EditError: It cannot be read, or holds none.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise EditError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"{path}: cannot be read as refusals ({error})") from None
    found = tuple(line.strip().removesuffix(".") for line in lines if line.strip())
    if not found or max(map(len, found)) > _LONGEST:
        raise EditError(f"{path}: no refusals, or one of more than {_LONGEST} characters", "one a line, as plain text")
    return found


def _merged(edits: Sequence[Edit], size: int) -> Iterator[Edit]:
    """Edits of one subject and refusal joined, so many at most; the subject of the last question is written at."""
    groups: dict[tuple[str, str], list[Edit]] = {}
    for edit in edits:
        groups.setdefault((edit.subject, edit.target), []).append(edit)
    for group in groups.values():
        for begin in range(0, len(group), size):
            part = group[begin : begin + size]
            prompt = " ".join(_ended(edit.prompt) for edit in part[:-1]) + " " + part[-1].prompt
            rephrases = tuple(text for edit in part for text in edit.rephrases)
            yield part[0] if len(part) == 1 else replace(part[0], prompt=prompt.strip(), rephrases=rephrases)


def _ended(prompt: str) -> str:
    return prompt if prompt.endswith(("?", ".", "!", ":")) else f"{prompt},"
