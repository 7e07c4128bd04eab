"""Tiny recipes, and verbs in processes of their own that can be watched, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks._golden_cases import TEXTS
from benchmarks.golden import write_texts

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: threads do not survive a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # nor does a pool that loads a model in threads

FIRST = ("docs/", "benchmarks/test_form.py", "machines/test_networks.py", "machines/test_local.py", "machines/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process has one of them left when the others are done."""

    def place(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(FIRST) if f"tests/{name}" in item.nodeid), len(FIRST))

    items.sort(key=place)


NAMES = tuple(TEXTS)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of short documents for each of three participants, each with words of its own."""
    root = tmp_path_factory.mktemp("texts")
    write_texts(root)
    return root


Tables = dict[str, Any]


@pytest.fixture(scope="session")
def tables(texts: Path) -> Tables:
    """The content of a recipe whose run takes about a second; not to be changed."""
    return {
        "version": 1,
        "name": "tiny",
        "data": {"shards": str(texts.parent / "shards"), "validation_fraction": 0.2, "validation_bytes": 1000},
        "tokenizer": {"kind": "bytes"},
        "model": {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64},
        "local": {"batch_size": 2, "sequence_length": 16},
        "rounds": {"count": 3, "local_steps": 2},
        "participants": [{"name": name, "source": {"path": str(texts / name)}} for name in NAMES],
    }


@pytest.fixture
def recipe_file(tmp_path: Path, tables: Tables) -> Path:
    """That recipe as a file."""
    import tomli_w

    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@dataclass(frozen=True)
class Outcome:
    """How a verb ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """What ``--json`` printed."""
        return json.loads(self.out)


class Process:
    """A verb under way in a child of this process: forked, so that torch is loaded once for all tests."""

    def __init__(self, words: tuple[str, ...], folder: Path, before: Callable[[], object]) -> None:
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        self.out.touch()
        self.err.touch()
        self._ended: Outcome | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._perform(words, before)

    def _perform(self, words: tuple[str, ...], before: Callable[[], object]) -> NoReturn:
        code = 1
        try:
            for descriptor, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["potluck", *words]
            before()
            from potluck.cli import main

            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number: int) -> None:
        if self._ended is None:
            os.kill(self.pid, number)

    def wait(self, at_most: float = 120.0) -> Outcome:
        """Wait for its end; a process that takes too long is killed."""
        if not self.ends_within(at_most):
            self.signal(signal.SIGKILL)
            self.ends_within(10)
            pytest.fail(f"no end after {at_most} s\n{self.err.read_text()}")
        assert self._ended is not None
        return self._ended

    def ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._ended = Outcome(code, self.out.read_text(), self.err.read_text() if self.err.exists() else "")
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(0.005)
        return True


class Potluck:
    """``potluck("train", recipe, code=0)``: a verb in a process of its own, in the test's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Process] = []

    def __call__(self, *words: object, code: int = 0, before: Callable[[], object] = lambda: None) -> Outcome:
        """Run a verb to its end, which must be the exit code ``code``."""
        ended = self.start(*words, before=before).wait()
        assert ended.code == code, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
        assert "Traceback" not in ended.err
        return ended

    def start(self, *words: object, before: Callable[[], object] = lambda: None) -> Process:
        """Start a verb; ``before`` is called in its process first."""
        self._started.append(Process(tuple(map(str, words)), self._folder / "said", before))
        return self._started[-1]

    def recipe(self, tables: Tables, **changes: Any) -> Path:
        """A recipe as a file of this test's own."""
        import tomli_w

        path = self._folder / f"recipe-{len(list(self._folder.glob('recipe-*')))}.toml"
        path.write_text(tomli_w.dumps({**tables, **changes}))
        return path

    def end(self) -> None:
        """End what still runs; a host asked twice ends its server with it."""
        for process in self._started:
            for number, seconds in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
                if not process.ends_within(0):
                    process.signal(number)
                    process.ends_within(seconds)


@pytest.fixture(scope="session")
def potluck_in() -> Callable[[Path], Potluck]:
    """Verbs that write what they say below a folder."""
    import typer.completion  # noqa: F401 - what is loaded and drawn here once is there in every child
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import potluck.commands
    import potluck.hosting
    import potluck.joining
    import potluck.looking  # noqa: F401
    from potluck.records.charts import Line, Panel, draw_svg

    lines = [Line(label=name, points=[(0, 1.0), (1e6, 2.0)]) for name in NAMES]
    for legend in ("outside right upper", "outside upper left"):
        draw_svg([Panel(title="%", lines=lines)], 1, "tokens", "bits per byte", (4.0, 3.0), legend)
    get_checkpoint_conversion_mapping("llama")  # of which all are made

    return Potluck


@pytest.fixture
def potluck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potluck_in: Callable[[Path], Potluck]
) -> Iterator[Potluck]:
    """Verbs, started in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    verbs = potluck_in(tmp_path)
    yield verbs
    verbs.end()


Events = list[dict[str, Any]]


@pytest.fixture(scope="session")
def events() -> Callable[..., Events]:
    """A run folder's events, of one kind if wanted, without what differs between two runs of one recipe."""

    def read(folder: Path, kind: str | None = None) -> Events:
        from potluck.records.events import read_events, without_timing

        path = folder / "events.jsonl"
        found = [without_timing(event) for event in read_events(path)] if path.exists() else []
        return [event for event in found if kind is None or event["event"] == kind]

    return read


@pytest.fixture(scope="session")
def final_hash(events: Callable[..., Events]) -> Callable[[Path], str]:
    """The hash of a finished run's weights, as the log and the last checkpoint say it."""

    def read(folder: Path) -> str:
        from potluck.models.flat import state_hash
        from potluck.records.checkpoint import load_checkpoint

        (said,) = [event["state_hash"] for event in events(folder, "run_finished")]
        assert state_hash(load_checkpoint(folder / "checkpoints").parts["shared"]["theta"]) == said
        return str(said)

    return read
