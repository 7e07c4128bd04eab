"""Memory that the processes of a run need, before it runs; without torch.

Where all participants are in one process on the CPU, all that is kept from round to round is there at once, and on top
of it whatever is largest: a local step, the exchange that follows it, or an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from potluck.models.footprint import LARGE, Passing, Widths, evaluation_passing, step_passing, widths_of
from potluck.recipe import Recipe
from potluck.recipe.engine import Nats
from potluck.recipe.local import AdamW, Muon
from potluck.recipe.outer import OuterAdagrad, OuterAdam, OuterNesterov, OuterSgd, OuterYogi
from potluck.recipe.updates import ErrorFeedback, FullDownload, QuantizedDownload
from potluck.traffic import Messages
from potluck.updates.sizes import payload_bytes

_FP32 = 4
_WRITTEN_PER_ROUND = 500_000_000  # bytes of checkpoints, on the average: some seconds of a disk
_INTERPRETER = 430_000_000  # Python, torch, transformers and what they keep; measured, see docs/explanation
_TOKENIZER = 700  # bytes for each token; measured


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        device: Weights, gradients, activations and logits of a local step or an evaluation, whichever needs more,
            beside the optimizer's moments; once for all participants of a process.
        participant: What one participant keeps in host memory: optimizer state, what links keep, its own parameters
            and its copy of the shared ones.
        coordinator: Shared state, mean, outer optimizer, and what downloads keep.
        process: The peak of the one process of a run on the CPU, all of the above and the interpreter included;
            ``None`` where participants are elsewhere.
        activations_known: Whether the model's config says enough for activations and logits.
    """

    device: int
    participant: int
    coordinator: int
    process: int | None
    activations_known: bool


