"""`potluck local`: host and participants as processes of their own on one machine, as if they were elsewhere.

::

    RUN/local/NAME.toml   a participant's part       RUN/local/NAME.log   what `potluck join` said
    RUN/local/NAME/       its state, `join.log`, `sent.jsonl`

The verbs are those of real machines. Only this process hears Ctrl-C: the coordinator is told, finishes its round, and
then the participants leave. If this process is killed, the kernel ends the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import tomli_w

from potluck.engine.nats.host_keys import WATCHER
from potluck.engine.nats.identity import load_invite
from potluck.engine.nats.server import running_in
from potluck.errors import RecipeError
from potluck.files import private_folder, storing, write_text
from potluck.recipe import Recipe, load_recipe
from potluck.recipe.load import without_sources
from potluck.recipe.part import Policy
from potluck.recipe.schema import Bpe, ModelFolder
from potluck.recipe.sources import Participant
from potluck.records.folder import LOCAL, check_goes_on, run_folder

HERE = "127.0.0.1"
LOOK_SECONDS = 0.1
LEAVE_SECONDS = 30.0  # a participant finishes its task
_PR_SET_PDEATHSIG = 1
_VERB = (sys.executable, "-c", "from potluck.cli import main; main()")


def local(recipe_path: Path, settings: Sequence[str], say: Callable[[str], None]) -> tuple[dict[str, Any], int]:
    """Run a recipe to its end with a process for the coordinator and one for each participant.

    Returns:
        What `potluck host --json` printed, and where the logs are; and the exit code: the coordinator's, or that of a
        participant without which the run cannot begin. An error has been said.

    Raises:
        RecipeError: The recipe is wrong, or a participant has no source.
        RunFolderError: The run in the folder is another's, or finished.
    """
    recipe = load_recipe(recipe_path, [*settings, "engine={kind='nats'}"])
    folder = run_folder(recipe)
    home = folder / LOCAL
    parts = {person.name: _part(recipe, person) for person in recipe.participants}
    if (folder / "run.json").exists():
        check_goes_on(folder, without_sources(recipe))
    for place in (home, *(home / name for name in parts)):
        private_folder(place)
    logs = {name: home / f"{name}.log" for name in parts}
    say(f"coordinator: {folder / 'host' / 'host.log'}")
    for name, log in logs.items():
        say(f"{name}: {log}; what it sends: {home / name / 'sent.jsonl'}")
    say(f"look from another terminal: potluck status {folder} --watch")
    port = _port(folder)
    words = [item for setting in settings for item in ("--set", setting)]
    processes = _Processes()
    with processes:
        host = processes.start(
            "coordinator", ["host", str(recipe_path), *words, "--listen", f"{HERE}:{port}", "--json"], home / "host.out"
        )
        _wait_for_server(host, port)
        for name, part in parts.items() if host.poll() is None else ():
            write_text(home / f"{name}.toml", tomli_w.dumps(part))
            ticket = ("--invite", str(folder / "host" / "invites" / f"{name}.toml"), "--folder", str(home / name))
            processes.start(name, ["join", *ticket, "--part", str(home / f"{name}.toml"), "--json"], None, logs[name])
        failed = _watch(processes, host, folder, logs, say)
    if (server := running_in(folder / "host" / "server")) is not None:  # the coordinator was killed
        os.kill(server, signal.SIGTERM)
    where = {"coordinator": str(folder / "host" / "host.log"), **{name: str(log) for name, log in logs.items()}}
    if failed is not None:
        why, name, code = failed
        return {"error": why, "hint": f"see {logs[name]}", "exit_code": code, "logs": where}, code
    code = host.returncode if host.returncode >= 0 else 128 - host.returncode
    return {**_said(home / "host.out"), "logs": where}, code


class _Processes:
    """Processes that end with this one, whatever happens; signals go to the coordinator alone."""

    def __init__(self) -> None:
        self.of: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, words: list[str], out: Path | None, err: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a verb; what it says goes to files, or, without ``err``, to where this process says it."""
        with storing(out or err or name):
            output = out.open("wb") if out is not None else None
            errors = err.open("ab") if err is not None else None
            self.of[name] = subprocess.Popen(
                [*_VERB, *words],
                stdin=subprocess.DEVNULL,
                stdout=output or errors,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        for file in (output, errors):
            if file is not None:
                file.close()
        return self.of[name]

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        self.end(LEAVE_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self, patience: float) -> None:
        """Let everybody who is still there leave, the coordinator last; then kill."""
        for process in reversed(self.of.values()):
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + patience
        for process in self.of.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        host, *others = self.of.values() or (None,)
        if host is not None and host.poll() is None:
            host.send_signal(signal.SIGINT)
            return
        for process in others:  # they are leaving; somebody is in a hurry
            process.kill()


def _watch(
    processes: _Processes,
    host: subprocess.Popen[bytes],
    folder: Path,
    logs: Mapping[str, Path],
    say: Callable[[str], None],
) -> tuple[str, str, int] | None:
    """Until the coordinator ends.

    Returns:
        If a participant fails before the run has begun: what is wrong, whose it is, its exit code. Else ``None``.
    """
    told: set[str] = set()
    while host.poll() is None:
        time.sleep(LOOK_SECONDS)
        for name in logs.keys() - told:
            code = processes.of[name].poll()
            if not code or host.poll() is not None:
                continue
            told.add(name)
            why = f"{name} left with exit code {code}: {_error(logs[name])}"
            say(why)
            if not (folder / "events.jsonl").exists():
                return why, name, code
    until = time.monotonic() + LEAVE_SECONDS
    if not host.returncode:  # they have been told that the run is over
        for name in logs:
            with suppress(subprocess.TimeoutExpired):
                processes.of[name].wait(max(0.0, until - time.monotonic()))
    return None


def _part(recipe: Recipe, person: Participant) -> dict[str, Any]:
    """A participant's own part: what the recipe names for it, and whatever this run asks is allowed."""
    if person.source is None:
        raise RecipeError(f"participants: {person.name!r} has no source; on one machine the recipe names each one's")
    threads = recipe.compute.threads or max(1, (os.cpu_count() or 1) // len(recipe.participants))
    kinds = list(Policy().kinds)
    part: dict[str, Any] = {
        "source": person.source.model_dump(mode="json", exclude_none=True),
        "device": recipe.compute.device,
        "threads": threads,
        "policy": {"kinds": kinds},
    }
    if isinstance(recipe.tokenizer, Bpe):
        kinds.append("words")
    if isinstance(recipe.model, ModelFolder):
        part["model"] = recipe.model.path
    if recipe.editing is not None:
        kinds += ["claims", "moments", "edit"]
        mine = {"edits": person.edits, "edit_secret": recipe.editing.secret}
        part |= {key: value for key, value in mine.items() if value is not None}
    return part


def _port(folder: Path) -> int:
    """That of the run's invites, if it has begun: its server may still be there; else a free one."""
    path = folder / "host" / "invites" / f"{WATCHER}.toml"
    if path.exists():
        return urlsplit(load_invite(path).urls[0]).port or 0
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        return int(probe.getsockname()[1])


def _wait_for_server(host: subprocess.Popen[bytes], port: int) -> None:
    """Until it listens, or the coordinator has ended."""
    while host.poll() is None:
        with suppress(OSError), socket.create_connection((HERE, port), 1.0):
            return
        time.sleep(LOOK_SECONDS)


def _said(path: Path) -> dict[str, Any]:
    """The JSON that a verb printed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _error(log: Path) -> str:
    """The error at the end of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith("error:")]
    return (found or lines or ["it said nothing"])[-1].removeprefix("error: ")


def _die_with_parent() -> None:
    """In a child before it begins: be sent SIGTERM when the parent dies. Linux only, and elsewhere of no effect."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
