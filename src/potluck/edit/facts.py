"""What is to be edited: a prompt that names its subject, and what the model shall answer.

A file is a JSON list. Beside our own records it may hold those of CounterFact (nested, or flat as EasyEdit has them)
and zsRE; which it is, is told by the fields of its first record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from potluck.errors import EditError

MAX_EDITS = 5_000  # in one batch
_MAX_FILE_BYTES = 1 << 28
_MAX_CHARACTERS = 2_000  # of one prompt or target


@dataclass(frozen=True)
class Edit:
    """One fact as it shall be.

    Attributes:
        id: Unique in its file; edits are reverted by it.
        prompt: What the answer follows, without a space at its end; holds ``subject``.
        target: The answer, without a space before it.
        old: What was true before, if the file says so.
        rephrases: Other prompts that ask the same.
        neighbours: Prompts about something else, whose answers shall stay what they are.
        onward: Prompts that need the new fact, each with the answer that follows from it.
        relation: What of the subject is asked, if the file says so: edits of one subject and relation compete.
        made_at: When it was decided, in seconds since 1970; the newest may win a conflict.
    """

    id: str
    prompt: str
    subject: str
    target: str
    old: str = ""
    rephrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    onward: tuple[tuple[str, str], ...] = ()
    relation: str = ""
    made_at: float = 0.0

    @property
    def asks(self) -> str:
        """What two edits have in common that cannot both hold."""
        asked = self.relation or self.prompt.replace(self.subject, "{}")
        return " ".join(f"{self.subject}\n{asked}".casefold().split(" "))


def read_edits(path: Path, limit: int = MAX_EDITS) -> list[Edit]:
    """The edits of a file, checked (`checked_edits`).

    Raises:
        EditError: It cannot be read, is none of the known forms, or what `checked_edits` refuses.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise EditError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB", "cut it into several files")
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EditError(f"{path}: cannot be read as edits ({error})", "a JSON list, one object an edit") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise EditError(f"{path}: not a list of edits", "a JSON list, one object an edit; see docs/how-to/edit.md")
    if len(rows) > limit:
        hint = "cut the file; edits may be applied one batch after the other"
        raise EditError(f"{path}: {len(rows)} edits at once, more than {limit}", hint)
    read = _reader(rows[0], path)
    edits = []
    for number, row in enumerate(rows):
        try:
            edits.append(read(row, number))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EditError(f"{path}: record {number} has another form than the first ({error!r})") from None
    return checked_edits(edits, str(path))


def write_edits(path: Path, edits: Sequence[Edit]) -> None:
    """Write them in our own form."""
    path.write_text(json.dumps([asdict(edit) for edit in edits], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_of(row: Mapping[str, Any], number: int = 0) -> Edit:
    """An edit of a record in our own form; ``number`` is its id if it has none.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    unknown = row.keys() - {field.name for field in fields(Edit)}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)}")
    return Edit(
        id=str(row.get("id", number)),
        prompt=_text(row["prompt"]),
        subject=_text(row["subject"]),
        target=_text(row["target"]),
        old=_text(row.get("old", "")),
        rephrases=tuple(map(_text, row.get("rephrases", ()))),
        neighbours=tuple(map(_text, row.get("neighbours", ()))),
        onward=tuple((_text(prompt), _text(answer)) for prompt, answer in row.get("onward", ())),
        relation=_text(row.get("relation", "")),
        made_at=float(row.get("made_at", 0.0)),
    )


def checked_edits(edits: Sequence[Edit], where: str) -> list[Edit]:
    """The edits, if they can be made together.

    Raises:
        EditError: A subject is not in its prompt, a target is empty, an id occurs twice, or two contradict each other.
    """
    known: dict[str, Edit] = {}
    asked: dict[str, Edit] = {}
    for edit in edits:
        if not edit.subject.strip() or edit.subject not in edit.prompt:
            hint = "the prompt must hold the subject letter by letter: the edit is made at its last token"
            raise EditError(f"{where}: edit {edit.id}: {edit.subject!r} is not in the prompt {edit.prompt!r}", hint)
        if not edit.target.strip():
            raise EditError(f"{where}: edit {edit.id}: the target is empty", "`potluck forget` makes a model forget")
        if max(map(len, (edit.prompt, edit.target, *edit.rephrases, *edit.neighbours))) > _MAX_CHARACTERS:
            raise EditError(f"{where}: edit {edit.id}: a text of more than {_MAX_CHARACTERS} characters")
        if edit.id in known:
            raise EditError(f"{where}: two edits are called {edit.id}", "give each an id of its own")
        other = asked.setdefault(edit.asks, edit)
        if other.target.strip() != edit.target.strip():
            hint = "keep one of them; between participants a conflict policy decides"
            both = f"{other.id} ({other.target!r}) and {edit.id} ({edit.target!r})"
            raise EditError(f"{where}: edits {both} contradict each other: {edit.prompt!r}", hint)
        known[edit.id] = edit
    return list(edits)


def _reader(first: dict[str, Any], path: Path) -> Callable[[dict[str, Any], int], Edit]:
    for field, read in (
        ("requested_rewrite", _counterfact),
        ("target_new", _flat),
        ("alt", _zsre),
        ("target", edit_of),
    ):
        if field in first:
            return read
    hint = "records need id, prompt, subject and target, or are those of CounterFact or zsRE"
    raise EditError(f"{path}: records with fields {', '.join(list(first)[:12])} are not edits", hint)


def _counterfact(row: dict[str, Any], number: int) -> Edit:
    asked = row["requested_rewrite"]
    subject = _text(asked["subject"])
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=_text(asked["prompt"]).replace("{}", subject),
        subject=subject,
        target=_text(asked["target_new"]["str"]),
        old=_text(asked["target_true"]["str"]),
        rephrases=tuple(map(_text, row.get("paraphrase_prompts", ()))),
        neighbours=tuple(map(_text, row.get("neighborhood_prompts", ()))),
        relation=str(asked.get("relation_id", "")),
    )


def _flat(row: dict[str, Any], number: int) -> Edit:
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=_text(row["prompt"]),
        subject=_text(row["subject"]),
        target=_text(row["target_new"]),
        old=_text(row.get("ground_truth", "")),
        rephrases=(_text(row["rephrase_prompt"]),) if row.get("rephrase_prompt") else (),
        neighbours=(_text(row["locality_prompt"]),) if row.get("locality_prompt") else (),
    )


def _zsre(row: dict[str, Any], number: int) -> Edit:
    """``loc`` is lower case and begins with "nq question: ", which the answer shall not depend on."""
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=_text(row["src"]),
        subject=_text(row["subject"]),
        target=_text(row["alt"]),
        old=_text(row["answers"][0]),
        rephrases=(_text(row["rephrase"]),),
        neighbours=(_text(row["loc"]).removeprefix("nq question: "),),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value.rstrip() if value.strip() else value
