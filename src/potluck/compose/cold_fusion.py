"""ColD Fusion: a shared model that gets better by what contributors trained on their own tasks (arXiv 2212.01378).

Repeat: whoever wants trains all of θ_t on its own task; ``θ_{t+1} = θ_t + rule(θ¹ − θ_t, …)``, in the paper the mean.
Added here is a gate: what raises the loss on validation text is not taken over. `cold_fusion` does all of it in this
process; `fuse_folders` is one step on models that arrive as folders.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potluck.compose.merging.geometry import Linear
from potluck.compose.merging.models import WITHOUT_BASE, merge_models
from potluck.compose.merging.rules import Rule, even_weights, merged
from potluck.compose.training import Lesson, loss_on, only_training, train_part
from potluck.models.build import load_folder

Streams = Sequence[np.ndarray]
State = dict[str, Tensor]
MEAN = Linear()


@dataclass(frozen=True)
class Gate:
    """What a new model must pass: mean loss on these streams may rise by ``tolerance`` nats per token."""

    streams: Streams
    sequence_length: int = 128
    tolerance: float = 0.0
    device: str = "auto"

    def loss(self, model: PreTrainedModel) -> float:
        """Mean over the streams, in nats per token."""
        losses = [loss_on(model, stream, self.sequence_length, self.device) for stream in self.streams]
        return sum(losses) / len(losses)


@dataclass(frozen=True)
class Fused:
    """How a round went: validation loss of θ_t and θ_{t+1}, whose contributions are in it, and whose were left out.

    If none are in it, it is θ_t. Who did most harm was left out first.
    """

    before: float
    after: float
    taken: tuple[str, ...]
    left_out: tuple[str, ...]


def cold_fusion(
    model: PreTrainedModel, tasks: Mapping[str, Streams], gate: Gate, lesson: Lesson, rounds: int, rule: Rule = MEAN
) -> Iterator[Fused]:
    """Train a model in place for some rounds; yields after each, with the model at θ_{t+1}.

    Args:
        tasks: Each contributor's own text.
        lesson: How each trains in a round; the order of its text changes with the round.

    Raises:
        CorpusError: A text is shorter than one sequence.
        NotFinite: A contributor's loss or gradients stayed NaN or infinite.
    """
    theta = _state(model)
    for number in range(rounds):
        fused, theta = _one_round(model, theta, tasks, gate, replace(lesson, seed=lesson.seed + number), rule)
        _set(model, theta)
        yield fused


def fuse_folders(theta: Path, models: Sequence[Path], out: Path, gate: Gate, rule: Rule = MEAN) -> Fused:
    """One step on folders: ``out`` becomes θ_{t+1}, and is not written if nobody's contribution passes the gate.

    Raises:
        ModelError: A model cannot be used, or does not fit the others.
        RecipeError: The rule cannot be used.
        StorageError: The disk is full, or there is something at ``out``.
    """
    base = None if isinstance(rule, WITHOUT_BASE) else theta

    def attempt(names: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            merge_models([Path(name) for name in names], Path(scratch) / "model", rule, base=base)
            return gate.loss(load_folder(Path(scratch) / "model"))

    fused = gated([str(folder) for folder in models], attempt, gate.loss(load_folder(theta)), gate.tolerance)
    if fused.taken:
        merge_models([Path(name) for name in fused.taken], out, rule, base=base)
    return fused


def gated(names: Sequence[str], attempt: Callable[[Sequence[str]], float], before: float, tolerance: float) -> Fused:
    """Fuse all; while the loss by ``attempt`` is above ``before + tolerance``, leave out whose absence helps most."""
    taken, left_out = list(names), []
    after = attempt(taken) if taken else before
    while taken and not after <= before + tolerance:
        without = {name: attempt([n for n in taken if n != name]) for name in taken} if len(taken) > 1 else {}
        worst = min(without, key=lambda name: (math.isnan(without[name]), without[name]), default=taken[0])
        after = without.get(worst, before)
        taken.remove(worst)
        left_out.append(worst)
    return Fused(before, after, tuple(taken), tuple(left_out))


def _one_round(
    model: PreTrainedModel, theta: State, tasks: Mapping[str, Streams], gate: Gate, lesson: Lesson, rule: Rule
) -> tuple[Fused, State]:
    trained = {}
    for name, streams in tasks.items():
        _set(model, theta)
        with only_training(model, list(model.parameters())):
            train_part(model, streams, lesson)
        trained[name] = _state(model)

    def mixed(names: Sequence[str]) -> State:
        return _mixed(theta, [trained[name] for name in names], rule) if names else theta

    def attempt(names: Sequence[str]) -> float:
        _set(model, mixed(names))
        return gate.loss(model)

    fused = gated(list(tasks), attempt, attempt([]), gate.tolerance)
    return fused, mixed(fused.taken)


def _state(model: PreTrainedModel) -> State:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def _set(model: PreTrainedModel, state: State) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def _mixed(theta: State, models: Sequence[State], rule: Rule) -> State:
    weights = torch.tensor(even_weights(rule, len(models)))
    mixed = {}
    for name, origin in theta.items():
        rows = (len(models), origin.shape[0] if origin.ndim > 1 else 1, -1)
        deltas = torch.stack([model[name] - origin for model in models]).view(rows)
        mixed[name] = origin + merged(rule, name, weights, deltas).view(origin.shape)
    return mixed
