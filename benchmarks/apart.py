"""A whole run on machines of their own beside the same run in one process: the same weights, and what a round costs.

Server, coordinator and participants (four at full size) are processes of this machine, with TLS and everything that a
real run has. They share its cores. A round's overhead is its time beyond local steps: of all rounds together, what is
left when the time is taken off that the slowest participant was at its local steps, by its own clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from rich.console import Console

from benchmarks._measure import Measurement, main, measured
from benchmarks.peers._wire import free_port
from potluck.commands import train
from potluck.records.events import read_events

PACKAGES = {"ada": "asyncio", "ben": "email", "cem": "encodings", "dan": "multiprocessing"}
POTLUCK = str(Path(sys.executable).with_name("potluck"))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        packages: Of each participant, whose text it is.
        text: Bytes of everybody's that are trained on; a quarter as many are evaluated.
    """

    rounds: int
    local_steps: int
    packages: Mapping[str, str] = field(default_factory=lambda: PACKAGES)
    model: Mapping[str, object] = field(default_factory=lambda: {"preset": "tiny"})
    text: int = 60_000


TWO = {name: PACKAGES[name] for name in ("ada", "ben")}
SIZES = {
    "short": Size(rounds=3, local_steps=3, packages=TWO, text=20_000),
    "full": Size(rounds=16, local_steps=10),
}


def measure(size: Size) -> list[Measurement]:
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as left:
        folder = Path(scratch)
        recipe = folder / "apart.toml"
        recipe.write_text(tomli_w.dumps(_recipe(size, folder)))
        one, apart = folder / "one", folder / "apart"
        train(recipe, (f"records.folder={one}",), Console(stderr=True, quiet=True))
        host = ["host", recipe, "--listen", f"127.0.0.1:{free_port()}", "--set", f"records.folder={apart}"]
        coordinator = left.enter_context(_process(host))
        joined = []
        for name, package in size.packages.items():
            invite, part = apart / "host" / "invites" / f"{name}.toml", folder / f"{name}.toml"
            part.write_text(tomli_w.dumps({"source": {"package": package}}))
            while not invite.exists() and coordinator.poll() is None:
                time.sleep(0.05)
            words = ["join", "--invite", invite, "--part", part, "--folder", folder / name, "--json"]
            joined.append(left.enter_context(_process(words)))
        if coordinator.wait(1800):
            raise RuntimeError("the hosted run failed")
        trained = [float(json.loads(process.communicate(timeout=60)[0])["trained_seconds"]) for process in joined]
        return _compared(one, apart, max(trained))


def _compared(one: Path, apart: Path, trained: float) -> list[Measurement]:
    seconds, hashes = {}, []
    for folder in (one, apart):
        events = list(read_events(folder / "events.jsonl"))
        seconds[folder] = [event["seconds"] for event in events if event["event"] == "round"]
        hashes.append(next(event["state_hash"] for event in events if event["event"] == "run_finished"))
    overhead = (sum(seconds[apart]) - trained) / len(seconds[apart])
    peer = "potluck in one process"
    return [
        measured("final weights bit-identical", [float(hashes[0] == hashes[1])], "1 = yes", at_least=1, peer=peer),
        measured("a round in one process", seconds[one], "s"),
        measured("a round on machines of their own", seconds[apart], "s"),
        measured("overhead of a round beyond local steps", [overhead], "s", at_most=0.5),
    ]


def _recipe(size: Size, folder: Path) -> dict[str, object]:
    return {
        "name": "apart",
        "participants": [{"name": name, "source": {"package": package}} for name, package in size.packages.items()],
        "data": {"validation_fraction": 0.3, "train_bytes": size.text, "validation_bytes": size.text // 4,
                 "shards": str(folder / "shards")},
        "model": dict(size.model),
        "rounds": {"count": size.rounds, "local_steps": size.local_steps, "evaluate_every": size.rounds},
        "compute": {"threads": 1},
    }  # fmt: skip


@contextmanager
def _process(words: list[object]) -> Iterator[subprocess.Popen[bytes]]:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([POTLUCK, *map(str, words)], env=alone, stdout=subprocess.PIPE) as process:
        try:
            yield process
            process.wait(30)
        finally:
            process.kill()


if __name__ == "__main__":
    main(measure, SIZES)
