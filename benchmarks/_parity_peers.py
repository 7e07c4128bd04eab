"""The peers of `benchmarks.parity`: the same job, weights and batches, each in processes of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.peers._job import Job, Result, write_job
from potluck.corpus.batches import Batches
from potluck.embedded import Workplace, prepare
from potluck.local.evaluate import negative_log_likelihood
from potluck.recipe import Recipe
from potluck.recipe.local import AdamW, Cosine
from potluck.recipe.outer import OuterNesterov, OuterSgd
from potluck.recipe.seeds import seed_of

PYTHON = Path(".venv-peers/bin/python")
PEERS = ("torchft_diloco", "flower_fedavg", "ddp")


@dataclass(frozen=True, kw_only=True)
class PeerOutcome:
    """Held-out loss of what a peer trained, nats per byte, and bytes that one participant sent."""

    loss: float
    up_bytes: float
    payload_bytes: int
    seconds: float
    versions: dict[str, str]


def run_peer(name: str, recipe: Recipe) -> PeerOutcome:
    """Let a peer do a recipe's run.

    Raises:
        RuntimeError: It failed; the message ends with what it said.
    """
    workplace = prepare(recipe, lambda _: None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_job(folder, job_of(recipe, workplace), workplace.initial, batches_of(recipe, workplace))
        module = f"benchmarks.peers.{name}"
        done = subprocess.run([PYTHON, "-m", module, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        theta = load_file(folder / "result.safetensors")["theta"]
        result = Result(**json.loads((folder / "result.json").read_text()))
    workplace.network.flat.vector.copy_(theta)
    return PeerOutcome(
        loss=held_out(recipe, workplace),
        up_bytes=sum(result.bytes_sent) / len(result.bytes_sent),
        payload_bytes=result.payload_bytes,
        seconds=result.seconds,
        versions=result.versions,
    )


def job_of(recipe: Recipe, workplace: Workplace) -> Job:
    """A recipe as a peer's job."""
    optimizer, schedule, outer = recipe.local.optimizer, recipe.local.schedule, recipe.outer
    assert isinstance(optimizer, AdamW) and isinstance(schedule, Cosine) and isinstance(outer, OuterSgd | OuterNesterov)
    return Job(
        participants=len(recipe.participant_names),
        local_steps=recipe.local_steps,
        rounds=recipe.rounds.count,
        batch_size=recipe.local.batch_size,
        sequence_length=recipe.local.sequence_length,
        model=recipe.model.model_dump(),
        vocabulary=workplace.corpus.vocabulary.size,
        end_of_text=workplace.corpus.vocabulary.end_of_text,
        seed=recipe.seed,
        learning_rate=optimizer.learning_rate,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        clip_norm=recipe.local.clip_norm,
        warmup_steps=schedule.warmup_steps,
        final_fraction=schedule.final_fraction,
        outer_learning_rate=outer.learning_rate,
        outer_momentum=outer.momentum,
        threads=recipe.compute.threads,
    )


def batches_of(recipe: Recipe, workplace: Workplace) -> list[np.ndarray]:
    """Every participant's batches of the run, in order."""
    size, steps = recipe.local.batch_size, recipe.total_local_steps
    drawn = []
    for holding in workplace.corpus.holdings.values():
        batches = Batches(holding.train.tokens, recipe.local.sequence_length, seed_of(recipe.seed, holding.name))
        drawn.append(np.stack([batches.draw(step * size, size) for step in range(steps)]).astype(np.int32))
    return drawn


@torch.inference_mode()
def held_out(recipe: Recipe, workplace: Workplace) -> float:
    """Nats per byte of everybody's held-out text."""
    nats = text_bytes = 0.0
    for holding in workplace.corpus.holdings.values():
        shard = holding.validation
        nats += negative_log_likelihood(workplace.network, shard.tokens, recipe.local.sequence_length)[0]
        text_bytes += shard.text_bytes
    return nats / text_bytes
