"""The registry: what a search needs of every entry, in one table of SQLite or PostgreSQL.

The entries are the truth and the registry an index of them: it is mended from the library whenever that is opened, and
may be deleted. One registry can serve several libraries, and several processes at once.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import quote, unquote, urlsplit

from potluck.errors import MissingExtra, RecipeError, StorageError

# The 1 is the version of the form: another one gets a table of its own, so that two versions can share a database.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS potluck_entries_1 (
    library TEXT NOT NULL,
    name TEXT NOT NULL,
    stamp TEXT NOT NULL,
    card TEXT NOT NULL,
    specification {bytes} NOT NULL,
    PRIMARY KEY (library, name)
)
"""
_STAMPS = "SELECT name, stamp FROM potluck_entries_1 WHERE library = ?"
_ROWS = "SELECT name, stamp, card, specification FROM potluck_entries_1 WHERE library = ? ORDER BY name"
_FORGET = "DELETE FROM potluck_entries_1 WHERE library = ? AND name = ?"
_KEEP = """
INSERT INTO potluck_entries_1 (library, name, stamp, card, specification) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (library, name) DO UPDATE
SET stamp = excluded.stamp, card = excluded.card, specification = excluded.specification
"""
_KINDS = "name one such as postgresql://HOST/DATABASE or sqlite:///FILE"
_PATIENCE = 30.0  # seconds that a writer waits for others


@dataclass(frozen=True)
class Row:
    """One entry.

    Attributes:
        stamp: Of the card that it was read from (`Storage.listed`).
        card: JSON.
        specification: The file's content.
    """

    name: str
    stamp: str
    card: str
    specification: bytes


class Cursor(Protocol):
    """What is used of a cursor of Python's database API (PEP 249)."""

    def execute(self, statement: str, values: Sequence[object] = ...) -> object: ...  # noqa: D102
    def executemany(self, statement: str, values: Iterable[Sequence[object]]) -> object: ...  # noqa: D102
    def fetchall(self) -> list[Any]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Connection(Protocol):
    """What is used of a connection of Python's database API (PEP 249)."""

    def cursor(self) -> Cursor: ...  # noqa: D102
    def commit(self) -> None: ...  # noqa: D102
    def rollback(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Registry:
    """The table, for one library.

    Args:
        url: ``sqlite:///FILE``, ``sqlite://`` (kept in memory) or ``postgresql://…``.
        library: The library's id.

    Raises:
        MissingExtra: psycopg is not installed.
        RecipeError: The URL is of no kind that is known.
        StorageError: The database cannot be reached or used.
    """

    def __init__(self, url: str, library: str) -> None:
        self.place = _shown(url)
        self._library = library
        self._connection, self._mark, self._failures = _connected(url, self.place)
        try:
            with self._transaction() as cursor:
                cursor.execute(_SCHEMA.format(bytes="BLOB" if self._mark == "?" else "BYTEA"))
        except StorageError:  # several that create it at once may fail, and who may only read cannot: is it there?
            self.stamps()

    def stamps(self) -> dict[str, str]:
        """Name and stamp of every row.

        Raises:
            StorageError: The database cannot be read.
        """
        return dict(self._answer(_STAMPS))

    def rows(self) -> list[Row]:
        """Everything, by name.

        Raises:
            StorageError: The database cannot be read.
        """
        return [Row(name, stamp, card, bytes(content)) for name, stamp, card, content in self._answer(_ROWS)]

    def update(self, kept: Iterable[Row] = (), forgotten: Iterable[str] = ()) -> None:
        """Insert or replace some rows and forget others, all or none.

        Raises:
            StorageError: The database cannot be written.
        """
        rows = [(self._library, row.name, row.stamp, row.card, row.specification) for row in kept]
        gone = [(self._library, name) for name in forgotten]
        with self._transaction() as cursor:
            if rows:
                cursor.executemany(self._marked(_KEEP), sorted(rows))
            if gone:
                cursor.executemany(self._marked(_FORGET), sorted(gone))

    def close(self) -> None:
        """Let go of the database."""
        self._connection.close()

    def _answer(self, statement: str) -> list[Any]:
        with self._transaction() as cursor:
            cursor.execute(self._marked(statement), (self._library,))
            return cursor.fetchall()

    def _marked(self, statement: str) -> str:
        return statement.replace("?", self._mark)

    @contextmanager
    def _transaction(self) -> Iterator[Cursor]:
        try:
            with closing(self._connection.cursor()) as cursor:
                yield cursor
            self._connection.commit()
        except self._failures as error:
            self._connection.rollback()
            raise StorageError(f"the registry {self.place}: {_gist(error)}", _hint(self.place)) from None


def _connected(url: str, place: str) -> tuple[Connection, str, type[Exception]]:
    """A connection, how it marks a value's place in a statement, and what its errors are."""
    scheme = url.partition("://")[0]
    if scheme == "sqlite":
        return _sqlite(url, place), "?", sqlite3.Error
    if scheme not in ("postgresql", "postgres"):
        raise RecipeError(f"the registry {place}: no such kind of database", _KINDS)
    try:
        import psycopg
    except ImportError:
        hint = "pip install 'potluck[postgres]'"
        raise MissingExtra(f"the registry {place}: needs the library `psycopg`", hint) from None
    try:
        return cast(Connection, psycopg.connect(url, connect_timeout=10, client_encoding="utf8")), "%s", psycopg.Error
    except psycopg.Error as error:
        raise StorageError(f"the registry {place}: cannot be reached ({_gist(error, url)})", _hint(place)) from None


def _sqlite(url: str, place: str) -> Connection:
    path = unquote(url.removeprefix("sqlite://").removeprefix("/"))
    try:
        connection = sqlite3.connect(path or ":memory:", timeout=_PATIENCE)
        connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"the registry {place}: cannot be used ({_gist(error)})", _hint(place)) from None
    return connection


def sqlite_url(path: Path) -> str:
    """The URL of a file."""
    return f"sqlite:///{quote(str(path))}"


def _shown(url: str) -> str:
    """A URL without user, password and options."""
    try:
        parts = urlsplit(url)
        if "://" not in url:
            raise ValueError
    except ValueError:  # which of it may be shown cannot be told
        raise RecipeError("the registry: its URL cannot be read", _KINDS) from None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _gist(error: Exception, url: str = "") -> str:
    """An error's first line, without the password if a driver should repeat it."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    for secret in filter(None, (urlsplit(url).password, *re.findall(r"password=([^&\s]+)", url))):
        text = text.replace(secret, "…").replace(unquote(secret), "…")
    return text


def _hint(place: str) -> str:
    if place.startswith("sqlite"):
        return "it is only an index: if it is damaged, delete it"
    return "the password can come from PGPASSWORD or ~/.pgpass"
