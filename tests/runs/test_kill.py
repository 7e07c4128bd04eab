"""kill -9 at any moment: start-up, shards, training, evaluation, checkpoint, export."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.records.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

KILLS = 20
ROUNDS = 75


@pytest.fixture
def recipe(potluck: Potluck, tables: Tables) -> Path:
    """Every kind of state is in play: kept optimizers, outer momentum, sampling, a trained tokenizer, pruning."""
    return potluck.recipe(
        tables,
        tokenizer={"kind": "bpe", "vocab_size": 280},
        rounds={"count": ROUNDS, "local_steps": 2, "participants_per_round": 2, "evaluate_every": 3},
        outer={"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
    )


def newest(run: Path) -> int:
    return max(list_checkpoints(run / "checkpoints"), default=-1)


def test_killed_twenty_times_the_weights_are_the_same(
    potluck: Potluck, recipe: Path, tmp_path: Path, final_hash: Callable[[Path], str], story: Callable[[Path], Any]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    potluck("train", recipe, "--set", f"records.folder={whole}", "--set", "data.shards=shards-whole")
    mean_life = (time.monotonic() - began) / KILLS

    draw, kills, reached = random.Random(0), 0, []
    while kills < KILLS:
        if (killed / "run.json").exists():
            process = potluck.start("resume", killed)
        else:
            process = potluck.start(
                "train", recipe, "--set", f"records.folder={killed}", "--set", "data.shards=shards-killed"
            )
        # The first die in their start-up and among the shards, the rest wherever they are, on a slow machine in the
        # start-up again: every fourth of them lives until there is one more checkpoint.
        ended = False
        while kills % 4 == 1 and kills > 5 and newest(killed) == reached[-1] and not ended:
            ended = process.ends_within(0.02)
        if ended or process.ends_within(draw.uniform(0, 0.1 if kills < 5 else 2 * mean_life)):
            assert process.wait().code == 0, process.err.read_text()
            pytest.fail(f"done after {kills} kills: make the run longer")
        process.signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        kills += 1
        reached.append(newest(killed))
    potluck("resume", killed)

    assert reached == sorted(reached), "a kill lost a checkpoint"
    assert reached[0] == -1 and len(set(reached)) >= 4, reached
    assert final_hash(killed) == final_hash(whole)
    assert story(killed) == story(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
