"""Whom a question is about, where its file does not say: TOFU's files do not.

One rule for what is to be forgotten and for what shall stay. Names are runs of capitalised words. The subject is the
name that most questions in the neighbourhood hold (TOFU has twenty on end about one author); of equals one of several
words, one that the answer has too, and the first. A guess can be wrong: it is printed, and a field ``subject`` of the
file goes before it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from potluck.edit.forgetting.questions import Question
from potluck.edit.invented_names import invented_names, stranger_names
from potluck.errors import EditError

_NEAR = 20  # questions before and after
_SHOWN = 8  # names in a message
_WORD = re.compile(r"(?:[^\W\d_]\.)+|[\w+.-]*[\w+](?:['’](?!s\b)\w+)*")
_INSIDE = ("al", "bin", "da", "de", "del", "der", "di", "la", "of", "van", "von")  # inside a name, in small letters
_OPENING = frozenset(  # words that open a question, and are no part of a name
    """
    a an and are as at based besides by can could describe did do does during explain for from give has have how if in
    is list may name of on regarding since tell the through to under was were what what's when where which while who
    whom whose why will with would
    """.split()  # noqa: SIM905
)
_QUOTED = re.compile(r"[\"“][^\"”]*[\"”]")


def with_subjects(questions: Sequence[Question], *, strict: bool = True) -> list[Question]:
    """The questions of one file with their subjects, guessed where none is given.

    Args:
        strict: Whether each must have one; if not, those without a name stay without.

    Raises:
        EditError: There is no name in one of them.
    """
    found = []
    for place, question in enumerate(questions):
        if question.subject:
            found.append(question)
            continue
        near = questions[max(0, place - _NEAR + 1) : place + _NEAR]
        subject = _guess(question, [other.question for other in near])
        if not subject and strict:
            hint = "add a field `subject` to the record: whom or what it is about, as the question has it"
            raise EditError(f"question {question.id}: it is not clear whom {question.question!r} is about", hint)
        found.append(replace(question, subject=subject))
    return found


def guesses(given: Sequence[Question], found: Sequence[Question]) -> str:
    """What was guessed, in a line: each name with its questions, the commonest first; empty if nothing was."""
    counted = Counter(after.subject for before, after in zip(given, found, strict=True) if not before.subject)
    if not counted:
        return ""
    named = [f"{name or 'nobody'} ({count})" for name, count in counted.most_common()]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"guessed whom the questions are about: {', '.join(named[:_SHOWN])}{more}"


def nobodies(subjects: Sequence[str], seed: int) -> list[str]:
    """Names that nobody has: made of those that occur, or where these are too few, of common ones."""
    try:
        return stranger_names(subjects, seed)
    except EditError:
        return [name for name in invented_names(seed) if name not in subjects]


def renamed(text: str, subject: str, name: str) -> str:
    """A text about somebody else: the subject's whole name becomes theirs, and each word of it one of theirs."""
    words, others = subject.split(), name.split()
    text = text.replace(subject, name)
    for place, word in enumerate(words if len(words) > 1 else ()):
        other = others[0] if place == 0 else others[-1]
        if len(word) > 2 and word[0].isupper() and word not in others:
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", other.replace("\\", r"\\"), text)
    return text


def _guess(question: Question, near: Sequence[str]) -> str:
    text = question.question
    titles = [match.span() for match in _QUOTED.finditer(text)]
    ranked = [
        (
            " " in name,
            not any(begin <= at < end for begin, end in titles),
            sum(name in other for other in near),
            name in question.answer,
            -at,
            name,
        )
        for at, name in _names(text)
    ]
    return max(ranked)[-1] if ranked else ""


def _names(text: str) -> Iterator[tuple[int, str]]:
    """Runs of capitalised words, each with its place; one that opens a sentence also without its first word."""
    words = [match for match in _WORD.finditer(text)]
    place = 0
    while place < len(words):
        last = _run(text, words, place)
        if last is None:
            place += 1
            continue
        first, opens = place, place == 0 or text[words[place - 1].end()] in ".?!:"
        if opens and words[first][0].casefold() in _OPENING:
            first += 1
        elif opens and last > first:
            yield words[first + 1].start(), text[words[first + 1].start() : words[last].end()]
        if first <= last:
            yield words[first].start(), text[words[first].start() : words[last].end()]
        place = last + 1


def _run(text: str, words: Sequence[re.Match[str]], place: int) -> int | None:
    """The last word of the name that begins at a place, if one does."""
    last = None
    for here in range(place, len(words)):
        word = words[here][0]
        if here > place and text[words[here - 1].end() : words[here].start()] != " ":
            break
        if word[0].isupper():
            last = here
        elif last is None or word not in _INSIDE:
            break
    return last
