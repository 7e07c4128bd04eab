"""A signed record of what was forgotten: what was done to which model, and not a word of what it was.

It is JSON. The request stands in it as a commitment, ``SHA-256(opening ‖ request)``: without the opening, which whoever
forgot keeps, nobody can try out what the request may have been; with it anybody can check that it was this one.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potluck.errors import EditError, MissingExtra
from potluck.files import write_text
from potluck.untrusted import load_json

try:
    from potluck.engine.nats import identity
except ImportError:
    raise MissingExtra("signing records needs more libraries", "pip install 'potluck[nats]'") from None

VERSION = 1
_MAX_BYTES = 1 << 20
_TEXTS = ("before", "after", "request", "time", "public", "signature")


@dataclass(frozen=True)
class Record:
    """What was done.

    Attributes:
        method: Such as ``alphaedit`` or ``expert``, with its settings.
        before, after: SHA-256 of the model, the library or the sum, before and after.
        request: The commitment to what was asked to be forgotten.
        figures: What was measured before and after.
        time: When, UTC.
        public: Whose key signed it.
        signature: Ed25519 over all of the above, hexadecimal.
    """

    version: int
    method: Mapping[str, Any]
    before: str
    after: str
    request: str
    figures: Mapping[str, Any]
    time: str
    public: str
    signature: str


def seed_of(key: Path) -> str:
    """The seed in a key file, which is made if there is none.

    Raises:
        InviteError: The file holds something else.
        StorageError: It cannot be written.
    """
    return identity.read_or_make_seed(key)


def signed_record(
    method: Mapping[str, Any], before: str, after: str, request: str, figures: Mapping[str, Any], seed: str
) -> Record:
    """Sign what was done.

    Args:
        request: From `commitment`.
        seed: Of an Ed25519 key, as `potluck join --make-key` makes it.

    Raises:
        InviteError: It is no seed.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    said = (VERSION, _plain(method), before, after, request, _plain(figures), time, identity.public_key(seed))
    unsigned = Record(*said, signature="")
    return Record(*said, signature=identity.sign(seed, _content(unsigned)).hex())


def write_record(record: Record, path: Path) -> None:
    """Write it as JSON.

    Raises:
        StorageError: The file cannot be written.
    """
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")


def read_record(path: Path) -> Record:
    """Read a record, and check that whoever it names signed it as it is.

    Raises:
        EditError: It cannot be read, is no record, or the signature is not that of this record.
    """
    try:
        table = load_json(path, most_bytes=_MAX_BYTES)
        if not isinstance(table, dict) or table.keys() != {field.name for field in fields(Record)}:
            raise ValueError("other fields than those of a record")
        if not all(isinstance(table[name], str) for name in _TEXTS):
            raise ValueError("a field is no text")
        record = Record(**table)
        signature = bytes.fromhex(record.signature)
        content = _content(record)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EditError(f"{path}: no record of forgetting ({error})", "`potluck forget --record` writes one") from None
    if record.version != VERSION:
        raise EditError(f"{path}: a record of version {record.version}, which is not known here")
    if not identity.is_public_key(record.public) or not identity.signed_by(record.public, content, signature):
        raise EditError(f"{path}: the signature is not that of this record", "it was changed after it was signed")
    return record


def new_opening() -> str:
    """32 random bytes, hexadecimal."""
    return secrets.token_hex(32)


def commitment(request: bytes, opening: str) -> str:
    """``SHA-256(opening ‖ request)``.

    Raises:
        EditError: The opening is not hexadecimal of 32 bytes.
    """
    try:
        begun = bytes.fromhex(opening)
    except ValueError:
        begun = b""
    if len(begun) != 32:
        raise EditError("the opening is not 64 hexadecimal digits", "it was printed when the record was written")
    return hashlib.sha256(begun + request).hexdigest()


def _content(record: Record) -> bytes:
    """What is signed: all fields but the signature, in one form."""
    table = asdict(record)
    del table["signature"]
    return b"potluck forget\n" + json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; figures that are not finite become null."""
    return {
        str(key): _plain(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in table.items()
    }
