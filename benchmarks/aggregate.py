"""The coordinator's arithmetic: the streaming mean of 16 updates and one Nesterov step.

**Bandwidth.** The least traffic, in vectors of 4 N bytes: the first update is copied (2), each further one is mixed
into the mean (read both, write one: 3), the outer step reads theta, mean and momentum and writes two (5);
2 + 3 (n - 1) + 5 in all. The triad ``c = a + s b`` counts 3. Neither counts the reading of lines before they are
overwritten. Both run in turn in one process with the same threads; the triad is the best of several each time.

**Memory.** Peak resident memory of a fresh process above what it has with ``theta`` alone: mean, momentum, and the
update in flight, in models of 4 N bytes, to the hundredth. Updates are made one at a time.

**Flower.** ``aggregate`` takes arrays; ``aggregate_inplace`` and ``aggregate_arrayrecords``, which its two FedAvg
strategies call, take serialised arrays and decode them. The target is judged by the fastest of the three. Each gets
the same numbers as a list of arrays of a million elements, a layer's size: faster for it than one array of everything.
Potluck's side is the mean alone. It runs on all threads, Flower's on the one that numpy uses.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._measure import Measurement, main, measured, paired, seconds
from potluck.aggregation.mean import WeightedMean
from potluck.aggregation.outer import init_outer, outer_step
from potluck.recipe.outer import OuterNesterov

RULE = OuterNesterov()
_LAYER = 1_000_000  # elements


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        parameters: N.
        memory_parameters: N where memory is measured: so many that a process' own noise is below a hundredth.
        distinct: Updates that exist; they come again in turn, which no cache notices.
        runs: Runs of each kind.
    """

    parameters: int
    memory_parameters: int
    updates: int = 16
    distinct: int = 4
    runs: int
    flower_runs: int
    update_counts: tuple[int, ...] = (4, 16, 64)


SIZES = {
    "short": Size(parameters=5_000_000, memory_parameters=20_000_000, distinct=16, runs=15, flower_runs=3),
    "full": Size(parameters=50_000_000, memory_parameters=50_000_000, runs=9, flower_runs=3),
}


def measure(size: Size) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.rand(size.parameters, generator=generator) for _ in range(size.distinct)]
    return [*_bandwidth(size, updates), *_memory(size), *_flower(size, updates)]


def take_mean(mean: WeightedMean, updates: list[Tensor], count: int) -> Tensor:
    """The mean of ``count`` updates with the weights 1, 2, ..."""
    mean.init(updates[0].numel())
    for i in range(count):
        mean.accumulate(updates[i % len(updates)], 1.0 + i)
    return mean.finish()


def _bandwidth(size: Size, updates: list[Tensor]) -> list[Measurement]:
    theta, mean = torch.zeros(size.parameters), WeightedMean(size.parameters)
    state, c = init_outer(RULE, theta), torch.zeros(size.parameters)
    vector = 4 * size.parameters

    def work() -> None:
        outer_step(RULE, theta, take_mean(mean, updates, size.updates), state)

    def triad() -> float:
        return 3 * vector / min(seconds(lambda: torch.add(updates[0], updates[1], alpha=3.0, out=c)) for _ in range(5))

    work()
    triads, rates = [], []
    for _ in range(size.runs):
        triads.append(triad())
        rates.append((2 + 3 * (size.updates - 1) + 5) * vector / seconds(work))
    shares = [rate / best for rate, best in zip(rates, triads, strict=True)]
    what = f"mean of {size.updates} updates of {size.parameters / 1e6:g}M and Nesterov step"
    return [
        measured(f"{what}: bandwidth", shares, "x triad", at_least=0.5, peer=f"triad: {median(triads) / 1e9:.1f} GB/s"),
        measured(f"{what}: bandwidth, absolute", [rate / 1e9 for rate in rates], "GB/s"),
    ]


# --- memory --------------------------------------------------------------------------------------


