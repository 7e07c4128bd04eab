"""The participant's side of the loop: one table from the kind of a task to the function that performs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potluck.contribution import Contribution, Task
from potluck.corpus.batches import Batches
from potluck.corpus.shards import Shard
from potluck.errors import TrainingError
from potluck.local.evaluate import negative_log_likelihood
from potluck.local.network import Network, host_vector
from potluck.local.optimizers import InnerOptimizer
from potluck.local.schedules import rate_factor
from potluck.local.steps import local_steps
from potluck.recipe import Recipe


@dataclass
class LocalState:
    """What a participant keeps between rounds; with the recipe and its text it determines all it will do.

    Attributes:
        moments: The inner optimizer's moments, flat fp32 in host memory.
        optimizer_steps: Steps behind the moments.
        cursor: Sequences drawn from each of its batches.
        tokens: Tokens it has trained on.
    """

    moments: Tensor
    optimizer_steps: int = 0
    cursor: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Participant:
    """One party: its text, its state, and the network it computes with.

    Attributes:
        batches: Where its training sequences come from. A step takes ``batch_size`` sequences from each: one for
            an ordinary participant, everybody's for the pooled run.
        validation: Its held-out text, if it has any.
        network, optimizer: Shared by all participants of a process; they take turns.
    """

    name: str
    recipe: Recipe
    network: Network
    optimizer: InnerOptimizer
    batches: tuple[Batches, ...]
    validation: Shard | None
    state: LocalState

    def perform(self, task: Task) -> Contribution:
        """Do a task.

        Raises:
            TrainingError: The kind of task is not known here, or training failed.
        """
        if task.kind not in _TASKS:
            raise TrainingError(f"{self.name} does not know how to {task.kind!r}", f"known: {', '.join(_TASKS)}")
        shared = task.tensors["parameters"]
        if shared.shape != self.network.flat.vector.shape:
            raise TrainingError(f"{self.name}: a shared state of shape {tuple(shared.shape)} does not fit the model")
        try:
            self.network.flat.vector.copy_(shared)
            return _TASKS[task.kind](self, task)
        except (RuntimeError, MemoryError, IndexError) as error:  # what torch raises, out of memory above all
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"{self.name} could not {task.kind}: {reason}") from error


def new_state(network: Network, optimizer: InnerOptimizer) -> LocalState:
    """The state of a participant that has done nothing yet."""
    return LocalState(host_vector(optimizer.size, network.device))


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from names and numbers, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train(participant: Participant, task: Task) -> Contribution:
    """H local steps from the shared state; the update is the parameters they reached."""
    recipe, state, network = participant.recipe, participant.state, participant.network
    first, steps = int(task.parameters["first_step"]), int(task.parameters["steps"])
    schedule, total = recipe.local.schedule, recipe.total_local_steps
    if not recipe.local.keep_optimizer:
        state.moments.zero_()
        state.optimizer_steps = 0
    participant.optimizer.bind(state.moments, state.optimizer_steps)
    _seed_dropout(network.device, seed_of(recipe.seed, participant.name, first))
    try:
        report = local_steps(
            network,
            participant.optimizer,
            recipe.local,
            lambda _: _draw(participant),
            (rate_factor(schedule, step, total) for step in range(first, first + steps)),
            anchor=task.tensors["parameters"].to(network.device) if recipe.local.proximal else None,
        )
    finally:  # what a failing participant has done stays done
        state.optimizer_steps = participant.optimizer.steps
        participant.optimizer.release(state.moments)
    state.tokens += report.tokens
    return Contribution(
        kind="train",
        revision=task.revision,
        header={
            "loss": report.loss,
            "steps": report.steps,
            "skipped_steps": report.skipped_steps,
            "tokens": report.tokens,
            "examples": report.examples,
            "cursor": state.cursor,
            "epoch": state.cursor // participant.batches[0].sequences,
        },
        tensors={"parameters": network.flat.vector.cpu()},
    )


def evaluate(participant: Participant, task: Task) -> Contribution:
    """The shared state's loss on the participant's held-out text: sums, so that they add up to the union's."""
    if participant.validation is None:
        raise TrainingError(f"{participant.name} has no held-out text")
    shard = participant.validation
    nats, tokens = negative_log_likelihood(participant.network, shard.tokens, participant.recipe.local.sequence_length)
    header = {"nats": nats, "tokens": tokens, "bytes": shard.text_bytes}
    return Contribution(kind="evaluate", revision=task.revision, header=header)


_TASKS: Mapping[str, Callable[[Participant, Task], Contribution]] = {"train": train, "evaluate": evaluate}


def _seed_dropout(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` where it counts; that one also formats a traceback for every backend not yet in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _draw(participant: Participant) -> list[Tensor]:
    """The batches of the next local step; the cursor moves on."""
    local, state = participant.recipe.local, participant.state
    drawn = []
    for _ in range(local.accumulation):
        drawn += [torch.from_numpy(b.draw(state.cursor, local.batch_size)) for b in participant.batches]
        state.cursor += local.batch_size
    return drawn
