"""Tasks, replies and large tensors between machines, on loopback: latency, throughput and memory, beside the peers.

Ours is the engine over NATS with everything that a run has: TLS, signatures, a durable store, SHA-256 at both ends.
Peers, in the same call, in turn with ours: plain HTTPS with TLS, hash and disk as the limit (aiohttp), NVIDIA FLARE
with mutual TLS, and Flower's deployment runtime without TLS. A transfer is coordinator -> participant -> coordinator.
1 MB is 1e6 bytes; a process's memory is its peak resident set.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from benchmarks._measure import Measurement, main, measured

OURS = "benchmarks._wire_ours"
PEERS = {"https": "aiohttp", "flare": "nvflare", "flower": "flwr"}
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        megabytes, pings: Of one transfer; tiny messages.
        repeats: For each that is measured, how often it is started and measured anew, in turn with the others.
        pullers, pulled: So many participants fetch one state of so many MB at once.
        peers: Those to compare with.
    """

    megabytes: int
    pings: int
    repeats: dict[str, int]
    pullers: int
    pulled: int
    timeout: int = 240
    peers: tuple[str, ...] = field(default=tuple(PEERS))


SIZES = {
    "short": Size(megabytes=50, pings=30, repeats={"https": 1}, pullers=4, pulled=20, peers=("https",)),
    "full": Size(megabytes=1000, pings=200, repeats={"https": 3, "flare": 2, "flower": 1}, pullers=16, pulled=100),
}


def measure(size: Size) -> list[Measurement]:
    peers = [name for name in size.peers if find_spec(PEERS[name])]
    found: dict[str, list[Found]] = {name: [] for name in ("ours", *peers)}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(max(size.repeats.values())):
            found["ours"].append(run(OURS, size, scratch))
            for name in peers:
                if turn < size.repeats.get(name, 0):
                    found[name].append(run(f"benchmarks.peers.wire_{name}", size, scratch))
        pulls = [run(OURS, size, scratch, size.pullers) for _ in range(max(size.repeats.values()))]
    results = [*_ours(size, found["ours"]), *_pulled(size, pulls)]
    for name in peers:
        results += _beside(name, size, found["ours"], found[name])
    return results


def run(module: str, size: Size, scratch: str, pullers: int = 0) -> Found:
    """Start a script, and what it printed last; what could not be measured has a ``problem``."""
    few = pullers or module.endswith("flower")  # a ping takes it seconds
    arguments = {
        "megabytes": size.pulled if pullers else size.megabytes, "pings": min(5, size.pings) if few else size.pings,
        "transfers": 1 if few or size.megabytes > 500 else 3, "folder": scratch, "timeout": size.timeout,
        **({"pullers": pullers} if pullers else {}),
    }  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=size.timeout + 60, check=False
    )
    found: Found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["problem"]:
        print(f"{module}: {found['problem']}", file=sys.stderr)
    return found


def _ours(size: Size, found: Sequence[Found]) -> list[Measurement]:
    pings = [sorted(f["ping_ms"]) for f in found if f["ping_ms"]]
    large = size.megabytes >= 500  # below, the interpreter and torch are most of a process
    return [
        measured("durable round trip, p50", [p[len(p) // 2] for p in pings], "ms", at_most=5),
        measured("durable round trip, p99", [p[int(0.99 * (len(p) - 1))] for p in pings], "ms", at_most=50),
        *(
            measured(f"{size.megabytes} MB {way}", _rates(size, found, f"{way}_seconds"), "MB/s", at_least=150)
            for way in ("down", "up")
        ),
        *(
            measured(
                f"memory of the {role}",
                [f["peak_rss_mb"][role] / size.megabytes for f in found if f["peak_rss_mb"][role]],
                "x payload",
                at_most=1.3 if large else None,
            )
            for role in ("coordinator", "participant")
        ),
        measured("memory of the server", _peaks(found, "server"), "MB", at_most=300),
    ]


def _pulled(size: Size, found: Sequence[Found]) -> list[Measurement]:
    name = f"{size.pullers} participants pull {size.pulled} MB"
    rates = [size.pullers * size.pulled / seconds for f in found for seconds in f["transfer_seconds"]]
    each = [(f["peak_rss_mb"]["participant"] or 0) / size.pullers / size.pulled for f in found]
    coordinator = [(f["peak_rss_mb"]["coordinator"] or 0) / size.pulled for f in found]
    limit = 2.0 if size.pulled >= 100 else None
    return [
        measured(f"{name}: total", rates, "MB/s", at_least=150),
        measured(f"{name}: memory of one", each, "x state", at_most=limit),
        measured(f"{name}: memory of the coordinator", coordinator, "x state", at_most=limit),
        measured(f"{name}: memory of the server", _peaks(found, "server"), "MB", at_most=300),
    ]


def _beside(name: str, size: Size, ours: Sequence[Found], theirs: Sequence[Found]) -> list[Measurement]:
    """Ratios of medians; more than 1 is better for ours, but for memory."""
    peer = f"{name} {theirs[0]['version']}" if theirs else name
    pairs = [(o, t) for o, t in zip(ours, theirs, strict=False) if t["transfer_seconds"] and o["transfer_seconds"]]
    faster = [_median(t["transfer_seconds"]) / _median(o["transfer_seconds"]) for o, t in pairs]
    quicker = [_median(t["ping_ms"]) / _median(o["ping_ms"]) for o, t in pairs if t["ping_ms"]]
    lean = [_memory(o) / _memory(t) for o, t in pairs]
    targets: dict[str, tuple[float, float | None, float | None]] = {
        "https": (0.7, None, None), "flare": (1.0, 1.0, 1 / 3), "flower": (8.0, 500.0, None)
    }  # fmt: skip
    throughput, latency, memory = targets[name]
    rates = [2 * size.megabytes / seconds for t in theirs for seconds in t["transfer_seconds"]]
    return [
        measured(f"{name}: {size.megabytes} MB there and back", rates, "MB/s, both ways counted", peer=peer),
        measured(f"{name}: round trip", [_median(t["ping_ms"]) for t in theirs if t["ping_ms"]], "ms", peer=peer),
        measured("throughput beside it", faster, f"x {name}", at_least=throughput, peer=peer),
        measured("latency beside it", quicker, f"x quicker than {name}", at_least=latency, peer=peer),
        measured("memory beside it, both ends", lean, f"x {name}", at_most=memory, peer=peer),
    ]


def _rates(size: Size, found: Sequence[Found], key: str) -> list[float]:
    return [size.megabytes / seconds for f in found for seconds in f[key] or ()]


def _peaks(found: Sequence[Found], role: str) -> list[float]:
    return [f["peak_rss_mb"][role] for f in found if f["peak_rss_mb"][role]]


def _memory(found: Found) -> float:
    return sum(found["peak_rss_mb"][role] or 0.0 for role in ("coordinator", "participant"))


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main(measure, SIZES)
