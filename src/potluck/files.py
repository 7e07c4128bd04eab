"""Writing to disk: whole or not at all, and a clear error when it fails."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from potluck.errors import StorageError

# Where a path leads through folders of this machine: not in the middle of a word, and not in a URL.
_FOLDERS = re.compile(r"(?<![\w.:/~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+")
_HUB = re.compile(r"models--(.+?)--(.+)")


def page(name: str) -> str:
    """Where a page of the documentation lies here, such as ``reference/recipe.md``: in a checkout, or as installed."""
    places = (Path(__file__).parents[2] / "docs", Path(sysconfig.get_path("data")) / "share" / "doc" / "potluck")
    return next((str(place / name) for place in places if (place / name).exists()), f"docs/{name} of potluck's source")


def nearby(path: Path) -> str:
    """What may have been meant by a path that leads nowhere, as a sentence; empty if nothing there is like it."""
    while not path.parent.exists():
        path = path.parent
    with suppress(OSError):
        if close := difflib.get_close_matches(path.name, os.listdir(path.parent), 1):
            return f"did you mean {path.parent / close[0]}?"
    return ""


def name_of(path: str | Path) -> str:
    """What other people are told of a file or folder of this machine: its name, and not where it lies.

    A download of the Hugging Face hub has its name there, the model of a run that run's name before it. What is no
    absolute path stays as it is.
    """
    place = Path(path)
    if not place.is_absolute():
        return str(path)
    hub = _HUB.fullmatch(place.parts[-3]) if len(place.parts) > 3 and place.parts[-2] == "snapshots" else None
    if hub:
        return f"{hub[1]}/{hub[2]}"
    return "/".join(place.parts[-2:]) if place.name == "model" and len(place.parts) > 2 else place.name


def without_folders(text: str) -> str:
    """A sentence for other people: of the paths in it only the names."""
    return _FOLDERS.sub("", text)


@contextmanager
def storing(where: Path | str) -> Iterator[None]:
    """Turn a failure to write into a `StorageError` that names the place."""
    try:
        yield
    except OSError as error:
        hint = "free some space or choose another place"
        raise StorageError(f"{where}: cannot be written ({error.strerror or error})", hint) from None


def private_folder(folder: Path) -> Path:
    """Make a folder that its owner alone may look into; one that is there becomes so.

    Raises:
        StorageError: It cannot be made.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file whole or leave what was there, even if two processes write it or one is killed.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder that is there when it is whole: within, what is written goes to ``.NAME.partial`` beside it.

    Raises:
        StorageError: There is something at ``folder``, or it cannot be written.
    """
    if folder.exists():
        raise StorageError(f"{folder}: there is something here already", "name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with storing(folder):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
        yield partial
        with storing(folder):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
