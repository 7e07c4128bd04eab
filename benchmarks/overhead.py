"""What the rounds cost beside the plain PyTorch loop that does the same local steps.

Timed are whole rounds on the embedded engine: task and reply, copying the shared state in, binding the optimizer, the
local steps, checking the update, mean, outer step (SGD, rate 1: FedAvg), and the events written and flushed. Not
timed: start-up, token shards, evaluation and checkpoints; a checkpoint and an event have lines of their own. The plain
loop is what one would write without potluck: a model of its own, the same batches, fused AdamW, clipping, schedule, and
the loss read each step. Both run in turn in one process.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from benchmarks._measure import Measurement, main, measured, paired, seconds
from potluck.aggregation.mean import WeightedMean
from potluck.contribution import Contribution, ParticipantInfo, Task
from potluck.corpus.tokenizer import Vocabulary
from potluck.embedded import Embedded, embedded_run, prepare
from potluck.engine.inprocess import InProcess
from potluck.models.build import build_model
from potluck.participant import Participant
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe
from potluck.recipe.local import AdamW
from potluck.recipe.schedules import rate_factor
from potluck.records.folder import Variant
from potluck.rounds.sync import one_round
from potluck.updates.codec import wire_bytes

PLAIN = "plain PyTorch loop"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        single: For each H: rounds in one run, and pairs of runs.
        swapped: Rounds of all participants.
    """

    single: dict[int, tuple[int, int]]
    swapped: int
    swapped_steps: int = 20
    participants: int = 8
    saves: int = 10
    model: tuple[tuple[str, Any], ...] = (("preset", "tiny"),)
    batch: tuple[int, int] = (8, 128)


SIZES = {
    "short": Size(single={1: (4, 11), 20: (1, 3)}, swapped=1),
    "full": Size(single={1: (10, 41), 20: (1, 15)}, swapped=5),
}


class Draws(Protocol):
    """Where training sequences come from."""

    def draw(self, cursor: int, count: int) -> np.ndarray: ...


class PlainLoop:
    """Training as one would write it without potluck."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary, batches: Draws) -> None:
        self.recipe, self.batches, self.steps = recipe, batches, 0
        self.losses: list[float] = []
        self.model = build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed).train()
        table = recipe.local.optimizer
        assert isinstance(table, AdamW)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": table.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=table.learning_rate,
            betas=(table.beta1, table.beta2),
            eps=table.epsilon,
            fused=True,
        )

    def train(self, steps: int) -> None:
        local, total = self.recipe.local, self.recipe.total_local_steps
        for step in range(self.steps, self.steps + steps):
            tokens = torch.from_numpy(self.batches.draw(step * local.batch_size, local.batch_size))
            for group in self.optimizer.param_groups:
                group["lr"] = local.optimizer.learning_rate * rate_factor(local.schedule, step, total)
            self.optimizer.zero_grad(set_to_none=True)
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            clip_grad_norm_(self.model.parameters(), local.clip_norm)
            self.optimizer.step()
            self.losses.append(loss.item())
        self.steps += steps

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class Both:
    """A run, and a plain loop for each of its participants that takes the same steps from the same weights."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        workplace = prepare(recipe, lambda _: None)
        self.recipe = recipe
        self.run = embedded_run(workplace, Variant("together", recipe.participant_names), folder, recipe)
        assert isinstance(self.run.side, Embedded)
        self.participants: dict[str, Participant] = self.run.side.participants
        self.loops = {
            name: PlainLoop(recipe, workplace.corpus.vocabulary, participant.batches[0])
            for name, participant in self.participants.items()
        }
        self.mean = WeightedMean(self.run.shared.theta.numel())
        self.plain_seconds = 0.0
        self.alone = self._engine(self._perform)
        self.in_turn = self._engine(self._plain_then_perform)

    def rounds(self, engine: InProcess, count: int) -> None:
        for _ in range(count):
            one_round(self.recipe, self.recipe.participant_names, engine, self.mean, self.run.shared, self.run.log)

    def _engine(self, perform: Any) -> InProcess:
        return InProcess([ParticipantInfo(name=name) for name in self.participants], perform, wire_bytes)

    def _perform(self, name: str, task: Task) -> Contribution:
        return self.participants[name].perform(task)

    def _plain_then_perform(self, name: str, task: Task) -> Contribution:
        self.plain_seconds += seconds(lambda: self.loops[name].train(self.recipe.local_steps))
        return self._perform(name, task)


