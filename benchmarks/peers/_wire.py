"""What the ``wire_*`` scripts share: the command line, processes and their memory, and the report."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


@dataclass(kw_only=True)
class Report:
    """What a peer prints.

    Attributes:
        ping_ms: Round trips of a tiny message, in order.
        transfer_seconds: The payload there and back, for each transfer.
        down_seconds: Of that from coordinator to participant; ``None`` if it cannot be told.
        peak_rss_mb: For each role, the most that its processes held at one time: the sum of their own peaks.
        problem: Why this could not be measured; empty if it could.
    """

    peer: str
    version: str = ""
    ping_ms: list[float] = field(default_factory=list)
    transfer_seconds: list[float] = field(default_factory=list)
    down_seconds: list[float] | None = None
    up_seconds: list[float] | None = None
    peak_rss_mb: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("coordinator", "participant", "server"))
    )
    problem: str = ""

    def take(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            setattr(self, name, value)


class Processes:
    """What a peer starts, with all that these start in turn: none is left once it is closed.

    Args:
        folder: For logs, one for each process that is started here.

    Attributes:
        roles: Of a process whose command line holds the key; the first match counts, and without one nothing does.
        peak: The most memory of each role's processes at one time, in MB.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.roles, self.peak = folder, dict[str, str](), dict[str, float]()
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self._libc = ctypes.CDLL(None)
        self._libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: self._libc.prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
            )

    def until(self, found: Callable[[], Any], every: float = 0.05) -> Any:
        """Ask every so many seconds until the answer is not empty, or one of the processes has failed."""
        while not (answer := found()):
            if failed := [name for name, process in self.started.items() if process.poll()]:
                log = (self.folder / f"{failed[0]}.log").read_text(errors="replace").strip()
                raise RuntimeError(f"{failed[0]} failed: {log[-300:]}")
            time.sleep(every)
        return answer

    def _watch(self) -> None:
        while True:
            now = dict[str, float]()
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError, IndexError, StopIteration):
                    command, status = " ".join(process.cmdline()), Path(f"/proc/{process.pid}/status").read_text()
                    role = next(role for key, role in self.roles.items() if key in command)
                    now[role] = now.get(role, 0) + int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
            self.peak = self.peak | {role: max(size, self.peak.get(role, 0)) for role, size in now.items()}
            time.sleep(0.1)

    def close(self) -> None:
        for _ in range(5):  # one that dies may have started another
            children = psutil.Process().children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            psutil.wait_procs(children, timeout=2)  # on which those of theirs come to us


def measure(peer: str, package: str, work: Callable[[argparse.Namespace, Processes, Report], None]) -> None:
    """Read the command line, let ``work`` fill the report, print it as JSON, and leave with 0 whatever happened."""
    parser = argparse.ArgumentParser(description="Move data there and back, and print what it took as JSON.")
    for name, default in {"megabytes": 1000, "pings": 20, "transfers": 1, "timeout": 300, "pullers": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; only a problem leaves anything there")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = Path(tempfile.mkdtemp(prefix=f"{peer}-", dir=options.folder.absolute()))
    report, processes, leaving = Report(peer=peer), Processes(options.folder), threading.Lock()

    def leave(problem: str) -> None:
        if not leaving.acquire(blocking=False):
            return
        processes.close()
        report.peak_rss_mb |= {role: round(size, 1) for role, size in processes.peak.items()}
        report.problem = problem
        if not problem:
            shutil.rmtree(options.folder, ignore_errors=True)
        print(json.dumps(asdict(report)), flush=True)
        os._exit(0)

    threading.Timer(options.timeout, leave, [f"not done after {options.timeout} seconds"]).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave("ended from outside"))
    try:
        report.version = version(package)
        work(options, processes, report)
        leave("")
    except Exception as error:
        leave(f"{type(error).__name__}: {error}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_json(path: Path) -> Any:
    """What the file holds, once it is there."""
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)