def footprint(
    recipe: Recipe, messages: Messages, vocabulary: int, held_out: Mapping[str, int | None], frozen: int
) -> Footprint:
    """What a run needs.

    Args:
        recipe: The recipe.
        messages: Its messages.
        vocabulary: Tokens of the tokenizer.
        held_out: Tokens of each participant's held-out text; ``None`` if its text is elsewhere.
        frozen: Parameters that do not learn.

    Raises:
        ModelError: The model folder cannot be read.
    """
    widths, size = widths_of(recipe.model, vocabulary), messages.size
    step, evaluation = Passing(size, 0), Passing(0, 0)
    if widths is not None:
        step = _step(recipe, widths, size)
        length, known = recipe.local.sequence_length, [tokens for tokens in held_out.values() if tokens is not None]
        most = max(known) if len(known) == len(held_out) and known else 1 << 30
        evaluation = evaluation_passing(widths, length, max(1, most // length))
    weights = size + frozen
    participant = _FP32 * size * _participant_vectors(recipe)
    coordinator = _FP32 * size * _coordinator_vectors(recipe) + _kept_for_downloads(messages)
    process = None
    if not isinstance(recipe.engine, Nats):
        kept = _FP32 * (weights + size) + coordinator + len(recipe.participant_names) * participant
        kept += _FP32 * int(_held_back(recipe) * size)
        process = _INTERPRETER + _TOKENIZER * vocabulary + kept + _FP32 * _passing(recipe, size, step, evaluation)
    device = _FP32 * (weights + max(step.peak, size + evaluation.peak))
    return Footprint(device, participant, coordinator, process, widths is not None)


def moments(optimizer: object) -> int:
    """fp32 vectors of an inner optimizer, in multiples of the model (for Muon an upper bound)."""
    if isinstance(optimizer, AdamW | Muon):
        return 2
    return 1 if getattr(optimizer, "momentum", 0.0) else 0


def checkpoint_bytes(recipe: Recipe, size: int, trainers: int) -> int:
    """Bytes of a checkpoint: the shared state, the outer optimizer, what downloads owe, what those who train keep.

    Args:
        recipe: The recipe.
        size: Parameters that learn.
        trainers: Who trains; over nats they keep their state themselves.
    """
    vectors = 1 + _outer_vectors(recipe) + isinstance(recipe.updates.download, QuantizedDownload)
    if not isinstance(recipe.engine, Nats):
        vectors += trainers * _kept_vectors(recipe)
    return _FP32 * size * vectors


def states_kept(recipe: Recipe, size: int) -> tuple[int, int]:
    """States that a participant over nats keeps for a coordinator that goes back to its checkpoint, and bytes of one.

    With each state lies the answer, in full precision at most.
    """
    every = with_period(recipe, size, 0).records.checkpoint_every or 1
    return 2 * every + 4, _FP32 * size * (1 + _kept_vectors(recipe))


def with_period(recipe: Recipe, size: int, trainers: int) -> Recipe:
    """The recipe with the rounds between two checkpoints: its own, or so many that a round writes half a gigabyte."""
    records = recipe.records
    if records.checkpoint_every is None:
        every = max(1, -(-checkpoint_bytes(recipe, size, trainers) // _WRITTEN_PER_ROUND))
        records = records.model_copy(update={"checkpoint_every": every})
    return recipe.model_copy(update={"records": records})


def _passing(recipe: Recipe, size: int, step: Passing, evaluation: Passing) -> int:
    """Numbers that come and go, at their peak: in a step, in the exchange after it, or in an evaluation."""
    stays, exchange = step.stays + evaluation.stays, int(_exchange(recipe) * size)
    after = stays + exchange if size // recipe.fragments >= LARGE else max(stays, exchange)
    return max(step.peak, size + after, size + stays + evaluation.peak - evaluation.stays)


def _step(recipe: Recipe, widths: Widths, size: int) -> Passing:
    """A local step; streams keep where the round started, and their mean so far."""
    local, adaptive = recipe.local, recipe.local.adaptive_batch
    batch = adaptive.max_batch_size if adaptive else local.batch_size
    accumulates = local.accumulation > 1 or adaptive is not None
    recomputes = recipe.compute.gradient_checkpointing
    step = step_passing(widths, size, batch, local.sequence_length, accumulates, recomputes)
    if adaptive is None:
        return step
    more = size + 2 * size * (adaptive.streams > 1)  # the gradient before a batch; start and mean
    return Passing(step.peak + more, step.stays)


def _participant_vectors(recipe: Recipe) -> int:
    """fp32 vectors in a participant's host memory: what it keeps, and its copy of the shared state."""
    whole_each_time = isinstance(recipe.updates.download, FullDownload) and recipe.fragments == 1
    return _kept_vectors(recipe) + (not whole_each_time)


def _kept_vectors(recipe: Recipe) -> int:
    """fp32 vectors that a participant saves: moments, residual, own parameters."""
    adaptive = recipe.local.adaptive_batch
    streams = adaptive.streams if adaptive else 1
    return (
        moments(recipe.local.optimizer) * streams
        + any(isinstance(link, ErrorFeedback) for link in recipe.updates.links)
        + (recipe.rounds.streaming is not None)
    )


def _exchange(recipe: Recipe) -> float:
    """Vectors that come and go between local steps, of the size of the model.

    In full precision the difference whose norm is taken, or the state before the outer step. With links the
    pseudo-gradient and what coding makes of it; error feedback decodes that once more. A quantised outer step is coded
    and decoded, too.
    """
    most = 1.0
    if recipe.updates.links:
        most = 2.0 if any(isinstance(link, ErrorFeedback) for link in recipe.updates.links) else 1.3
    if not isinstance(recipe.updates.download, FullDownload):
        most = 2.7
    return most / recipe.fragments


def _held_back(recipe: Recipe) -> float:
    """Vectors of answers that came early: with device profiles they come in any order."""
    if all(person.profile is None for person in recipe.participants):
        return 0.0
    coded = 0.25 if recipe.updates.links else 1.0
    return coded * (recipe.asked_per_round - 1) / recipe.fragments + (recipe.rounds.deadline is not None)


def _kept_for_downloads(messages: Messages) -> int:
    """Messages for those who missed rounds, and what quantisation has yet to say."""
    download, count = messages.recipe.updates.download, len(messages.fragments)
    if isinstance(download, FullDownload):
        return 0
    history = sum(payload_bytes(messages.step(number % count)) for number in range(download.history))
    return history + (_FP32 * messages.size if isinstance(download, QuantizedDownload) else 0)


def _coordinator_vectors(recipe: Recipe) -> int:
    """fp32 vectors: shared state and mean; of late tasks, the states that they began from."""
    return 2 + _outer_vectors(recipe) + 2 * recipe.keeps_late


def _outer_vectors(recipe: Recipe) -> int:
    match recipe.outer:
        case OuterAdam() | OuterYogi() | OuterAdagrad():
            return 2
        case OuterNesterov():
            return 1
        case OuterSgd(momentum=momentum) if momentum:
            return 1
        case _:
            return 0
