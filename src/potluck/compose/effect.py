"""What a part does to the loss of a text: whether it helps, has no effect, or does harm, and that it is said.

Losses are of stretches spread evenly over a text, so many as the model reads in a bounded number of operations; before
and after are of the same stretches, so that their difference is far surer than either of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from potluck.compose.base import token_stream
from potluck.compose.library.selection import example_losses
from potluck.corpus.tokenizer import Vocabulary

_OPERATIONS = 7e11  # of a measurement: ten seconds on one CPU core
_FEWEST, _MOST = 8, 64  # stretches
_SURE = 2.0  # standard errors
_NO_EFFECT = 1e-3  # of the loss
_HARMS_OTHERS = 0.01  # of the loss of general text, which any part for one kind of text may raise a little
_HELD_OUT = 10  # one part in so many of a text


@dataclass(frozen=True)
class Effect:
    """A text's loss without and with a part, nats per token.

    Attributes:
        error: Standard error of ``after - before``.
        tokens: Predicted, in all.
        seen: Whether the part was trained on this text.
    """

    before: float
    after: float
    error: float
    tokens: int
    seen: bool = False

    @property
    def change(self) -> float:
        """Of the loss; below zero is better."""
        return self.after - self.before

    def harms(self, share: float = 0.0) -> bool:
        """Whether the loss is surely higher, by more than a share of itself."""
        return self.change > max(_SURE * self.error, share * self.before, 1e-6)

    def table(self) -> dict[str, Any]:
        """For records and JSON."""
        return {**vars(self)}


def affordable(model: PreTrainedModel, tokens: int, operations: float, fewest: int, most: int) -> int:
    """How many stretches of so many tokens the model reads in so many operations, two a parameter and token."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return max(fewest, min(most, int(operations / (2 * parameters * tokens))))


def stretch(model: PreTrainedModel, length: int = 128) -> int:
    """So many tokens, or as many as the model's context holds."""
    return min(length, int(getattr(model.config, "max_position_embeddings", 0) or length))


def held_out(texts: Sequence[str], vocabulary: Vocabulary, length: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A text as token ids, to train on and to measure on: whole documents, about a tenth of them all.

    Where no document is small enough, it is the end of the text; where that is shorter than two stretches, nothing.

    Raises:
        CorpusError: There is no text.
    """
    streams = [token_stream([text], vocabulary) for text in texts if not text.isspace() and text]
    whole = np.concatenate(streams) if streams else token_stream(texts, vocabulary)
    room, kept = len(whole) // _HELD_OUT, set[int]()
    if room < 2 * (length + 1):
        return whole, None
    order = list(range(len(streams)))
    random.Random(0).shuffle(order)
    for number in order:
        if len(streams[number]) <= room:
            room -= len(streams[number])
            kept.add(number)
    measured = [streams[number] for number in sorted(kept)]
    if sum(map(len, measured)) < len(whole) // (2 * _HELD_OUT):
        end = len(whole) - len(whole) // _HELD_OUT
        return whole[:end], whole[end:]
    return np.concatenate([s for number, s in enumerate(streams) if number not in kept]), np.concatenate(measured)


def stretches(base: PreTrainedModel, stream: np.ndarray, length: int) -> list[np.ndarray]:
    """What is read of a text to measure on it, with any part: ``(length + 1,)`` token ids each, spread evenly."""
    count = (len(stream) - 1) // length
    most = affordable(base, length, _OPERATIONS, _FEWEST, _MOST)
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return [stream[at * length : at * length + length + 1] for at in chosen] or [stream]


def losses(model: PreTrainedModel, rows: Sequence[np.ndarray], device: str = "auto") -> Tensor:
    """Mean loss of each of some `stretches`, nats per token, float64 ``(n,)``.

    Raises:
        CorpusError: A stretch has fewer than two tokens, or more than the model can read.
    """
    return example_losses(model, rows, device, "fp32").double()


def compared(before: Tensor, after: Tensor, rows: Sequence[np.ndarray], seen: bool = False) -> Effect:
    """What changed, from `losses` of the same stretches."""
    change = after - before
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
    return Effect(float(before.mean()), float(after.mean()), error, sum(len(row) - 1 for row in rows), seen)


def warnings_of(what: str, own: Effect | None, general: Effect | None = None) -> list[str]:
    """What must be said of a part, if anything: no effect or harm on its own text, harm to general text.

    Args:
        what: The part and how it was made, such as ``experts/ada, trained as full at a rate of 2e-3``.
    """
    said = []
    if own is not None:
        text = "its own training text" if own.seen else "text of its kind that it was not trained on"
        figures = f"{own.before:.3f} to {own.after:.3f} nats per token of {text}"
        if own.harms():
            said.append(f"{what}: does harm: {figures}")
        elif not own.change < -_NO_EFFECT * own.before:
            said.append(f"{what}: has no effect: {figures}")
    if general is not None and general.harms(_HARMS_OTHERS):
        said.append(
            f"{what}: general text is worse with it: {general.before:.3f} to {general.after:.3f} nats per token"
        )
    return said
