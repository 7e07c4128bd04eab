"""Two participants beyond a link of 20 Mbit/s and 50 ms each way: how much of the time they are in local steps.

Real processes on this machine: `potluck host`, twice `potluck join`, and between them the proxy of
`tests.machines.shaping`. The same local steps and bytes once blocking, in rounds of all fragments' steps, and once
streaming, a fragment at a time. The wall time is that of the rounds: from the first tasks to the last outer step, all
rounds' transfers included, evaluations not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks._measure import Measurement, main, measured
from potluck.records.events import read_events

ROOT = Path(__file__).parents[1]
PEOPLE = {"ada": "asyncio", "ben": "email"}
MBIT, LATENCY_MS = 20, 50
FRAGMENTS = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        turns: How often each fragment is exchanged.
        steps: Local steps between two exchanges of a fragment each; all but one overlap.
    """

    turns: int
    batch: int
    steps: int = 5
    width: int = 128


SIZES = {"short": Size(turns=2, batch=64), "full": Size(turns=5, batch=96)}


def measure(size: Size) -> list[Measurement]:
    streaming = {"kind": "streaming", "fragments": FRAGMENTS, "overlap": size.steps - 1}
    return [
        *_run("blocking", size, {"count": size.turns, "local_steps": FRAGMENTS * size.steps}, None),
        *_run(
            "streaming", size, {"count": FRAGMENTS * size.turns, "local_steps": size.steps, "streaming": streaming}, 0.9
        ),
    ]


def _run(name: str, size: Size, rounds: dict[str, Any], at_least: float | None) -> Iterator[Measurement]:
    recipe = {
        "name": name,
        "engine": {"kind": "nats"},
        "participants": [{"name": person} for person in PEOPLE],
        "data": {"validation_fraction": 0.3, "train_bytes": 100_000, "validation_bytes": 20_000},
        "model": {"layers": 4, "width": size.width, "heads": 2, "feedforward": 3 * size.width, "context": 64},
        "local": {"batch_size": size.batch, "sequence_length": 64},
        "rounds": {**rounds, "evaluate_every": rounds["count"]},
        "records": {"folder": "run"},
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        worked = _worked(recipe, Path(folder), stack)
        found = list(read_events(Path(folder) / "run" / "events.jsonl"))
    began = next(event for event in found if event["event"] == "evaluation")
    ended = [event for event in found if event["event"] == "round"][-1]
    wall = (datetime.fromisoformat(ended["time"]) - datetime.fromisoformat(began["time"])).total_seconds()
    sent = sum(event["up_bytes"] + event["down_bytes"] for event in found if event["event"] == "contribution")
    yield measured(f"{name}: time in local steps", [w / wall for w in worked], "fraction", at_least=at_least)
    yield measured(f"{name}: a round of {rounds['local_steps']} local steps", [wall / rounds["count"]], "s")
    yield measured(f"{name}: sent", [sent / wall / 1e6 * 8], "Mbit/s", peer=f"{sent / 1e6:.1f} MB, both ways together")


def _worked(recipe: dict[str, Any], folder: Path, stack: ExitStack) -> list[float]:
    """Run it; the seconds that each participant says it has worked."""
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, shaped = (probe.getsockname()[1] for probe in (one, other))
    link = ("--mbit", str(MBIT), "--latency-ms", str(LATENCY_MS))
    ends = ("--listen", f"127.0.0.1:{shaped}", "--to", f"127.0.0.1:{port}")
    _start(folder, stack, sys.executable, "-m", "tests.machines.shaping", *ends, *link)
    potluck = str(Path(sys.executable).with_name("potluck"))
    where = ("--listen", f"0.0.0.0:{port}", "--advertise", f"127.0.0.1:{shaped}")
    host = _start(folder, stack, potluck, "host", "recipe.toml", *where, "--json")
    invites = folder / "run" / "host" / "invites"
    while not (invites.parent / "run.json").exists():
        if host.poll() is not None:
            raise RuntimeError("potluck host ended early")
        time.sleep(0.02)
    joined = []
    for person, package in PEOPLE.items():
        (folder / f"{person}.toml").write_text(tomli_w.dumps({"source": {"package": package}, "threads": 1}))
        mine = ("--part", f"{person}.toml", "--folder", person)
        joined.append(_start(folder, stack, potluck, "join", "--invite", f"{invites}/{person}.toml", *mine, "--json"))
    said = [json.loads(process.communicate()[0]) for process in joined]
    host.wait()
    return [float(result["worked_seconds"]) for result in said]


def _start(folder: Path, stack: ExitStack, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    stack.enter_context(process)  # waits
    stack.callback(process.terminate)  # a coordinator ends its server
    return process


if __name__ == "__main__":
    main(measure, SIZES)
