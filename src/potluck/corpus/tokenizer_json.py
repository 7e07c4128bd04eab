"""A tokenizer from outside, held to bounds before the `tokenizers` library sees it.

The library trusts its file: one token id near 2^31 takes gigabytes, a token of a megabyte ends the process when it is
let go, twenty rules that double a text double it twenty times. What passes here takes memory in proportion to the file.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from potluck.errors import ModelError
from potluck.untrusted import loads, read_bytes

_MAX_TOKEN = 1024  # characters; byte-level vocabularies hold runs of a few hundred
_MAX_WORD = 1000  # characters of a word that WordPiece tries to divide, in time that grows with their square
_MAX_UNUSED = 1 << 16  # ids below the highest that no token has, beside as many as there are tokens
_MAX_PARTS = 64  # of normalizer, pre-tokenizer, post-processor and decoder together
_MAX_TEXT = 2048  # of a pattern, or of what is put in place of one
_MAX_GROWTH = 1024.0
_NODE_BYTES = 340  # of a byte in the library's trie of a Unigram model, measured
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_tokenizer(text: str, what: str = "not a tokenizer", hint: str = "") -> Tokenizer:
    """A tokenizer from the text of ``tokenizer.json``.

    Raises:
        ModelError: It is none, or beyond the bounds above; the message begins with ``what``.
    """
    with refusing(what, hint):
        _check(loads(text), len(text))
        return Tokenizer.from_str(text)


def tokenizer_text(path: Path) -> str:
    """The text of a ``tokenizer.json``, for `read_tokenizer`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or no text.
    """
    return read_bytes(path).decode()


def check_ids(vocabulary: Mapping[str, int]) -> None:
    """Refuse ids with gaps that are far larger than the vocabulary: the library fills every gap.

    Raises:
        ValueError: Naming the id.
    """
    if not vocabulary:
        raise ValueError("it has no tokens")
    if any(type(number) is not int for number in vocabulary.values()):
        raise ValueError("a token's id is not an integer")
    lowest, highest = min(vocabulary.values()), max(vocabulary.values())
    if lowest < 0 or highest >= 2 * len(vocabulary) + _MAX_UNUSED:
        raise ValueError(f"token id {lowest if lowest < 0 else highest} among {len(vocabulary)} tokens")


@contextmanager
def refusing(what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever the library raises, its panics included, into a `ModelError` that begins with ``what``."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:  # a panic is no Exception, and its type has no name to import
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first_line = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ModelError(f"{what}: {first_line}", hint) from None


def _check(table: Any, size: int) -> None:
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        raise ValueError("it has no model")
    added = table.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("its added tokens are no list of tokens")
    _check_lengths(token.get("content") for token in added)
    _check_model(table["model"], size, alone=not added)
    parts = [part for name in _PARTS for part in _parts(table.get(name))]
    if len(parts) > _MAX_PARTS:
        raise ValueError(f"{len(parts)} rules, at most {_MAX_PARTS}")
    for part in parts:
        _check_part(part)
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        growth = math.prod(_growth(part) for name in names for part in _parts(table.get(name)))
        if growth > _MAX_GROWTH:
            raise ValueError(f"its {names[0]} makes a text {growth:.3g} times as long, at most {_MAX_GROWTH:.0f} times")


def _check_model(model: Mapping[str, Any], size: int, alone: bool) -> None:
    """The vocabulary: token to id, or for Unigram a list of token and score."""
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is not int or longest > _MAX_WORD:
        raise ValueError(f"words of {longest} characters, at most {_MAX_WORD} are divided")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        if vocabulary or alone:
            check_ids(vocabulary)
        _check_lengths(vocabulary)
        prefix = model.get("continuing_subword_prefix")
        _check_lengths([prefix or "", model.get("end_of_word_suffix") or "", model.get("unk_token") or ""])
        return
    if not isinstance(vocabulary, list) or not all(isinstance(entry, list) and entry for entry in vocabulary):
        raise ValueError("its model has no vocabulary")
    tokens = [entry[0] for entry in vocabulary]
    _check_lengths(tokens)
    nodes = _trie_nodes(tokens)
    if nodes * _NODE_BYTES > 64 * size + (64 << 20):
        raise ValueError(f"a vocabulary of {nodes} characters without order")


def _check_lengths(tokens: Iterable[Any]) -> None:
    for token in tokens:
        if not isinstance(token, str):
            raise ValueError("a token is not a text")
        if len(token) > _MAX_TOKEN:
            raise ValueError(f"a token of {len(token)} characters, at most {_MAX_TOKEN}")


def _trie_nodes(tokens: list[str]) -> int:
    """Bytes of all tokens, those of common beginnings once."""
    words = sorted(token.encode() for token in tokens)
    return sum(map(len, words)) - sum(_in_common(one, other) for one, other in pairwise(words))


def _in_common(one: bytes, other: bytes) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _parts(part: Any) -> list[Mapping[str, Any]]:
    """A part of the tokenizer and all that it is made of."""
    if not isinstance(part, dict):
        return []
    inner = [p for key in ("normalizers", "pretokenizers", "processors", "decoders") for p in part.get(key) or ()]
    return [part, *(found for one in inner for found in _parts(one))]


def _check_part(part: Mapping[str, Any]) -> None:
    """One rule: short texts, one text in its template, a character map that is as long as it says."""
    for key, value in part.items():
        if key == "precompiled_charsmap":
            _check_map(value)
        elif any(len(text) > _MAX_TEXT for text in _texts(value)):
            raise ValueError(f"{key} of more than {_MAX_TEXT} characters")
    if part.get("type") == "TemplateProcessing":
        for key, most in (("single", 1), ("pair", 2)):
            pieces = part.get(key) or []
            if len(pieces) > _MAX_PARTS or sum("Sequence" in piece for piece in pieces) > most:
                raise ValueError(f"a template {key!r} that repeats the text")
        tokens = part.get("special_tokens") or {}
        if len(tokens) > _MAX_PARTS or any(len(token["ids"]) > _MAX_PARTS for token in tokens.values()):
            raise ValueError("a template of very many tokens")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value.values() if isinstance(text, str)] if isinstance(value, dict) else []


def _check_map(encoded: Any) -> None:
    """SentencePiece's character map: four bytes of length, so long a trie, and the texts it leads to."""
    content = base64.b64decode(encoded) if isinstance(encoded, str) else bytes(encoded or b"")
    if content and (len(content) < 4 or 4 + int.from_bytes(content[:4], "little") > len(content)):
        raise ValueError("a character map that is cut off")


def _growth(part: Mapping[str, Any]) -> float:
    """How many times as long a text can become by one rule, about."""
    match part.get("type"):
        case "ByteLevel":
            return 4.0
        case "Precompiled":
            return 64.0
        case "Replace":
            pattern, content = part.get("pattern"), str(part.get("content", ""))
            literal = pattern.get("String") if isinstance(pattern, dict) else None
            return max(1.0, len(content) / len(literal)) if literal else 1.0 + len(content)
        case _:
            return 1.0
