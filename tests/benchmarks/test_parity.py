"""What `benchmarks.parity` counts, and that each of its forms is a valid recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks._parity_cases import DATA_PARALLEL, DILOCO, METHODS, SIZES, Case, Outcome, outcome_of, recipe_of
from benchmarks.parity import rows_of

N = 1000
PIECE = {"down_bytes": 7, "up_bytes": 3}


def events(participants: int, trainers: int, rounds: int) -> list[dict[str, Any]]:
    """A run whose loss falls by 1 with each round; each reply is 3 bytes, each task 7, the first of all 4,000."""
    union = {"nats": 9.0, "bytes": 1}
    begin = {"down_bytes": 4 * N, "up_bytes": 3}
    told: list[dict[str, Any]] = [
        {"event": "run_started", "parameters": N},
        {"event": "evaluation", "round": 0, "union": union, "transfers": dict.fromkeys(range(participants), begin)},
    ]
    for number in range(1, rounds + 1):
        union = {"nats": 9.0 - number, "bytes": 1}
        told += [{"event": "contribution", **PIECE}] * trainers
        transfers = dict.fromkeys(range(participants), PIECE)
        told += [{"event": "evaluation", "round": number, "union": union, "transfers": transfers}]
    return [*told, {"event": "run_finished", "state_hash": ""}]


def outcome(method: str, folder: Path, start_steps: int = 0) -> Outcome:
    size = replace(SIZES["short"], text_bytes=4000)
    case = Case(method=method, participants=4, split="iid", seed=0)
    told = events(4, 1 if METHODS[method].every_step else 4, 3)  # all batches of a pooled run are one trainer's
    return outcome_of(case, recipe_of(size, case, folder), told, 50, start_steps, 0.0)


def test_bytes_are_counted_both_ways_with_evaluations_and_set_up(tmp_path: Path) -> None:
    found = outcome(DILOCO, tmp_path)
    assert found.setup_bytes == 50 + 4 * N + 3  # tokenizer and recipe, initial state, and the answer
    assert (found.up_bytes, found.down_bytes) == (3 + 6 * 3, 50 + 4 * N + 6 * 7)
    assert found.bytes_to(7.0) == found.setup_bytes + 4 * 10
    assert found.bytes_to(1.0) is None


def test_data_parallel_training_is_a_ring_both_ways(tmp_path: Path) -> None:
    found = outcome(DATA_PARALLEL, tmp_path)
    ring = 3 * 10 * 6 * N  # 3 rounds of 10 steps, 2 (M - 1) / M x 4 N each
    assert (found.up_bytes, found.down_bytes) == (ring, ring + 50 + 4 * N)


def test_the_warm_start_counts_on_both_sides(tmp_path: Path) -> None:
    ours, theirs = outcome(DILOCO, tmp_path, 20), outcome(DATA_PARALLEL, tmp_path, 20)
    assert ours.warm_bytes == theirs.warm_bytes == 20 * 2 * 6 * N
    row = next(row for row in rows_of([ours, theirs]) if row.method == DILOCO)
    assert row.savings == row.whole == [theirs.total_bytes / ours.total_bytes]
    warm = ours.warm_bytes
    assert row.warm_savings == [(warm + theirs.total_bytes) / (warm + ours.total_bytes)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("participants", [2, 4, 8])
def test_every_method_is_a_recipe_in_the_short_form(method: str, participants: int, tmp_path: Path) -> None:
    size = replace(SIZES["short"], batch=8, text_bytes=4000)
    recipe = recipe_of(size, Case(method=method, participants=participants, split="iid", seed=0), tmp_path)
    assert recipe.total_local_steps >= size.period * size.rounds * METHODS[method].tokens
