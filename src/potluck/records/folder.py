"""A run's folder: what it is called, who may write in it, what it holds.

::

    recipe.toml      the resolved recipe              events.jsonl   the truth of the run
    run.json         what kind of run this is         checkpoints/   round-000012/ ...
    tokenizer/       the tokenizer                    report.html, report.json, model/   made from the rest
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from potluck.errors import RunFolderError
from potluck.files import storing, write_text
from potluck.recipe import Recipe, load_recipe, recipe_toml

FORMAT = 1
POOLED = "pooled"


@dataclass(frozen=True)
class Variant:
    """Who trains: everybody together, one participant alone, or one trainer on everybody's text pooled.

    A ``comparison`` holds runs of the three other kinds.
    """

    kind: Literal["together", "alone", "pooled", "comparison"]
    trainers: tuple[str, ...]


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run goes."""
    return Path(recipe.records.folder.replace("{name}", recipe.name))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; a killed process lets go of it.

    Raises:
        RunFolderError: Another process holds it.
    """
    lock = FileLock(folder / "lock", timeout=0)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise RunFolderError(f"{folder}: another potluck is at work in it", "wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def create_run(folder: Path, recipe: Recipe, variant: Variant) -> None:
    """Make a folder, held by ``locked``, the home of a run.

    Raises:
        RunFolderError: It is the home of another that has begun.
    """
    if (folder / "run.json").exists() and any(folder.rglob("events.jsonl")):
        raise RunFolderError(
            f"{folder}: there is a run here already",
            f"`potluck resume {folder}` goes on with it; another name or records.folder starts a new one",
        )
    write_text(folder / "recipe.toml", recipe_toml(recipe))
    write_text(folder / "run.json", json.dumps({"format": FORMAT, **asdict(variant)}))  # last: now it is a run


def open_run(folder: Path) -> tuple[Recipe, Variant]:
    """The recipe and kind of the run in a folder.

    Raises:
        RunFolderError: It is not a run folder.
    """
    try:
        facts: Any = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        variant = Variant(facts["kind"], tuple(facts["trainers"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder}: not a run folder", "name the folder that `potluck train` wrote") from None
    return load_recipe(folder / "recipe.toml"), variant
