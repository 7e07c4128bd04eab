"""Two machines on one, with a slow, long link between them.

Where the kernel has network namespaces these are two, joined by a cable that `tc tbf` holds to 20 Mbit/s each way;
`tc netem` delays it, or where the kernel lacks that (as ours does), the proxy of `tests.machines.shaping`, on the
coordinator's machine. Without namespaces both are loopback, and the proxy does everything.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Potluck, Process, Tables

ROOT = Path(__file__).parents[2]
MBIT, LATENCY_MS = 20, 50
HERE, THERE = "10.213.0.1", "10.213.0.2"
PORT = 4222


class Network:
    """Two machines and the link between them.

    Args:
        potluck: Starts verbs; they and everything they leave end with the network.
        port: Of the server on the coordinator's machine.
        advertised: How participants on the other reach it.
        rate, latency: What the proxy sees to, in Mbit/s and ms.
    """

    def __init__(
        self, potluck: Potluck, folder: Path, port: int, advertised: str, rate: float, latency: float, *where: str
    ) -> None:
        self.potluck, self.folder, self.port, self.advertised = potluck, folder, port, advertised
        ends = ("--listen", advertised, "--to", f"127.0.0.1:{port}")
        shape = ("--mbit", str(rate), "--latency-ms", str(latency))
        self.proxy = subprocess.Popen(
            [*where, sys.executable, "-m", "tests.machines.shaping", *ends, *shape],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.proxy.stdout is not None and self.proxy.stdout.readline() == "ready\n"

    def here(self) -> None:
        """Put this process on the coordinator's machine."""

    def there(self) -> None:
        """Put this process on the participants' machine."""

    def cut(self) -> None:
        """Cut the link."""
        self.proxy.send_signal(signal.SIGUSR1)

    def mend(self) -> None:
        """Put it together again."""
        self.proxy.send_signal(signal.SIGUSR1)

    def carried(self) -> tuple[int, int]:
        """Take the link away; the bytes that went to the coordinator, and those that came from it."""
        self.proxy.terminate()
        said = json.loads(self.proxy.communicate(timeout=10)[0].splitlines()[-1])
        return said["up_bytes"], said["down_bytes"]

    def host(self, recipe: Path, run: Path, *words: object) -> Process:
        """A coordinator and its server; when this returns, participants are invited."""
        where = ("--listen", f"0.0.0.0:{self.port}", "--advertise", self.advertised)
        folder = ("--set", f"records.folder={run}")
        host = self.potluck.start("host", recipe, *where, *folder, *words, "--json", before=self.here)
        self.until(lambda: (run / "host" / "run.json").exists(), host)
        return host

    def join(self, run: Path, name: str, data: Path, before: Callable[[], object] = lambda: None) -> Process:
        """A participant that was invited; ``before`` is called in its process."""
        words = ("--invite", run / "host" / "invites" / f"{name}.toml", "--data", data)
        state = ("--folder", self.folder / f"at-{name}")
        return self.potluck.start("join", *words, *state, "--json", before=lambda: (self.there(), before()))

    def until(self, happened: Callable[[], bool], process: Process, seconds: float = 60.0) -> None:
        """Wait for something that a process does."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end and not process.ends_within(0), process.err.read_text()
            time.sleep(0.01)

    def end(self) -> None:
        """Kill the proxy, all verbs, and message servers that have outlived their coordinator."""
        self.potluck.end()
        self.proxy.kill()
        self.proxy.communicate(timeout=10)
        for path in self.folder.rglob("server.pid"):
            with suppress(OSError, ValueError):
                pid = int(path.read_text())
                if str(path.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


class Namespaces(Network):
    """Each machine is a network namespace; to cut the link is to pull the plug at the participants' end."""

    def __init__(self, potluck: Potluck, folder: Path, names: list[str], latency: float) -> None:
        self._here, self._there = names
        where = ("ip", "netns", "exec", self._here)
        super().__init__(potluck, folder, PORT, f"{HERE}:{PORT + 1}", 0, latency, *where)

    def here(self) -> None:
        enter(self._here)

    def there(self) -> None:
        enter(self._there)

    def cut(self) -> None:
        tool("ip", "-n", self._there, "link", "set", "cable", "down")

    def mend(self) -> None:
        tool("ip", "-n", self._there, "link", "set", "cable", "up")


def tool(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def enter(namespace: str) -> None:
    """What `ip netns exec` does, in this process."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(descriptor)


def delayed(namespace: str) -> bool:
    """Let the kernel delay what leaves a namespace, if it can."""
    words = ("dev", "cable", "parent", "1:", "handle", "2:", "netem", "delay", f"{LATENCY_MS}ms", "limit", "10000")
    try:
        tool("tc", "-n", namespace, "qdisc", "add", *words)
    except subprocess.CalledProcessError:
        return False
    return True


@contextmanager
def cabled() -> Iterator[tuple[list[str], float]]:
    """Two namespaces with a cable of 20 Mbit/s between them; the milliseconds that are left to the proxy."""
    names = [f"potluck-{os.getpid()}-{side}" for side in ("here", "there")]
    with ExitStack() as stack:
        try:
            for name in names:
                tool("ip", "netns", "add", name)
                stack.callback(tool, "ip", "netns", "del", name)
            veth = ("type", "veth", "peer", "name", "cable", "netns", names[1])
            tool("ip", "link", "add", "cable", "netns", names[0], *veth)
            for name, address in zip(names, (HERE, THERE), strict=True):
                tool("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "cable")
                for device in ("lo", "cable"):
                    tool("ip", "-n", name, "link", "set", device, "up")
                rate = ("tbf", "rate", f"{MBIT}mbit", "burst", "64kb", "latency", "400ms")
                tool("tc", "-n", name, "qdisc", "add", "dev", "cable", "root", "handle", "1:", *rate)
            left = 0 if all(map(delayed, names)) else LATENCY_MS
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names, left


@pytest.fixture
def namespaces(potluck: Potluck, tmp_path: Path) -> Iterator[Network]:
    """Two machines that are network namespaces; skips where there are none."""
    with cabled() as (names, latency):
        network = Namespaces(potluck, tmp_path, names, latency)
        try:
            yield network
        finally:
            network.end()


@pytest.fixture
def loopback(potluck: Potluck, tmp_path: Path) -> Iterator[Network]:
    """Two machines in name only."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, shaped = (probe.getsockname()[1] for probe in (one, other))
    network = Network(potluck, tmp_path, port, f"127.0.0.1:{shaped}", MBIT, LATENCY_MS)
    try:
        yield network
    finally:
        network.end()


@pytest.fixture(params=["namespaces", "loopback"])
def network(request: pytest.FixtureRequest) -> Any:
    """Either."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def sources(tables: Tables) -> dict[str, dict[str, Any]]:
    """Each participant's text."""
    return {participant["name"]: participant["source"] for participant in tables["participants"]}
