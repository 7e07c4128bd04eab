"""What is to be edited: a prompt that names its subject, and what the model shall answer.

A file is a JSON list, or JSON lines. Beside our own records it may hold those of CounterFact (nested, or flat as
EasyEdit and MEMIT have them) and zsRE; which it is, is told by the fields of its first record. Published files hold
records that cannot be edited, such as one of zsRE with an empty target: those are left out, and it is said which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from potluck.errors import EditError
from potluck.files import page
from potluck.untrusted import loads, read_bytes

MAX_EDITS = 5_000  # in one batch
_MAX_FILE_BYTES = 1 << 28
_MAX_CHARACTERS = 2_000  # of one prompt or target
_FORM = "a JSON list or JSON lines, one object an edit"


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
        place: Where in the prompt the subject begins, in characters, if the file says so; else `begin_of` finds it.
        truths: What is true of the neighbours, in their order, if the file says so.
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
    place: int | None = None
    truths: tuple[str, ...] = ()

    @property
    def begin(self) -> int:
        """Where in the prompt the subject begins, in characters; -1 if it is not there."""
        return begin_of(self.prompt, self.subject) if self.place is None else self.place

    def about(self, name: str) -> Edit:
        """The same of another subject: its name stands in the prompt where this one's stood."""
        begin = self.begin
        prompt = self.prompt[:begin] + name + self.prompt[begin + len(self.subject) :]
        return replace(self, prompt=prompt, subject=name, place=begin)

    @property
    def asks(self) -> str:
        """What two edits have in common that cannot both hold."""
        asked = self.relation or self.prompt.replace(self.subject, "{}")
        return " ".join(f"{self.subject}\n{asked}".casefold().split(" "))


def begin_of(text: str, subject: str) -> int:
    """Where a subject begins in a text, in characters: where it last is a word of its own; -1 if it is not there.

    "Ann" is not looked for inside "Annapolis", unless it stands nowhere else.
    """
    alone = [found.start() for found in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)] if subject else []
    return alone[-1] if alone else text.rfind(subject)


