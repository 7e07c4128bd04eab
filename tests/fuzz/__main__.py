"""Feed every decoder with changed inputs: ``python -m tests.fuzz [SECONDS] [--count N] [--seed S] [--only NAME]``.

Each input of n bytes is decoded or refused by an error of potluck's own, within 20 seconds and 64 n bytes + 64 MiB.
What is not is printed with the input; the exit status says whether there was any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.decoders import Decoder, decoders
from tests.fuzz.mutations import mutated

HEADROOM = 64 << 20


class Hangs(BaseException):
    """An input takes longer than 20 seconds."""


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory() -> None:
    """Let this process grow by 4 GiB at most: an input that takes more is a MemoryError, not a dead machine."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), resource.RLIM_INFINITY))


def outcome(decoder: Decoder, data: bytes) -> str:
    """``read``, ``refused``, or what is wrong."""
    before = peak()
    signal.alarm(20)
    try:
        decoder.decode(data)
        said = "read"
    except decoder.refuses:
        said = "refused"
    except BaseException as error:  # a panic of a library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    grown = peak() - before
    return said if grown <= 64 * len(data) + HEADROOM else f"took {grown >> 20} MiB"


def _hangs(*_: object) -> None:
    raise Hangs


def main(arguments: list[str]) -> int:
    """Run; the figures are printed as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float, nargs="?", default=float("inf"))
    parser.add_argument("--count", type=int, default=1 << 60, help="inputs of each decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hangs)
    draw, tried, refused, wrong = random.Random(asked.seed), Counter[str](), Counter[str](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        every = {name: d for name, d in decoders(Path(scratch)).items() if asked.only in name}
        limit_memory()
        ends, began = time.monotonic() + asked.seconds, peak()
        while time.monotonic() < ends and min(tried[name] for name in every) < asked.count:
            for name, decoder in every.items():
                data = mutated(decoder.form, decoder.seed, draw)
                said = outcome(decoder, data)
                tried[name] += 1
                refused[name] += said == "refused"
                if said not in ("read", "refused"):
                    wrong.setdefault(f"{name}: {said}", repr(data[:2000]))
    figures = {
        "inputs": tried.total(), "refused": refused.total(), "of each": dict(tried), "wrong": wrong,
        "peak_growth_mib": peak() - began >> 20, "peak_mib": peak() >> 20,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