def measure(size: Size) -> list[Measurement]:
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for steps, (rounds, pairs) in size.single.items():
            results += _single(Both(_recipe(size, folder, 1, steps, rounds * (pairs + 1)), folder), rounds, pairs)
        both = Both(_recipe(size, folder, size.participants, size.swapped_steps, size.swapped), folder)
        return [*results, _swapped(both, size.swapped), *_records(both, size.saves)]


def _recipe(size: Size, folder: Path, participants: int, local_steps: int, rounds: int) -> Recipe:
    """FedAvg of so many participants that share the standard library's source."""
    batch_size, sequence_length = size.batch
    caps = {"train_bytes": 150_000, "validation_bytes": 10_000, "validation_fraction": 0.2}
    source = {"source": {"package": "stdlib", "order": "shuffled"}, "split": {"participants": participants}}
    return parse_recipe(
        {
            "data": {**source, **caps, "shards": str(folder / "shards")},
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "model": dict(size.model),
            "local": {"batch_size": batch_size, "sequence_length": sequence_length},
            "rounds": {"count": rounds, "local_steps": local_steps},
            "compute": {"device": "cpu"},
        }
    )


def _single(both: Both, rounds: int, pairs: int) -> list[Measurement]:
    """One participant: nothing is averaged, so all but the local steps is overhead."""
    (loop,), steps = both.loops.values(), both.recipe.local_steps
    times = paired(lambda: both.rounds(both.alone, rounds), lambda: loop.train(rounds * steps), pairs + 1)
    ratios = [ours / theirs for ours, theirs in times[1:]]  # the first pair warms up
    identical = torch.equal(both.run.shared.theta, loop.weights())
    both.run.log.close()
    case = f"1 participant, H = {steps}"
    return [
        measured(f"{case}: wall time", ratios, "x plain loop", at_most=1.03, peer=PLAIN),
        measured(f"{case}: final weights bit-identical", [float(identical)], "1 = yes", at_least=1, peer=PLAIN),
    ]


def _swapped(both: Both, rounds: int) -> Measurement:
    """Participants take turns in one model; each one's plain loop runs just before its local steps, timed apart."""
    ratios = []
    for _ in range(rounds):
        both.plain_seconds = 0.0
        elapsed = seconds(lambda: both.rounds(both.in_turn, 1))
        ratios.append((elapsed - both.plain_seconds) / both.plain_seconds)
    count, steps = len(both.loops), both.recipe.local_steps
    return measured(
        f"{count} participants, full state swap, H = {steps}: wall time",
        ratios,
        "x plain loops",
        at_most=1.10,
        peer=f"{count} plain loops, one after the other",
    )


def _records(both: Both, saves: int) -> list[Measurement]:
    """A checkpoint holds shared state and all moments, hashed and forced to disk."""
    log = both.run.log
    facts = dict.fromkeys(("weight", "loss", "steps", "tokens", "update_norm", "cursor", "epoch", "up_bytes"), 1.0)
    checkpoints = []
    for _ in range(saves):
        checkpoints.append(1e3 * seconds(lambda: both.run.save(None)))
        shutil.rmtree(both.run.folder / "checkpoints")
    events = [1e3 * seconds(lambda: log.write("contribution", round=1, status="ok", **facts)) for _ in range(100)]
    log.close()
    return [
        measured(f"one checkpoint of {len(both.loops)} participants", checkpoints, "ms"),
        measured("one event", events, "ms"),
    ]


if __name__ == "__main__":
    main(measure, SIZES)
