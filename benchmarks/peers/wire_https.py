"""The limit: a payload by plain HTTPS on loopback, from disk to disk, with SHA-256 taken at both ends.

The coordinator is the server. The participant asks for a task, which may take long to come, streams the payload to a
file and streams that file back. Both ends hash what they send and what they get, and all four digests must be the
same. Nobody waits for the disk: files may stay in the page cache.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Processes, Report, free_port, listens, measure, read_json, write_json

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


if __name__ == "__main__":
    measure("https", "aiohttp", work)
