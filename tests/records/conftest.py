"""A run folder and a comparison folder with known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.records.events import EventLog, Listener

NAMES = ("numpy", "pip", "sympy")
HOSTILE = "<script src=//evil.example/x.js></script> & [red]boom[/red]\x1b[31m\nsecond line"
STEP_TOKENS, ROUNDS, LOCAL_STEPS = 1024, 4, 20


def held_out(bits: float, size: int = 1000) -> dict[str, float | int]:
    return {"nats": bits * size * math.log(2), "tokens": size // 2, "bytes": size, "bits_per_byte": bits}


def write_run(
    folder: Path,
    variant: str = "together",
    trainers: tuple[str, ...] = NAMES,
    last: tuple[float, ...] = (2.5, 2.0, 3.0),
    union: float = 2.6,
    finish: bool = True,
    listeners: tuple[Listener, ...] = (),
) -> None:
    """Held-out values fall from 8 to ``last`` in equal steps; sympy's contribution to round 2 fails."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "demo"\nseed = 7\n# <b>&</b>\n')
    log = EventLog(folder / "events.jsonl", listeners=listeners)
    people = [
        {"name": name, "train_tokens": 60_000 + index, "train_bytes": 150_000, "train_documents": 30 + index,
         "validation_tokens": 500, "validation_bytes": 1000, "validation_documents": 4, "content_hash": f"{index:064x}"}
        for index, name in enumerate(NAMES)
    ]  # fmt: skip
    environment = {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "device": "cpu",
                   "precision": "fp32", "threads": 2}  # fmt: skip
    log.write("run_started", schema=1, potluck="0.1.0", recipe_hash="ab" * 32, variant=variant, trainers=list(trainers),
              participants=people, parameters=1_070_000, rounds=ROUNDS, local_steps=LOCAL_STEPS,
              tokens_per_step=STEP_TOKENS, environment=environment)  # fmt: skip

    def evaluate(number: int) -> None:
        bits = [value if number == ROUNDS else 8 - (8 - value) * number / ROUNDS for value in (*last, union)]
        log.write("evaluation", round=number, union=held_out(bits[-1], 3000), seconds=0.5, transfers={},
                  participants=dict(zip(NAMES, map(held_out, bits), strict=False)))  # fmt: skip

    evaluate(0)
    tokens = 0
    for number in range(1, ROUNDS + 1):
        failed = 0
        for name in trainers:
            if (name, number, variant) == ("sympy", 2, "together"):
                log.write("contribution", round=number, participant=name, status="failed", reason=HOSTILE,
                          down_bytes=4_000_000, up_bytes=0, seconds=0.2)  # fmt: skip
                failed += 1
                continue
            tokens += LOCAL_STEPS * STEP_TOKENS
            log.write("contribution", round=number, participant=name, status="ok", reason="", weight=1.0,
                      loss=6.0 - number - 0.1 * NAMES.index(name) if name in NAMES else 4.0, steps=LOCAL_STEPS,
                      skipped_steps=0, tokens=LOCAL_STEPS * STEP_TOKENS, examples=160, cursor=160 * number,
                      epoch=0.34 * number, update_norm=1.5, down_bytes=4_000_000, up_bytes=4_000_000,
                      seconds=2.0)  # fmt: skip
        log.write("round", round=number, revision=number, asked=len(trainers), contributors=len(trainers) - failed,
                  delta_norm=1.1, total_tokens=tokens, seconds=2.0 * len(trainers) + 0.1)  # fmt: skip
        if not finish and number == ROUNDS - 1:
            log.write("run_interrupted", round=number)
            log.close()
            return
        evaluate(number)
        log.write("checkpoint", round=number, state_hash="cd" * 32)
    log.write("run_finished", rounds=ROUNDS, total_tokens=tokens, state_hash="cd" * 32, seconds=40.0)
    log.close()


@pytest.fixture
def make_run() -> Callable[..., None]:
    return write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def comparison_folder(tmp_path: Path) -> Path:
    """Together is best on numpy's and pip's own text and on the union; sympy does better alone."""
    folder = tmp_path / "comparison"
    write_run(folder / "together")
    for name, last, union in (
        ("numpy", (2.7, 2.9, 3.6), 3.1),
        ("pip", (3.3, 2.2, 3.5), 3.0),
        ("sympy", (3.4, 3.1, 2.9), 3.2),
    ):
        write_run(folder / "alone" / name, "alone", (name,), last, union)
    write_run(folder / "pooled", "pooled", ("pooled",), (2.3, 1.9, 2.8), 2.4)
    (folder / "recipe.toml").write_text('name = "demo"\n')
    return folder
