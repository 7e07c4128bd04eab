"""The limit: a payload by plain HTTPS on loopback, from disk to disk, with SHA-256 taken at both ends.

The coordinator is the server. The participant asks for a task, which may take long to come, streams the payload to a
file and streams that file back. Both ends hash what they send and what they get, and all four digests must be the
same. Nobody waits for the disk: files may stay in the page cache.

The second half is what all ``wire_*`` peers share: the command line, processes and their memory, and the report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

CHUNK = 1 << 20
PATIENCE = 25  # seconds that a question for a task is held
TENSORS = 16


def work(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random, size = np.random.default_rng(0), options.megabytes * 1_000_000 // 4 // TENSORS
    save_file({f"w{i}": random.random(size, np.float32) for i in range(TENSORS)}, options.folder / "payload")
    certify = "openssl req -x509 -nodes -days 1 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=localhost"
    files = "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    subprocess.run(f"{certify} {files}".split(), cwd=options.folder, check=True, capture_output=True)
    processes.roles = {"wire.coordinate": "coordinator", "wire.participate": "participant"}
    port = free_port()
    settings = {"folder": str(options.folder), "port": port}
    sizes = {"pings": options.pings, "transfers": options.transfers}
    processes.start("coordinator", _end("coordinate", settings | sizes))
    processes.until(lambda: listens(port))
    processes.start("participant", _end("participate", settings))
    report.take(processes.until(lambda: read_json(options.folder / "result.json")))


def _end(name: str, settings: dict[str, Any]) -> list[str]:
    """The command of one of the two processes."""
    call = f"asyncio.run(wire.{name}(**json.loads(sys.argv[1])))"
    return [
        sys.executable,
        "-c",
        f"import asyncio, json, sys; from benchmarks.peers import wire_https as wire; {call}",
        json.dumps(settings),
    ]


async def coordinate(folder: str, port: int, pings: int, transfers: int) -> None:
    """Serve, hand out tasks one by one, and write what they took."""
    from aiohttp import web

    place, tasks, results, digests = Path(folder), asyncio.Queue[str](), asyncio.Queue[dict[str, Any]](), set[str]()

    async def task(_: web.Request) -> web.Response:
        try:
            return web.json_response(await asyncio.wait_for(tasks.get(), PATIENCE))
        except TimeoutError:
            return web.json_response(None)

    async def result(request: web.Request) -> web.Response:
        await results.put(await request.json())
        return web.json_response(None)

    async def send(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = (place / "payload").stat().st_size
        await response.prepare(request)
        async for chunk in read(place / "payload", digests):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def receive(request: web.Request) -> web.Response:
        await write(place / "back", request.content, digests)
        return web.json_response(None)

    app = web.Application()
    app.add_routes([web.get("/task", task), web.post("/result", result)])
    app.add_routes([web.get("/payload", send), web.put("/payload", receive)])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(place / "cert.pem", place / "key.pem")
    runner = web.AppRunner(app, access_log=None, read_bufsize=CHUNK)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    found: dict[str, list[float]] = {"ping_ms": [], "transfer_seconds": [], "down_seconds": [], "up_seconds": []}
    for name in ["hello"] + ["ping"] * pings + ["transfer"] * transfers:
        begin = time.perf_counter()
        await tasks.put(name)
        its = await results.get()
        seconds = time.perf_counter() - begin
        if name != "transfer":
            found["ping_ms"] += [1000 * seconds] if name == "ping" else []
            continue
        if len(digests | set(its["digests"])) != 1:
            raise ValueError("the digests differ")
        for part, value in {"transfer": seconds, "down": its["down"], "up": its["up"]}.items():
            found[f"{part}_seconds"].append(value)
    write_json(place / "result.json", found)


async def participate(folder: str, port: int) -> None:
    """Dial in, ask for tasks and perform them."""
    import aiohttp

    place = Path(folder)
    tls = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=place / "cert.pem"), family=socket.AF_INET)
    endless = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        f"https://localhost:{port}", connector=tls, timeout=endless, read_bufsize=CHUNK
    ) as session:
        while True:
            async with session.get("/task") as answer:
                task = await answer.json()
            result: dict[str, Any] = {}
            if task == "transfer":
                digests, begin = set[str](), time.perf_counter()
                async with session.get("/payload") as answer:
                    await write(place / "there", answer.content, digests)
                middle = time.perf_counter()
                async with session.put("/payload", data=read(place / "there", digests)) as answer:
                    await answer.json()
                result = {"down": middle - begin, "up": time.perf_counter() - middle, "digests": list(digests)}
            if task:
                await session.post("/result", json=result)


async def read(path: Path, digests: set[str]) -> AsyncIterator[bytes]:
    """A file's chunks; its digest joins the others at the end."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            yield chunk
    digests.add(sha.hexdigest())


async def write(path: Path, content: Any, digests: set[str]) -> None:
    """What arrives, to a file; its digest joins the others."""
    sha = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in content.iter_chunked(CHUNK):
            sha.update(chunk)
            file.write(chunk)
    digests.add(sha.hexdigest())


# --- what the peers share ------------------------------------------------------------------------


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
    for name, default in {"megabytes": 1000, "pings": 20, "transfers": 1, "timeout": 300}.items():
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


if __name__ == "__main__":
    measure("https", "aiohttp", work)
