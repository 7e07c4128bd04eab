"""One run left undisturbed and one that was killed, made once and copied."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Process, Tables

ROUNDS = 8


@dataclass(frozen=True)
class Kept:
    """Runs of one recipe; copy before use.

    Attributes:
        halfway: Killed between rounds 3 and 8.
        final: The hash of the undisturbed run's weights.
    """

    recipe: Path
    undisturbed: Path
    halfway: Path
    final: str


@pytest.fixture(scope="session")
def verbs(tmp_path_factory: pytest.TempPathFactory, potluck_in: Callable[[Path], Potluck]) -> Iterator[Potluck]:
    found = potluck_in(tmp_path_factory.mktemp("kept"))
    yield found
    found.end()


@pytest.fixture(scope="session")
def eventful(tables: Tables) -> Tables:
    """A recipe in which everything that a checkpoint holds matters."""
    return {
        **tables,
        "rounds": {"count": ROUNDS, "local_steps": 2, "participants_per_round": 2},
        "outer": {"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
        "records": {"keep_last": 3},
    }


@pytest.fixture(scope="session")
def kept(verbs: Potluck, eventful: Tables, events: Callable[..., Events]) -> Kept:
    recipe = verbs.recipe(eventful)
    undisturbed, halfway = (recipe.with_name(name) for name in ("undisturbed", "halfway"))
    verbs("train", recipe, "--set", f"records.folder={undisturbed}")
    process = verbs.start("train", recipe, "--set", f"records.folder={halfway}")
    reached(process, halfway / "checkpoints" / "round-000003")
    process.signal(signal.SIGKILL)
    process.wait()
    final = events(undisturbed, "run_finished")[0]["state_hash"]
    return Kept(recipe, undisturbed, halfway, final)


def reached(process: Process, path: Path, seconds: float = 60.0) -> None:
    """Wait until a process has made a file or folder."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until and not process.ends_within(0), process.err.read_text()
        time.sleep(0.002)


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    return reached


@pytest.fixture
def halfway(kept: Kept, tmp_path: Path) -> Path:
    """A run folder whose process was killed after the checkpoint of round 3."""
    return Path(shutil.copytree(kept.halfway, tmp_path / "run"))


@pytest.fixture
def done(kept: Kept, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    return Path(shutil.copytree(kept.undisturbed, tmp_path / "run"))


@pytest.fixture(scope="session")
def story(events: Callable[..., Events]) -> Callable[[Path], Any]:
    """A run's events but for being resumed and for bytes: a resumed run sends the shared state once more."""
    bytes_sent = ("down_bytes", "up_bytes", "transfers")

    def read(folder: Path) -> Any:
        return [
            {key: value for key, value in event.items() if key not in bytes_sent}
            for event in events(folder)
            if event["event"] not in ("run_resumed", "run_interrupted")
        ]

    return read
