"""Training a part on one participant's text: whatever requires a gradient learns, the rest stays bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potluck.corpus.batches import Batches
from potluck.errors import CorpusError
from potluck.local.evaluate import negative_log_likelihood
from potluck.local.network import Network, host_vector, place
from potluck.local.optimizers import InnerOptimizer
from potluck.local.steps import StepReport, local_steps
from potluck.recipe.local import AdamW, Cosine, Local
from potluck.recipe.schedules import rate_factor
from potluck.recipe.schema import Compute

Part = Literal["full", "low-rank", "router"]  # weights of the model's own size, factors beside them, what chooses


@dataclass(frozen=True)
class Lesson:
    """How a part is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences of each stream in a step.
        sequence_length: Tokens predicted in a sequence.
        learning_rate: Peak of AdamW; a tenth of the steps warms up, then half a cosine down to a tenth. `default_rate`
            of the part if ``None``.
        seed: Decides the order of the text.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    steps: int = 300
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float | None = None
    seed: int = 0
    device: str = "auto"


def default_rate(model: PreTrainedModel, kind: Part) -> float:
    """A rate of AdamW that suits a part of a model of width d.

    ``0.05 / d`` for weights themselves, ``0.2 / d`` for factors that are added to them, and not below the published
    1e-5 and 1e-4; 2e-3 for a router. AdamW moves every weight by the rate, whatever the gradient: what comes out of d
    of them changes with the rate times d, and what does a small base good ruins a large one.
    """
    if kind == "router":
        return 2e-3
    embedding: Any = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    return max(1e-5, 0.05 / width) if kind == "full" else max(1e-4, 0.2 / width)


def settled(lesson: Lesson, model: PreTrainedModel, kind: Part) -> Lesson:
    """The lesson with its rate."""
    return lesson if lesson.learning_rate is not None else replace(lesson, learning_rate=default_rate(model, kind))


def train_part(
    model: PreTrainedModel,
    streams: Sequence[np.ndarray],
    lesson: Lesson,
    on_step: Callable[[int], None] = lambda step: None,
    kind: Part = "full",
) -> StepReport:
    """Train in place what requires a gradient; a step takes a batch of each stream.

    Args:
        kind: What learns, for a lesson that leaves the rate to `default_rate`.
        model: With ``requires_grad`` on the part alone.
        streams: Token ids, ``(T,)`` each.
        on_step: Told the number of each step before it is taken.

    Raises:
        CorpusError: A stream is shorter than one sequence.
        NotFinite: Loss or gradients stayed NaN or infinite.
    """
    drawn = [Batches(stream, lesson.sequence_length, lesson.seed) for stream in streams]
    if any(batches.sequences < 1 for batches in drawn):
        raise CorpusError(f"the text is shorter than one sequence of {lesson.sequence_length} tokens")
    rate = default_rate(model, kind) if lesson.learning_rate is None else lesson.learning_rate
    optimizer_table = AdamW(learning_rate=rate, weight_decay=0.0)
    settings = Local(batch_size=lesson.batch_size, sequence_length=lesson.sequence_length, optimizer=optimizer_table)
    network = placed(model, lesson.device)
    optimizer = InnerOptimizer(optimizer_table, network.flat, network.model)
    optimizer.bind(host_vector(optimizer.size, network.device), 0)
    torch.manual_seed(lesson.seed)

    def batches_of_step(step: int) -> list[Tensor]:
        on_step(step)
        return [torch.from_numpy(b.draw(step * lesson.batch_size, lesson.batch_size)) for b in drawn]

    schedule = Cosine(warmup_steps=math.ceil(lesson.steps / 10))
    rates = (rate_factor(schedule, step, lesson.steps) for step in range(lesson.steps))
    report = local_steps(network, optimizer, settings, batches_of_step, rates)
    model.eval()
    return report


def loss_on(model: PreTrainedModel, stream: np.ndarray, sequence_length: int, device: str = "auto") -> float:
    """Mean cross-entropy in nats per token over a stream (`negative_log_likelihood`), in fp32 on any device."""
    nats, tokens = negative_log_likelihood(placed(model, device, "fp32"), stream, sequence_length)
    return nats / tokens


def placed(model: PreTrainedModel, device: str, precision: Literal["auto", "fp32"] = "auto") -> Network:
    """The model where it computes; only what requires a gradient becomes part of the flat vector.

    Raises:
        RecipeError: The device does not exist.
    """
    return place(model, Compute(device=device, precision=precision))


@contextmanager
def only_training(model: PreTrainedModel, part: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Within, ``part`` alone requires a gradient; afterwards nothing of the model does."""
    model.requires_grad_(False)
    for parameter in part:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)
