"""What participants report of themselves, held to what they were asked for: numbers become weights, scores and sums.

A figure that cannot be is a reason to refuse the answer, and never an error here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from potluck.contribution import HeldOutText, Scalar
from potluck.recipe import Recipe

MOST = 1 << 53  # whole numbers up to here are floats as well
MAX_LOSS = 1e6  # nats per token, far above what any model that can be trained has
FIGURES = ("loss", "steps", "skipped_steps", "tokens", "examples", "cursor", "epoch")
Header = Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What local steps can come to at most.

    Attributes:
        steps: That were asked for.
        examples: Sequences of one step.
        length: Tokens of one sequence.
    """

    steps: int
    examples: int
    length: int


def limits_of(recipe: Recipe, texts: int = 1) -> Limits:
    """Of the local steps of one round; ``texts`` is how many a step draws from, one but for the pooled run."""
    local, adaptive = recipe.local, recipe.local.adaptive_batch
    examples = local.batch_size * local.accumulation
    if adaptive is not None:  # a batch is taken in two halves, so each pass may have one sequence more
        examples = adaptive.streams * adaptive.max_accumulation * (adaptive.max_batch_size + 1)
    return Limits(steps=recipe.local_steps, examples=examples * texts, length=local.sequence_length)


def wrong_update(header: Header, limits: Limits) -> str:
    """Why the figures of local steps cannot be; empty if they can."""
    if any(not _is_count(header[key]) for key in FIGURES[1:]) or not _is_loss(header["loss"]):
        return "its figures are not numbers that local steps can have"
    steps, skipped, tokens, examples = (int(header[key]) for key in FIGURES[1:5])
    if steps > limits.steps or skipped > limits.steps:
        return f"{steps} local steps and {skipped} skipped, {limits.steps} were asked for"
    if 0 in (steps, tokens, examples):
        return "no local step was taken"
    if examples > steps * limits.examples or tokens > examples * limits.length:
        most = steps * limits.examples
        return f"{examples} sequences, {tokens} tokens in {steps} local steps: at most {most}, {limits.length} each"
    if float(header["loss"]) > MAX_LOSS:
        return f"a loss of {header['loss']:.3g} nats per token"
    return ""


def wrong_evaluation(header: Header, held: HeldOutText | None, known: HeldOutText | None) -> str:
    """Why the figures of an evaluation cannot be; empty if they can.

    Args:
        held: What the participant said it holds out.
        known: What it was evaluated on before: scores on other text could not be compared.
    """
    nats = header["nats"]
    if any(not _is_count(header[key]) for key in ("tokens", "bytes")) or not _is_loss(nats):
        return "its figures are not numbers that an evaluation can have"
    tokens, size = int(header["tokens"]), int(header["bytes"])
    if 0 in (tokens, size):
        return "it was evaluated on no text"
    if float(nats) > tokens * MAX_LOSS:
        return f"{nats:.3g} nats for {tokens} tokens"
    for text, what in ((held, "it holds out"), (known, "it was evaluated before on")):
        if text is not None and (tokens, size) != (text.tokens, text.bytes):
            return f"evaluated on {tokens} tokens, {size} bytes; {what} {text.tokens} tokens, {text.bytes} bytes"
    return ""


def _is_count(value: Scalar) -> bool:
    return type(value) is int and 0 <= value < MOST


def _is_loss(value: Scalar) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0
