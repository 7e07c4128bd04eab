"""Ctrl-C and SIGTERM: once finishes the round, twice stops at once; either way the run can go on."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from potluck.records.checkpoint import list_checkpoints
from potluck.stopping import Stopping

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Process
    from tests.runs.conftest import Kept


def until_it_says(process: Process, words: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while words not in (process.err.read_text() if process.err.exists() else ""):
        assert time.monotonic() < until and not process.ends_within(0), process.err.read_text()
        time.sleep(0.002)


@pytest.fixture
def begun(potluck: Potluck, kept: Kept, tmp_path: Path, wait_for: Callable[..., None]) -> Process:
    """A run under way in ``tmp_path / "run"``."""
    process = potluck.start("train", kept.recipe, "--set", "records.folder=run", "--set", "records.checkpoint_every=3")
    wait_for(process, tmp_path / "run" / "checkpoints" / "round-000003")
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_finishes_the_round(
    potluck: Potluck, kept: Kept, begun: Process, tmp_path: Path, events: Callable[..., Events],
    final_hash: Callable[[Path], str], number: signal.Signals,
) -> None:  # fmt: skip
    begun.signal(number)
    ended = begun.wait()
    assert ended.code == 130
    assert "stopping after this round" in ended.err and "potluck resume run" in ended.err
    assert "Traceback" not in ended.err
    last = events(tmp_path / "run")[-2:]
    assert [event["event"] for event in last] == ["run_interrupted", "checkpoint"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1] == last[0]["round"]
    potluck("resume", "run")
    assert final_hash(tmp_path / "run") == kept.final


def test_twice_stops_at_once(
    potluck: Potluck, kept: Kept, tmp_path: Path, events: Callable[..., Events], wait_for: Callable[..., None]
) -> None:
    long = ("--set", "rounds.count=1", "--set", "rounds.local_steps=150")
    process = potluck.start("train", kept.recipe, *long, "--set", "records.folder=run")
    wait_for(process, tmp_path / "run" / "checkpoints" / "round-000000")
    process.signal(signal.SIGINT)
    until_it_says(process, "stopping after this round")
    process.signal(signal.SIGINT)
    ended = process.wait(10)
    assert ended.code == 130
    assert "potluck resume run" in ended.err
    assert "Traceback" not in ended.err
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [0]
    potluck("resume", "run", "--json")
    potluck("train", kept.recipe, *long, "--set", "records.folder=other")
    assert events(tmp_path / "run", "run_finished") == events(tmp_path / "other", "run_finished")


def test_before_the_first_round_it_can_be_stopped_too(potluck: Potluck, kept: Kept, tmp_path: Path) -> None:
    def slow_texts() -> None:
        import time as clock

        from potluck import run

        run.build_corpus = lambda *_: clock.sleep(60)

    process = potluck.start("train", kept.recipe, "--set", "records.folder=run", before=slow_texts)
    while not (tmp_path / "run" / "run.json").exists():
        time.sleep(0.002)
    time.sleep(0.2)
    process.signal(signal.SIGINT)
    until_it_says(process, "stopping after this round")
    process.signal(signal.SIGINT)
    ended = process.wait(10)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert "potluck resume run" in ended.err
    potluck("resume", "run")


def test_a_thread_that_dies_ends_what_the_main_thread_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda death: None)  # pytest would tell of it

    def die() -> None:
        raise LookupError("a defect")

    def wait() -> None:
        with Stopping():
            threading.Thread(target=die).start()
            queue.Queue[None]().get(timeout=20)

    with pytest.raises(RuntimeError, match="a thread of this process failed") as caught:
        wait()
    assert isinstance(caught.value.__cause__, LookupError)
