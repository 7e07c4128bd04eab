"""Files as text: UTF-8, or what a byte order mark says; whatever is no text is left out and told of."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from potluck.errors import CorpusError

MAX_DOCUMENT_BYTES = 1 << 28  # a document is held in memory
_PROBE_BYTES = 1 << 20  # of a longer file, to tell a binary from a long text
_SHOWN = 3  # names in a sentence
_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_REASONS = {
    "encoding": "not UTF-8, and left out; convert each, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    "binary": "binary, and left out; text in UTF-16 needs a byte order mark",
    "unreadable": "not to be read by this user, and left out",
}


class NotText(Exception):
    """Why a file is no text: a key of the reasons."""


@dataclass
class LeftOut:
    """Files of a source that are no text, by reason: how many, and the names of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Note one file."""
        self.counts[reason] += 1
        if self.counts[reason] <= _SHOWN:
            self.names.setdefault(reason, []).append(name)

    def sentences(self) -> list[str]:
        """For each reason, which files and what to do."""
        return [f"{self._which(reason)} {_REASONS[reason]}" for reason in self.counts]

    def _which(self, reason: str) -> str:
        count, names = self.counts[reason], ", ".join(self.names[reason])
        more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
        return f"{names}{more} {'is' if count == 1 else 'are'}"


def read_text(path: Path) -> str:
    """A whole file.

    Raises:
        NotText: It is binary (it holds a zero character), in another encoding, or this user may not read it.
        CorpusError: It is text, and longer than a document may be.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size > MAX_DOCUMENT_BYTES:
                _decoded(file.read(_PROBE_BYTES), whole=False)
                raise too_long(str(path))
            return _decoded(file.read(), whole=True)
    except PermissionError:
        raise NotText("unreadable") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file from 1, each with its end.

    Raises:
        CorpusError: A line is too long, or in another encoding than the file begins with.
    """
    with path.open("rb") as file:
        encoding = _encoding_of(file.read(4))
    lines = _utf8_lines(path) if encoding.startswith("utf-8") else _other_lines(path, encoding)
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_DOCUMENT_BYTES:
            raise too_long(f"{path}: line {number}")
        yield number, line


def too_long(where: str) -> CorpusError:
    """The error for a document that cannot be held in memory."""
    return CorpusError(
        f"{where} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB, and a document is held in memory",
        "cut it into documents, for example as JSON lines",
    )


def _encoding_of(start: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def _decoded(content: bytes, whole: bool) -> str:
    """Text in the encoding that its mark names; without ``whole`` the last character may be cut off."""
    encoding = _encoding_of(content[:4])
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(content, final=whole)
    except UnicodeDecodeError:
        marked = encoding in ("utf-16", "utf-32")
        raise NotText("binary" if marked or b"\0" in content else "encoding") from None
    if "\0" in text:
        raise NotText("binary")
    return text


def _utf8_lines(path: Path) -> Iterator[str]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise too_long(f"{path}: line {number}") from None
                hint = f"convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > NEW"
                raise CorpusError(f"{path}: line {number} is not UTF-8 ({error.reason})", hint) from None


def _other_lines(path: Path, encoding: str) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                yield line
    except UnicodeError as error:
        hint = "its byte order mark says so; save it as UTF-8"
        raise CorpusError(f"{path}: after line {number} it is not {encoding.upper()} ({error})", hint) from None
