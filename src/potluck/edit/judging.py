"""Whether a free answer is the expected one, as a person who reads it would say.

An answer is right if it *begins with* what is expected; models go on talking, and where they should end is not theirs
to know. That is looser than *exact*, which asks besides that a sentence or the text ends there: "Paris, which …" begins
with "Paris" and is not exactly it. Upper and lower case count, the number of spaces and line breaks does not.
"""

from __future__ import annotations

import re
import unicodedata

_ENDS = re.compile(r"""\s*(?:$|[\n;]|[.!?…。！？]+(?=\s|$|["'”’)\]»]))""")
_SENTENCE = re.compile(r"""[\n;]|[。！？]|[.!?…](?=\s|$|["'”’)\]»])""")
_NUMBER = re.compile(r"[.,]\d")
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, and those of Chinese and Japanese.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff\U00020000-\U0003ffff]"
)


def begins(said: str, expected: str) -> bool:
    """Whether an answer begins with the expected one, and no longer word or number goes on from there.

    "Paris, in France" begins with "Paris", and "Parisian" does not; nor does "3.5" begin with "3".
    """
    return _rest(said, expected) is not None


def exactly(said: str, expected: str) -> bool:
    """Whether an answer begins with the expected one, and its sentence, line or text ends there."""
    rest = _rest(said, expected)
    return rest is not None and _ENDS.match(rest) is not None


def sentence(said: str) -> str:
    """An answer up to its first sentence's end: a line break, ``;``, or ``.``, ``!``, ``?`` that a space follows.

    An abbreviation's full stop ends it too; what must not be cut is judged by `begins` or `exactly`.
    """
    said = said.strip()
    end = _SENTENCE.search(said)
    return said[: end.start()].rstrip() if end else said


def _rest(said: str, expected: str) -> str | None:
    """What follows the expected answer, or ``None`` if the answer does not begin with it."""
    words = unicodedata.normalize("NFC", expected).split()
    said = unicodedata.normalize("NFC", said).lstrip()
    found = re.match(r"\s+".join(map(re.escape, words)), said) if words else None
    if found is None:
        return None
    rest = said[found.end() :]
    return None if _goes_on(words[-1][-1], rest) else rest


def _goes_on(last: str, rest: str) -> bool:
    """Whether the word or number whose last character is given goes on in the rest."""
    if last.isdigit() and _NUMBER.match(rest):
        return True
    if not rest or _SPACELESS.match(last) or _SPACELESS.match(rest):
        return False
    return last.isalnum() and (rest[0].isalnum() or unicodedata.combining(rest[0]) > 0)