def peak_models(parameters: int, updates: int) -> float:
    """Models of memory that aggregation needs beside ``theta``, in this process, which must be a fresh one."""
    _aggregate(torch.ones(1 << 20), 2)  # threads and kernels are not the aggregator's
    theta = torch.ones(parameters)
    before = _status("VmRSS")
    _aggregate(theta, updates)
    return (_status("VmHWM") - before) / (4 * parameters)


def _aggregate(theta: Tensor, updates: int) -> None:
    mean, state = WeightedMean(theta.numel()), init_outer(RULE, theta)
    mean.init(theta.numel())
    for i in range(updates):
        mean.accumulate(torch.full_like(theta, float(i)), 1.0 + i)
    outer_step(RULE, theta, mean.finish(), state)


def _status(key: str) -> int:
    """A figure of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def _memory(size: Size) -> list[Measurement]:
    peaks = {}
    for count in size.update_counts:
        code = f"from benchmarks.aggregate import peak_models; print(peak_models({size.memory_parameters}, {count}))"
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        peaks[count] = round(float(done.stdout), 2)
    counts, scale = ", ".join(map(str, peaks)), f"updates of {size.memory_parameters / 1e6:g}M"
    growth = max(peaks.values()) / min(peaks.values())
    return [
        measured(f"peak memory beside theta, {counts} {scale}", [max(peaks.values())], "models", at_most=3),
        measured(f"peak memory, largest by smallest of {counts} {scale}", [growth], "x", at_most=1.02),
    ]


# --- Flower --------------------------------------------------------------------------------------


def _flower(size: Size, updates: list[Tensor]) -> list[Measurement]:
    what = f"mean of {size.updates} updates of {size.parameters / 1e6:g}M beside Flower's FedAvg"
    if find_spec("flwr") is None:
        return [measured(what, [], "x faster", at_least=4, peer="flwr is not installed: make bench PEERS=1")]
    mean = WeightedMean(size.parameters)
    results = {}
    for name, theirs, decoded in _flower_ways(size, updates):
        ours = take_mean(mean, updates, size.updates).numpy()
        np.testing.assert_allclose(np.concatenate(decoded(theirs())), ours, rtol=1e-4)
        times = paired(lambda: take_mean(mean, updates, size.updates), theirs, size.flower_runs)
        results[name] = [their_time / our_time for our_time, their_time in times]
    fastest = min(results, key=lambda name: median(results[name]))
    return [
        measured(
            what, ratios, "x faster", at_least=4 if name == fastest else None, peer=f"flwr {version('flwr')} {name}"
        )
        for name, ratios in results.items()
    ]


def _flower_ways(size: Size, updates: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """Name, call, and how its result becomes a list of arrays."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server.strategy.aggregate import aggregate, aggregate_inplace
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    layers = [np.array_split(update.numpy(), -(-size.parameters // _LAYER)) for update in updates]
    numbers = range(size.updates)

    arrays = [(layers[i % len(layers)], 1 + i) for i in numbers]
    yield "aggregate", lambda: aggregate(arrays), lambda result: result

    encoded = [ndarrays_to_parameters(update) for update in layers]
    done = Status(Code.OK, "")
    replies: Any = [(None, FitRes(done, encoded[i % len(encoded)], 1 + i, {})) for i in numbers]
    yield "aggregate_inplace, from bytes", lambda: aggregate_inplace(replies), lambda result: result

    records = [ArrayRecord({str(k): Array(layer) for k, layer in enumerate(update)}) for update in layers]
    messages = [
        RecordDict({"arrays": records[i % len(records)], "metrics": MetricRecord({"num-examples": 1 + i})})
        for i in numbers
    ]
    yield (
        "aggregate_arrayrecords, from bytes",
        lambda: aggregate_arrayrecords(messages, "num-examples"),
        lambda result: [array.numpy() for array in result.values()],
    )


if __name__ == "__main__":
    main(measure, SIZES)
