"""A library of adapters: what lies in it, and how that is put in and taken out.

::

    LIBRARY/
    ├── library.safetensors      the yardstick; made with the first entry
    ├── begun/                   pieces of it, while it is made
    ├── registry.sqlite          an index of what is below; may be deleted
    └── entries/NAME/
        ├── card.json            facts, and the hash of every file: written last
        └── DIGEST/              an adapter folder as PEFT loads it, and specification.safetensors

An entry is what its card says, and its files lie under the hash of them all. So it is there in full or not at all,
however many write at once and wherever they are killed; at worst, files stay that no card names.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from potluck.compose.adapter import Adapter, load_adapter
from potluck.compose.base import Base
from potluck.compose.library.cards import NAME, SPECIFICATION_FILE, Card, check_content, read_card
from potluck.compose.library.registry import Registry, Row, sqlite_url
from potluck.compose.library.specification import MAX_BYTES, Specification, read_specification
from potluck.compose.library.storage import Files, Storage, storage_at
from potluck.compose.library.written import Say, forget
from potluck.compose.library.yardstick import Yardstick, read_yardstick, yardstick_of
from potluck.compose.routing.evidence import PROFILE_FILE, read_profile
from potluck.errors import ModelError, StorageError
from potluck.files import appearing, storing

YARDSTICK_FILE = "library.safetensors"
REGISTRY_FILE = "registry.sqlite"
_CARD_PATH = re.compile(rf"entries/({NAME})/card\.json")
_MAX_YARDSTICK = 64 << 20
_MAX_CARD = 64 << 10


@dataclass
class Library:
    """An open library.

    Attributes:
        damaged: Entries that cannot be used, and why.
    """

    storage: Storage
    registry: Registry
    yardstick: Yardstick
    damaged: dict[str, str] = field(default_factory=dict)

    def cards(self) -> list[Card]:
        """Of all entries, by name.

        Raises:
            StorageError: The registry cannot be read.
        """
        return [read_card(row.card, row.name) for row in self.registry.rows()]

    def specifications(self) -> dict[str, Specification]:
        """Of all entries, by name.

        Raises:
            StorageError: The registry cannot be read.
        """
        rows = self.registry.rows()
        return {row.name: read_specification(row.specification, row.name, self.yardstick) for row in rows}

    def close(self) -> None:
        """Let go of the registry."""
        self.registry.close()

    def refresh(self) -> None:
        """Bring the registry up to what lies in the library; what is damaged is left out.

        Raises:
            StorageError: The library or its registry cannot be read or written.
        """
        listed = self.storage.listed("entries")
        stamps = {found[1]: stamp for path, stamp in listed.items() if (found := _CARD_PATH.fullmatch(path))}
        known, rows = self.registry.stamps(), []
        self.damaged = {}
        for name in sorted(name for name, stamp in stamps.items() if known.get(name) != stamp):
            try:
                rows.append(_row(self, name, stamps[name]))
            except ModelError as error:
                self.damaged[name] = str(error)
        gone = [name for name in known if name not in stamps or name in self.damaged]
        if rows or gone:
            self.registry.update(rows, gone)


def open_library(
    place: str, registry: str = "", begun_with: Base | None = None, say: Say = lambda text: None
) -> Library:
    """A library whose registry is up to date.

    Args:
        place: A folder, or a URL such as ``s3://bucket/prefix``.
        registry: Its URL; if left out a SQLite file in the folder, and in memory for an object store.
        begun_with: If there is no library yet, begin one for this base. What was done of that when it was stopped is
            not done again.
        say: Told how far beginning is.

    Raises:
        StorageError: There is no library, or it cannot be read.
        ModelError: Its yardstick is damaged, or for another base.
    """
    storage = storage_at(place)
    content = storage.read(YARDSTICK_FILE, _MAX_YARDSTICK)
    if content is None and begun_with is not None:
        new = yardstick_of(begun_with, secrets.token_hex(8), keep=storage, say=say)
        storage.write(YARDSTICK_FILE, new.to_bytes(), new=True)  # if another was faster, theirs counts
        forget(storage)
        content = storage.read(YARDSTICK_FILE, _MAX_YARDSTICK)
    if content is None:
        raise StorageError(f"{storage.place}: no library", "`potluck library add` begins one")
    yardstick = read_yardstick(content, f"{storage.place}/{YARDSTICK_FILE}")
    library = Library(storage, Registry(registry or _own_registry(storage), yardstick.library), yardstick)
    library.refresh()
    return library


def add_entry(library: Library, card: Card, contents: Mapping[str, bytes], replace: bool = False) -> str:
    """Put an entry in: ``added``, ``replaced``, or ``unchanged`` if it was there already.

    Args:
        card: With its contents, from `card_of`.
        replace: Take the place of another entry of this name, or of a damaged one.

    Raises:
        StorageError: There is another entry of this name, or the library cannot be written.
        ModelError: There is one, and it is damaged.
    """
    storage, damaged = library.storage, card.name in library.damaged
    if damaged and not replace:
        raise ModelError(library.damaged[card.name], "put this in its place with --replace")
    before = None if damaged else _card(storage, card.name)
    if before is None or replace:
        for file, content in contents.items():
            storage.write(f"{card.home}/{file}", content)
        if storage.write(_card_path(card.name), card.model_dump_json(indent=1).encode(), new=not replace):
            if before is not None and before.home != card.home:
                _remove_files(storage, before)
            library.refresh()
            return "replaced" if before is not None or damaged else "added"
        before = _card(storage, card.name)  # somebody was faster
        if before is None or before.home != card.home:
            _remove_files(storage, card)
    if before is not None and before.same(card):
        return "unchanged"
    hint = "choose another name, or put this in its place with --replace"
    raise StorageError(f"{storage.place}: there is another entry {card.name}", hint)


def remove_entry(library: Library, name: str) -> None:
    """Take an entry out, and whatever else lies under its name.

    Raises:
        StorageError: There is none, or the library cannot be written.
    """
    paths = library.storage.listed(f"entries/{name}") if re.fullmatch(NAME, name) else {}
    if not paths:
        raise _no_entry(library, name)
    for path in sorted(paths, key=lambda path: path != _card_path(name)):  # the card first
        library.storage.remove(path)
    library.refresh()


def known_card(library: Library, name: str) -> Card:
    """The card of an entry, as it is now.

    Raises:
        StorageError: There is no such entry.
        ModelError: It is damaged.
    """
    card = _card(library.storage, name) if re.fullmatch(NAME, name) else None
    if card is None:
        raise _no_entry(library, name)
    return card


def fetch_entry(library: Library, name: str, folder: Path) -> Card:
    """Write an entry's files to a new folder, which PEFT loads; every hash is compared.

    Raises:
        StorageError: There is no such entry, or something at ``folder`` already, or it cannot be written.
        ModelError: The entry is damaged.
    """
    card = known_card(library, name)
    with appearing(folder) as partial:
        for file in card.files:
            content = _content(library.storage, card, file)
            with storing(folder):
                (partial / file).write_bytes(content)
    return card


def adapter_of(library: Library, name: str) -> Adapter:
    """An entry's adapter, loaded.

    Raises:
        StorageError: There is no such entry, or no room for a copy of it.
        ModelError: The entry is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        fetch_entry(library, name, Path(folder) / name)
        return load_adapter(Path(folder) / name)


