"""The card of an entry: what it is, whose, for which base, and the hash of every file."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from potluck.compose.adapter import ABOUT_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from potluck.compose.base import Base
from potluck.compose.fit import check_adapter
from potluck.compose.library.specification import Specification
from potluck.compose.routing.evidence import PROFILE_FILE
from potluck.errors import ModelError, RecipeError
from potluck.untrusted import loads

SPECIFICATION_FILE = "specification.safetensors"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_FILE_BYTES = 4 << 30
_NEEDED = frozenset({CONFIG_FILE, WEIGHTS_FILE, SPECIFICATION_FILE})
_MORE = frozenset({ABOUT_FILE, PROFILE_FILE})
_HASH = r"^[0-9a-f]{64}$"
_HOME_DIGITS = 16
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"  # it is shown on terminals


class FileFacts(BaseModel):
    """A file of an entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str = Field(pattern=_HASH)
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class Card(BaseModel):
    """What is known of an entry without loading it.

    Attributes:
        base_hash: Of the base it was trained on.
        noise: As in its specification.
        gain: Nats per token by which the adapter lowered the loss of its own text when it was added; below zero it does
            harm. ``None`` of entries that were added by older versions.
        added: UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = Field(default=1, ge=1, le=1)
    name: str = Field(pattern=rf"^{NAME}$")
    base_hash: str = Field(pattern=_HASH)
    rank: int = Field(ge=1)
    parameters: int = Field(ge=1)
    who: str = Field(default="", max_length=200, pattern=_PLAIN)
    licence: str = Field(default="", max_length=200, pattern=_PLAIN)
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gain: float | None = Field(default=None, allow_inf_nan=False)
    added: datetime
    files: dict[str, FileFacts]

    @model_validator(mode="after")
    def _names_the_files(self) -> Self:
        if not _NEEDED <= self.files.keys() <= _NEEDED | _MORE:
            raise ValueError(f"names the files {', '.join(sorted(self.files))}")
        return self

    @property
    def home(self) -> str:
        """Where its files lie: under the hash of them all."""
        whole = "".join(f"{name} {facts.sha256}\n" for name, facts in sorted(self.files.items()))
        return f"entries/{self.name}/{hashlib.sha256(whole.encode()).hexdigest()[:_HOME_DIGITS]}"

    @property
    def adapter_hash(self) -> str:
        """SHA-256 of its weights."""
        return self.files[WEIGHTS_FILE].sha256

    def same(self, other: Card) -> bool:
        """Whether it offers the same. Noise that is drawn once more makes no difference: it would average out."""
        return self._offer() == other._offer()

    def _offer(self) -> object:
        files = {name: facts for name, facts in self.files.items() if not (self.noise and name == SPECIFICATION_FILE)}
        return self.model_dump(exclude={"added", "files", "gain"}), files


def read_card(content: str | bytes, what: str) -> Card:
    """A card from JSON.

    Raises:
        ModelError: It is not one.
    """
    try:
        return Card.model_validate(loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{what}: not an entry's card ({place}: {first['msg']})") from None
    except ValueError as error:
        raise ModelError(f"{what}: not an entry's card ({error})") from None


def card_of(
    name: str,
    folder: Path,
    base: Base,
    specification: Specification,
    who: str = "",
    licence: str = "",
    profile: bytes | None = None,
    gain: float | None = None,
) -> tuple[Card, dict[str, bytes]]:
    """The card of an adapter folder, and the files that it names.

    Args:
        profile: Of its text, for routing by evidence; given away only if it is given here.
        gain: As in `Card`.

    Raises:
        ModelError: The adapter cannot be used, or does not fit the base.
        RecipeError: The name, ``who`` or ``licence`` is none.
    """
    adapter = load_adapter(folder)
    check_adapter(base, adapter, str(folder))
    contents = _contents(folder) | {SPECIFICATION_FILE: specification.to_bytes()}
    if profile is not None:
        contents[PROFILE_FILE] = profile
    files = {file: FileFacts(sha256=_sha256(content), bytes=len(content)) for file, content in contents.items()}
    try:
        card = Card(
            name=name, base_hash=base.content_hash, rank=adapter.rank, parameters=adapter.parameters, who=who,
            licence=licence, noise=specification.noise, gain=gain, added=datetime.now(UTC).replace(microsecond=0),
            files=files,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        hint = "an entry's name is up to 64 letters, digits, `.`, `_` and `-`; see --name"
        raise RecipeError(f"{first['loc'][0]} {first['input']!r}: {first['msg']}", hint) from None
    return card, contents


def check_content(card: Card, file: str, content: bytes | None, what: str) -> bytes:
    """A file's content, if it is the one that the card names.

    Raises:
        ModelError: It is missing or another.
    """
    if content is None or _sha256(content) != card.files[file].sha256:
        reason = "missing" if content is None else "not what its card says"
        raise ModelError(f"{what}: {reason}: the entry is damaged", "its owner can add it again, with `--replace`")
    return content


def _contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE, ABOUT_FILE):
        path = folder / name
        if not path.exists() and name == ABOUT_FILE:
            continue
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ModelError(f"{path}: larger than the {MAX_FILE_BYTES >> 30} GiB that an adapter may have")
            found[name] = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
