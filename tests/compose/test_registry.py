"""The registry, on SQLite and on a PostgreSQL server of the test's own."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from potluck.compose.library.registry import Registry, Row, sqlite_url
from potluck.errors import MissingExtra, RecipeError, StorageError

SECRET = "a-secret of the test"
QUOTED = SECRET.replace(" ", "%20")
LIBRARY = "a1b2"


def postgres_programs() -> Path | None:
    """Where Debian and others keep what starts a server; it is not on the PATH."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")), shutil.which("initdb")]
    return Path(found[-1]).parent if found[-1] or found[:-1] else None


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty database, on a socket in a folder of its own; a server refuses to run as root."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "password").write_text(SECRET)
        if user:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)

        def run(program: str, *words: str) -> None:
            command = [str(programs / program), "-D", f"{folder}/data", *words]
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "-U", "potluck", "-A", "scram-sha-256", f"--pwfile={folder}/password", "-N", "--no-locale")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
        try:
            yield f"postgresql://potluck:{QUOTED}@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "registry.sqlite")
        return
    yield request.getfixturevalue("postgres")
    import psycopg

    with psycopg.connect(request.getfixturevalue("postgres")) as connection:
        connection.execute("DROP TABLE IF EXISTS potluck_entries_1")


def row(name: str, stamp: str = "1", content: bytes = b"\0'?%s\xff") -> Row:
    return Row(name, stamp, '{"who": "Zoë ? %s"}', content)


def test_what_is_kept_is_found_again(url: str) -> None:
    registry = Registry(url, LIBRARY)
    registry.update([row("b"), row("a")])
    registry.update([row("b", "2", b"new")], forgotten=["a", "never"])
    registry.update([row("c")])
    registry.close()
    again = Registry(url, LIBRARY)
    assert again.rows() == [row("b", "2", b"new"), row("c")]
    assert again.stamps() == {"b": "2", "c": "1"}
    again.close()


def test_libraries_do_not_see_each_other(url: str) -> None:
    ours, theirs = Registry(url, LIBRARY), Registry(url, "c3d4")
    ours.update([row("a", "ours")])
    theirs.update([row("a", "theirs")], forgotten=["b"])
    assert (ours.stamps(), theirs.stamps()) == ({"a": "ours"}, {"a": "theirs"})
    for registry in (ours, theirs):
        registry.close()


def test_all_or_nothing(url: str) -> None:
    registry = Registry(url, LIBRARY)
    registry.update([row("a")])
    broken = Row("z", "1", None, b"")  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"the registry .*: "):
        registry.update([row("b"), broken], forgotten=["a"])
    assert registry.stamps() == {"a": "1"}
    registry.close()


def add_some(url: str, number: int) -> int:
    registry = Registry(url, LIBRARY)
    for turn in range(5):
        registry.update([row(f"{number}-{turn}"), row("common", str(number))])
    found = len(registry.rows())
    registry.close()
    return found


def test_several_processes_at_once(url: str) -> None:
    """From the start: they also create the table at once."""
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        counts = list(pool.map(add_some, [url] * 4, range(4)))
    registry = Registry(url, LIBRARY)
    assert len(registry.rows()) == 21 == max(counts)
    assert registry.stamps()["common"] in "0123"
    registry.close()


def test_in_memory_it_is_ones_own() -> None:
    registry = Registry("sqlite://", LIBRARY)
    registry.update([row("a")])
    assert registry.stamps() == {"a": "1"} and Registry("sqlite://", LIBRARY).stamps() == {}


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_wrong_password_is_not_repeated(postgres: str) -> None:
    wrong = postgres.replace(QUOTED, "not" + QUOTED)
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        Registry(wrong, LIBRARY)
    assert SECRET not in str(caught.value) + caught.value.hint and QUOTED not in str(caught.value)
    registry = Registry(postgres, LIBRARY)
    assert registry.place == "postgresql:///postgres"
    registry.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:PASSWORD@127.0.0.1:1/x", "cannot be reached"),
        ("postgresql://me@/x?host=/nowhere&password=PASSWORD", "cannot be reached"),
        ("postgresql://me:PASSWORD%zz@127.0.0.1:1/x", "cannot be reached"),
        ("mysql://me:PASSWORD@host/x", "no such kind of database"),
        ("postgresql://me:PASSWORD@[host/x", "cannot be read"),
        ("postgresql:me:PASSWORD@host", "cannot be read"),
        ("sqlite:////nowhere/PASSWORD/x", "cannot be used"),
    ],
)
def test_what_is_no_registry(url: str, says: str) -> None:
    if url.startswith("postgres"):
        pytest.importorskip("psycopg")
    with pytest.raises((StorageError, RecipeError), match=says) as caught:
        Registry(url.replace("PASSWORD", "hush-hush"), LIBRARY)
    assert says == "cannot be used" or "hush-hush" not in str(caught.value) + caught.value.hint


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="file is not a database") as caught:
        Registry(sqlite_url(tmp_path / "registry.sqlite"), LIBRARY)
    assert "delete it" in caught.value.hint


def test_a_database_of_somebody_elses(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE potluck_entries_1 (something TEXT)")
    other.close()
    registry = Registry(sqlite_url(tmp_path / "other.sqlite"), LIBRARY)
    with pytest.raises(StorageError, match="no such column"):
        registry.stamps()
    registry.close()


def test_without_psycopg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra) as caught:
        Registry("postgresql://host/x", LIBRARY)
    assert "potluck[postgres]" in caught.value.hint
