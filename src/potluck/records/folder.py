"""A run's folder: what it is called, who may write in it, what it holds.

::

    recipe.toml      the resolved recipe              events.jsonl   the truth of the run
    run.json         what kind of run, its recipe     checkpoints/   round-000012/ ...
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
from potluck.files import nearby, storing, write_text
from potluck.recipe import Recipe, load_recipe, recipe_toml
from potluck.recipe.load import changed_keys, parse_recipe
from potluck.records.events import read_events
from potluck.untrusted import load_json

FORMAT = 1
_SHOWN = 8  # keys in a message ...
_FEW = 5  # ... and runs
POOLED = "pooled"
HOST, LOCAL = "host", "local"  # folders of a hosted run: the coordinator's, and everybody's on this machine
_NOT_ONE = "name the folder that `potluck train`, `host` or `local` wrote; it is there some seconds after they began"


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
    lock = FileLock(folder / "lock", timeout=0.5)  # `in_use` may hold it for an instant
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


def by_local(folder: Path) -> bool:
    """Whether `potluck local` began the run in a folder."""
    return (folder / LOCAL).is_dir()


def how_to_go_on(folder: Path) -> str:
    """The command that goes on with the run in a folder."""
    if by_local(folder):
        return "potluck local with the same recipe"
    if (folder / HOST).is_dir():
        return "potluck host with the same recipe (participants: the same potluck join)"
    return f"potluck resume {folder}"


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder now; this one holds it for an instant to find out."""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that nobody can write to
        return False


def create_run(folder: Path, recipe: Recipe, variant: Variant) -> None:
    """Make a folder, held by ``locked``, the home of a run.

    Raises:
        RunFolderError: It is the home of another that has begun.
    """
    if (folder / "run.json").exists() and any(folder.rglob("events.jsonl")):
        raise RunFolderError(
            f"{folder}: there is a run here already",
            f"{how_to_go_on(folder)} goes on with it; another name or records.folder starts a new one",
        )
    write_text(folder / "recipe.toml", recipe_toml(recipe))
    facts = {"format": FORMAT, **asdict(variant), "recipe": recipe.model_dump(mode="json", exclude_none=True)}
    write_text(folder / "run.json", json.dumps(facts))  # last: now it is a run


def runs_in(folder: Path) -> list[Path]:
    """The runs directly below a folder."""
    return sorted(path.parent for path in folder.glob("*/run.json"))


def check_run(folder: Path) -> None:
    """See whether a folder is that of a run.

    Raises:
        RunFolderError: It is not there, is another, or holds runs.
    """
    if (folder / "run.json").exists():
        return
    if not folder.exists():
        raise RunFolderError(f"{folder}: there is no such folder", nearby(folder) or _NOT_ONE)
    if runs := runs_in(folder):
        more = f" and {len(runs) - _FEW} more" if len(runs) > _FEW else ""
        names = ", ".join(str(run) for run in runs[:_FEW])
        raise RunFolderError(f"{folder}: not a run, it holds runs: {names}{more}", "name one of them")
    raise RunFolderError(f"{folder}: not a run folder", _NOT_ONE)


def open_run(folder: Path) -> tuple[Recipe, Variant]:
    """The recipe and kind of the run in a folder.

    Raises:
        RunFolderError: It is not a run folder, or its recipe is not the one that the run began with.
    """
    check_run(folder)
    try:
        facts: Any = load_json(folder / "run.json")
        variant = Variant(facts["kind"], tuple(facts["trainers"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder}: not a run folder", _NOT_ONE) from None
    recipe = load_recipe(folder / "recipe.toml")
    if "recipe" in facts:  # version 0.1 did not keep it
        check_same_recipe(parse_recipe(facts["recipe"], f"{folder}/run.json"), recipe, folder)
    return recipe, variant


def finished(folder: Path) -> bool:
    """Whether the run in a folder is done."""
    path = folder / "events.jsonl"
    return path.exists() and any(event["event"] == "run_finished" for event in read_events(path))


def check_goes_on(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with the run in a folder by another recipe, or if it is done.

    Raises:
        RunFolderError: It is another's, or done.
    """
    check_same_recipe(open_run(folder)[0], recipe, folder)
    if finished(folder):
        raise RunFolderError(
            f"{folder}: this run is finished",
            "--set name=NEW starts a new one, as another records.folder does; to do it again, delete its folder",
        )


def check_same_recipe(was: Recipe, now: Recipe, folder: Path) -> None:
    """Refuse a recipe that gives other numbers than the one that a run began with.

    Raises:
        RunFolderError: naming the keys that have changed.
    """
    if changed := changed_keys(was, now):
        raise RunFolderError(
            f"{folder}: the run here began with another recipe: {', '.join(changed[:_SHOWN])}"
            + (f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""),
            "put back what was changed; a changed recipe is another run, with another name or records.folder",
        )
