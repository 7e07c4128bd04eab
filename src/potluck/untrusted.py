"""JSON and TOML from outside: one reader with bounds, and one check of types.

Whoever reads bytes that another process, machine or person wrote reads them here: messages, files of a model or an
adapter, a library's entries, what a run left on disk. What is refused is a ``ValueError`` in a few words; the caller
says in potluck's own error where it was. Reading n bytes takes less than 64 n bytes of memory.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

MAX_BYTES = 64 << 20
MAX_TOML_BYTES = 4 << 20
_PIECE = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 20  # of 2^64
_DOTTED = re.compile(rf"(?:[\w\"'-]+[ \t]*\.[ \t]*){{{MAX_DEPTH}}}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_adapter: Any = cache(TypeAdapter)
_MAX_LINE = 1000  # characters

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortText = Annotated[str, Field(max_length=1000)]


def loads(
    data: bytes | bytearray | memoryview | str,
    *,
    most_bytes: int = MAX_BYTES,
    depth: int = MAX_DEPTH,
    digits: int = MAX_DIGITS,
) -> Any:
    """A JSON value in UTF-8, as RFC 8259 has it, and no more.

    Args:
        data: What came.
        most_bytes: More than this is refused unread.
        depth: How many lists and objects may hold one another.
        digits: Of an integer.

    Raises:
        ValueError: It is larger, deeper or longer than that, no JSON, names a key twice, holds NaN, an infinite number
            or text that is not Unicode.
    """
    if len(data) > most_bytes:
        raise ValueError(f"{len(data)} bytes of JSON, at most {most_bytes} are read")
    text = data if isinstance(data, str) else str(data, "utf-8")
    try:
        value = _decoder(digits).decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {depth}") from None
    _walk(value, depth, texts=_SURROGATE.search(text) is not None)
    return value


def loads_toml(text: str, *, most_bytes: int = MAX_TOML_BYTES) -> dict[str, Any]:
    """TOML, within bounds as `loads` has them.

    Raises:
        ValueError: It is larger, deeper or longer than that, or no TOML.
    """
    if len(text) > most_bytes:
        raise ValueError(f"{len(text)} bytes of TOML, at most {most_bytes} are read")
    if _DOTTED.search(text):  # the library keeps every beginning of a dotted key
        raise ValueError(f"a key of more than {MAX_DEPTH} parts")
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _walk(found, MAX_DEPTH, texts=False)
    return found


def load_toml(path: Path, *, most_bytes: int = MAX_TOML_BYTES) -> dict[str, Any]:
    """A file's TOML, as `loads_toml` reads it; a file that is larger is not read.

    Raises:
        OSError: It cannot be read.
        ValueError: As `loads_toml` raises it.
    """
    return loads_toml(read_bytes(path, most_bytes).decode(), most_bytes=most_bytes)


def load_json(path: Path, *, most_bytes: int = MAX_BYTES, depth: int = MAX_DEPTH, digits: int = MAX_DIGITS) -> Any:
    """A file's JSON, as `loads` reads it; a file that is larger is not read.

    Raises:
        OSError: It cannot be read.
        ValueError: As `loads` raises it.
    """
    return loads(read_bytes(path, most_bytes), most_bytes=most_bytes, depth=depth, digits=digits)


def read_bytes(path: Path, most_bytes: int = MAX_BYTES) -> bytes:
    """A file's content, if it has no more bytes than that.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger.
    """
    with path.open("rb") as file:
        size, content = os.fstat(file.fileno()).st_size, bytearray()
        while size <= most_bytes and (piece := file.read(_PIECE)):  # read(most_bytes) would take as much at once
            content += piece
            size = max(size, len(content))
    if size > most_bytes:
        raise ValueError(f"a file of {size} bytes, at most {most_bytes} are read")
    return bytes(content)


def checked(kind: type[T], value: Any) -> T:
    """A value from outside, if it is of this type: nothing is converted, ``true`` is no number and ``"1"`` is none.

    Args:
        kind: A pydantic model, ``dict[str, Count]``, a union …; lists stay lists.

    Raises:
        ValueError: It is not, with the first place where it is not, in one line.
    """
    try:
        found: T = _adapter(kind).validate_python(value, strict=True)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:50] for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def in_a_line(text: str) -> str:
    """Somebody else's words as they may go into a log and onto a terminal: one short line, no control characters."""
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_LINE])


Line = Annotated[str, AfterValidator(in_a_line)]


def _walk(value: Any, depth: int, texts: bool) -> None:
    """Refuse what is nested deeper; with ``texts``, also text that UTF-8 cannot hold (lone surrogates)."""
    level = [value]
    for _ in range(depth):
        if texts:
            _encode(level)
        holders = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in holders for child in (item.values() if isinstance(item, dict) else item)]
        if not texts:
            level = [child for child in level if isinstance(child, dict | list)]
        if not level:
            return
    if any(isinstance(item, dict | list) for item in level):
        raise ValueError(f"nested deeper than {depth}")
    if texts:
        _encode(level)


def _encode(level: list[Any]) -> None:
    for item in level:
        for text in [item] if isinstance(item, str) else item if isinstance(item, dict) else ():
            text.encode()  # a UnicodeEncodeError is a ValueError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number that is not finite")
    return number


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


@cache
def _decoder(most: int) -> json.JSONDecoder:
    def integer(digits: str) -> int:
        if len(digits) > most:
            raise ValueError(f"an integer of {len(digits)} digits, at most {most} are read")
        return int(digits)

    return json.JSONDecoder(object_pairs_hook=_object, parse_int=integer, parse_float=_finite, parse_constant=_refused)