def profile_of(library: Library, name: str, vocabulary_size: int) -> Tensor:
    """The profile of an entry's text, fp32 ``(vocabulary_size,)``.

    Raises:
        StorageError: There is no such entry.
        ModelError: It was added without a profile, or is damaged.
    """
    card = known_card(library, name)
    if PROFILE_FILE not in card.files:
        hint = "its owner can add it again, with --public and --replace; or route with --by arrow"
        raise ModelError(f"{library.storage.place}: {name} has no profile of its text", hint)
    content = _content(library.storage, card, PROFILE_FILE)
    return read_profile(content, f"{library.storage.place}: {name}", vocabulary_size)


# --- paths and files -----------------------------------------------------------------------------


def _no_entry(library: Library, name: str) -> StorageError:
    return StorageError(f"{library.storage.place}: there is no entry {name}", "`potluck library list` names them")


def _card_path(name: str) -> str:
    return f"entries/{name}/card.json"


def _card(storage: Storage, name: str) -> Card | None:
    content = storage.read(_card_path(name), _MAX_CARD)
    if content is None:
        return None
    card = read_card(content, f"{storage.place}/{_card_path(name)}")
    if card.name != name:
        raise ModelError(f"{storage.place}/{_card_path(name)}: the card of {card.name}")
    return card


def _content(storage: Storage, card: Card, file: str) -> bytes:
    path = f"{card.home}/{file}"
    return check_content(card, file, storage.read(path, card.files[file].bytes), f"{storage.place}/{path}")


def _row(library: Library, name: str, stamp: str) -> Row:
    """An entry for the registry, checked as far as a search needs it."""
    card = known_card(library, name)
    if card.base_hash != library.yardstick.base_hash:
        raise ModelError(f"{library.storage.place}: {name} is for another base than the library")
    if card.files[SPECIFICATION_FILE].bytes > MAX_BYTES:
        raise ModelError(f"{library.storage.place}: {name}: its specification is too large")
    content = _content(library.storage, card, SPECIFICATION_FILE)
    read_specification(content, f"{library.storage.place}: {name}", library.yardstick)
    return Row(name, stamp, card.model_dump_json(), content)


def _remove_files(storage: Storage, card: Card) -> None:
    for file in card.files:
        storage.remove(f"{card.home}/{file}")


def _own_registry(storage: Storage) -> str:
    if isinstance(storage, Files) and os.access(storage.folder, os.W_OK):
        return sqlite_url(storage.folder / REGISTRY_FILE)
    return "sqlite://"
