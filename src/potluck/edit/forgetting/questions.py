"""What is to be forgotten, and what shall stay: questions with their answers, and other ways to put both.

A file is JSON lines with the fields of TOFU (arXiv 2401.06121), or a file of edits, whose ``target`` is what is known.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.corpus.world import Fact
from potluck.edit.facts import Edit, read_edits
from potluck.errors import EditError
from potluck.files import page, write_text
from potluck.untrusted import loads

_MAX_FILE_BYTES = 1 << 28
_MAX_CHARACTERS = 4_000
_WRONG = 5  # answers beside each right one
_FIELDS = ("id", "question", "answer", "subject", "paraphrased_question", "paraphrased_answer", "perturbed_answer")


@dataclass(frozen=True)
class Question:
    """One thing that a model may know.

    Attributes:
        question: What the answer follows, without a space at its end.
        answer: What the model knows, without a space before it.
        subject: Whom or what it is about, letter by letter as in the question; editors need it.
        paraphrased_question: The same, asked otherwise.
        paraphrased_answer: The answer in other words.
        perturbed: Wrong answers of the form of ``paraphrased_answer``, or of ``answer`` if that is empty.
        relation: What of the subject is asked.
    """

    id: str
    question: str
    answer: str
    subject: str = ""
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed: tuple[str, ...] = ()
    relation: str = ""

    @property
    def again(self) -> tuple[str, str]:
        """What the truth ratio is taken of: the question with the paraphrased answer, else the paraphrased question."""
        if self.paraphrased_answer:
            return self.question, self.paraphrased_answer
        return self.paraphrased_question or self.question, self.answer


def read_questions(path: Path, task: str = "") -> list[Question]:
    """The questions of a file; of TOFU's, those of one task if it is given.

    Raises:
        EditError: It cannot be read, holds none, or a record is not one.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise EditError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB", "cut it into several files")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"{path}: cannot be read as questions ({error})") from None
    if text.lstrip().startswith("["):
        return of_edits(read_edits(path))
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = loads(line)
            if task and str(record.get("task_id", task)) != task:
                continue
            found.append(_question(record, number))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            hint = f"one JSON object a line, with question and answer; see {page('how-to/forget.md')}"
            raise EditError(f"{path}: line {number} is no question ({error!r})", hint) from None
    return checked_questions(found, str(path))


def checked_questions(questions: Sequence[Question], where: str) -> list[Question]:
    """The questions, if they can be used.

    Raises:
        EditError: There are none, an id occurs twice, or a text is empty or too long.
    """
    if not questions:
        raise EditError(f"{where}: no questions")
    known: set[str] = set()
    for question in questions:
        if question.id in known:
            raise EditError(f"{where}: two questions are called {question.id}", "give each an id of its own")
        known.add(question.id)
        if not question.question.strip() or not question.answer.strip():
            raise EditError(f"{where}: question {question.id}: question or answer is empty")
        if question.subject and question.subject not in question.question:
            raise EditError(f"{where}: question {question.id}: {question.subject!r} is not in {question.question!r}")
        if max(map(len, (question.question, question.answer, *question.again, *question.perturbed))) > _MAX_CHARACTERS:
            raise EditError(f"{where}: question {question.id}: a text of more than {_MAX_CHARACTERS} characters")
    return list(questions)


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write them as JSON lines.

    Raises:
        StorageError: The file cannot be written.
    """
    lines = []
    for q in questions:
        values = (q.id, q.question, q.answer, q.subject, q.paraphrased_question, q.paraphrased_answer, q.perturbed)
        record = {name: value for name, value in zip(_FIELDS, values, strict=True) if value}
        lines.append(json.dumps(record | ({"relation": q.relation} if q.relation else {}), ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def of_world(facts: Sequence[Fact], told: int = 1) -> list[Question]:
    """Questions about people of the synthetic world.

    The question is a prompt that the text has, the paraphrase one that it has not; wrong are other values.

    Args:
        told: Prompts of each fact; every one is a question of its own.
    """
    found = []
    for fact in facts:
        others = [value for value in fact.relation.values if value != fact.value]
        wrong = tuple(random.Random(f"wrong {fact.person} {fact.relation.name}").sample(others, _WRONG))
        for number, prompt in enumerate(fact.told[:told]):
            name = f"{fact.person}/{fact.relation.name}" + (f"/{number}" if number else "")
            kept = fact.kept_back[0]
            found.append(Question(name, prompt, fact.value, fact.person, kept, "", wrong, fact.relation.name))
    return found


def of_edits(edits: Sequence[Edit]) -> list[Question]:
    """Edits as questions: what is known is ``old`` if it is said, else ``target``.

    Wrong answers are those of up to five other edits of the relation, else of any.
    """
    known = {edit.id: edit.old or edit.target for edit in edits}
    found = []
    for edit in edits:
        answer = known[edit.id]
        alike = [other for other in edits if other.relation == edit.relation] if edit.relation else list(edits)
        wrong = sorted({known[other.id] for other in alike} - {answer})
        wrong = random.Random(f"wrong {edit.id}").sample(wrong, min(_WRONG, len(wrong)))
        again = edit.rephrases[0] if edit.rephrases else ""
        found.append(Question(edit.id, edit.prompt, answer, edit.subject, again, "", tuple(wrong), edit.relation))
    return found


def _question(record: Mapping[str, Any], number: int) -> Question:
    unknown = record.keys() - {*_FIELDS, "relation", "task_id", "original_answer"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)}")
    texts = {name: _text(record.get(name, "")) for name in _FIELDS[3:6]}
    wrong = record.get("perturbed_answer", ())
    if isinstance(wrong, str):
        wrong = (wrong,)
    return Question(
        id=str(record.get("id", number)),
        question=_text(record["question"]).rstrip(),
        answer=_text(record["answer"]).strip(),
        **texts,
        perturbed=tuple(_text(answer).strip() for answer in wrong),
        relation=_text(record.get("relation", "")),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