def read_edits(path: Path, limit: int = MAX_EDITS, left_out: list[str] | None = None) -> list[Edit]:
    """The edits of a file, checked (`checked_edits`).

    Args:
        path: The file.
        limit: Of edits.
        left_out: Gets, for each record of a published form (CounterFact, zsRE) that cannot be edited or contradicts an
            earlier one, which it is and why; it is left out. Without the list such a record is an error, as one of our
            own form always is.

    Raises:
        EditError: It cannot be read, is none of the known forms, or what `checked_edits` refuses.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise EditError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB", "cut it into several files")
        rows = _rows(read_bytes(path, _MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise EditError(f"{path}: cannot be read as edits ({error})", _FORM) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise EditError(f"{path}: not a list of edits", f"{_FORM}; see {page('how-to/edit.md')}")
    if len(rows) > limit:
        hint = "cut the file; edits may be applied one batch after the other"
        raise EditError(f"{path}: {len(rows)} edits at once, more than {limit}", hint)
    read = _reader(rows[0], path)
    lenient = left_out is not None and read is not edit_of
    edits: list[Edit] = []
    known: dict[str, Edit] = {}
    asked: dict[str, Edit] = {}
    for number, row in enumerate(rows):
        try:
            edit = read(row, number)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            fault = EditError(f"{path}: record {number} has another form than the first ({error!r})")
        else:
            found = _fault(edit, str(path), known, asked)
            if found is None:
                edits.append(edit)
                continue
            fault = found
        if not lenient or left_out is None:
            raise fault from None
        left_out.append(f"record {number}: {str(fault).partition(': ')[2]}")
    if not edits:
        raise EditError(f"{path}: none of {len(rows)} records can be edited; {left_out[0] if left_out else ''}")
    return edits


def usable_edits(path: Path, say: Callable[[str], None]) -> list[Edit]:
    """The edits of a file without those records of a published form that are none, told which these are.

    Raises:
        EditError: As `read_edits`.
    """
    left_out: list[str] = []
    edits = read_edits(path, left_out=left_out)
    for why in left_out:
        say(f"{path}: left out: {why}")
    return edits


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
        target=_answer(row["target"]),
        old=_answer(row.get("old", "")),
        rephrases=tuple(map(_text, row.get("rephrases", ()))),
        neighbours=tuple(map(_text, row.get("neighbours", ()))),
        onward=tuple((_text(prompt), _answer(answer)) for prompt, answer in row.get("onward", ())),
        relation=_text(row.get("relation", "")),
        made_at=float(row.get("made_at", 0.0)),
        place=None if row.get("place") is None else int(row["place"]),
        truths=tuple(map(_answer, row.get("truths", ()))),
    )


def checked_edits(edits: Sequence[Edit], where: str) -> list[Edit]:
    """The edits, if they can be made together.

    Raises:
        EditError: A subject is not in its prompt, a target is empty, an id occurs twice, or two contradict each other.
    """
    known: dict[str, Edit] = {}
    asked: dict[str, Edit] = {}
    for edit in edits:
        if (fault := _fault(edit, where, known, asked)) is not None:
            raise fault
    return list(edits)


def _fault(edit: Edit, where: str, known: dict[str, Edit], asked: dict[str, Edit]) -> EditError | None:
    """What is wrong with an edit by itself or beside those before it; one with nothing wrong is taken up there."""
    at = f"{where}: edit {edit.id}"
    if not edit.subject.strip() or edit.subject not in edit.prompt:
        hint = "the prompt must hold the subject letter by letter: the edit is made at its last token"
        return EditError(f"{at}: {edit.subject!r} is not in the prompt {edit.prompt!r}", hint)
    if edit.place is not None and (edit.place < 0 or not edit.prompt.startswith(edit.subject, edit.place)):
        hint = "count characters from 0, or leave `place` out"
        return EditError(f"{at}: {edit.subject!r} is not at place {edit.place} of the prompt {edit.prompt!r}", hint)
    if not edit.target.strip():
        return EditError(f"{at}: the target is empty", "`potluck forget` makes a model forget")
    if max(map(len, (edit.prompt, edit.target, *edit.rephrases, *edit.neighbours))) > _MAX_CHARACTERS:
        return EditError(f"{at}: a text of more than {_MAX_CHARACTERS} characters")
    if edit.truths and len(edit.truths) != len(edit.neighbours):
        hint = "give one for each neighbour, or none"
        return EditError(f"{at}: {len(edit.truths)} truths of {len(edit.neighbours)} neighbours", hint)
    if edit.id in known:
        return EditError(f"{where}: two edits are called {edit.id}", "give each an id of its own")
    other = asked.get(edit.asks, edit)
    if other.target.strip() != edit.target.strip():
        hint = "keep one of them; between participants a conflict policy decides"
        both = f"{other.id} ({other.target!r}) and {edit.id} ({edit.target!r})"
        return EditError(f"{where}: edits {both} contradict each other: {edit.prompt!r}", hint)
    known[edit.id] = asked[edit.asks] = edit
    return None


def _rows(data: bytes) -> Any:
    """The value of a JSON file; of JSON lines, the list of their values.

    Raises:
        ValueError: It is neither.
    """
    if not data.lstrip().startswith(b"{"):
        return loads(data, most_bytes=_MAX_FILE_BYTES)
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows += [loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


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
    prompt, subject, place = _filled(asked)
    old = _answer(asked.get("target_true", ""))
    neighbours = tuple(map(_text, row.get("neighborhood_prompts", ())))
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=prompt,
        subject=subject,
        target=_answer(asked["target_new"]),
        old=old,
        rephrases=tuple(map(_text, row.get("paraphrase_prompts", ()))),
        neighbours=neighbours,
        relation=str(asked.get("relation_id", "")),
        place=place,
        truths=(old,) * len(neighbours) if old else (),  # neighbours are chosen as subjects of the same answer
    )


def _flat(row: dict[str, Any], number: int) -> Edit:
    """EasyEdit's records, and MEMIT's requests, which hold a template and answers as ``{"str": …}``."""
    prompt, subject, place = _filled(row)
    neighbour, truth = row.get("locality_prompt"), row.get("locality_ground_truth")
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=prompt,
        subject=subject,
        target=_answer(row["target_new"]),
        old=_answer(row.get("ground_truth") or row.get("target_true") or ""),
        rephrases=(_text(row["rephrase_prompt"]),) if row.get("rephrase_prompt") else (),
        neighbours=(_text(neighbour),) if neighbour else (),
        relation=str(row.get("relation_id", "")),
        place=place,
        truths=(_answer(truth),) if neighbour and truth else (),
    )


def _zsre(row: dict[str, Any], number: int) -> Edit:
    """``loc`` is lower case and begins with "nq question: ", which the answer shall not depend on."""
    target, truth = _answer(row["alt"]), row.get("loc_ans")
    return Edit(
        id=str(row.get("case_id", number)),
        prompt=_text(row["src"]),
        subject=_text(row["subject"]),
        target=target,
        old=next((old for old in map(_answer, row["answers"]) if old != target), ""),
        rephrases=(_text(row["rephrase"]),),
        neighbours=(_text(row["loc"]).removeprefix("nq question: "),),
        truths=(_answer(truth),) if truth else (),
    )


def _filled(asked: dict[str, Any]) -> tuple[str, str, int | None]:
    """A record's prompt with its subject in the place of ``{}``, the subject, and where it begins if that is said."""
    prompt, subject = _text(asked["prompt"]), _text(asked["subject"])
    before, marked, after = prompt.partition("{}")
    return (f"{before}{subject}{after}", subject, len(before)) if marked else (prompt, subject, None)


def _answer(value: Any) -> str:
    """An answer as it is or as ``{"str": …}``, without the space before it that files written for GPT-2 have."""
    return _text(value["str"] if isinstance(value, dict) else value).strip()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value.rstrip() if value.strip() else value
