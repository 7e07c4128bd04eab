"""General text, whose loss says whether forgetting did harm elsewhere: a text of the user's, or what the model writes.

Of text that the model before forgetting wrote by itself, the loss rises by ``KL(before ‖ after)`` a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from potluck.compose.base import Base, token_stream
from potluck.errors import CorpusError

_ROWS, _OWN = 32, 64  # rows and their tokens, of text that the model writes
_LENGTH = 128  # tokens of a row of a given text
_TOKENS = 2048  # of a text, at most
_LOGITS = 1 << 26


def rows_of_text(base: Base, texts: Iterable[str]) -> Tensor:
    """The beginning of a text as rows of tokens, ``(N, T)``.

    Raises:
        CorpusError: The text is shorter than one row.
    """
    length = _length(base, _LENGTH)
    stream = torch.from_numpy(token_stream(texts, base.vocabulary))[:_TOKENS]
    if len(stream) < length:
        raise CorpusError(f"the text is shorter than one sequence of {length} tokens", "name a longer one with --text")
    return stream[: len(stream) // length * length].view(-1, length)


@torch.inference_mode()
def written_by(base: Base, seed: int) -> Tensor:
    """Rows of tokens that the model writes by itself, drawn from what it foretells, ``(32, T)``."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.full((_ROWS, 1), base.vocabulary.end_of_text, device=base.model.device)
    found, cache = [ids], None
    for _ in range(_length(base, _OWN) - 1):
        out = base.model(input_ids=found[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        found.append(torch.multinomial(chances, 1, generator=draw).to(ids.device))
    return torch.cat(found, 1)


@torch.inference_mode()
def loss_of(base: Base, rows: Tensor) -> float:
    """Mean cross-entropy of rows of text, nats a token."""
    size = max(1, _LOGITS // (rows.shape[1] * base.model.config.vocab_size))
    nats = 0.0
    for batch in rows.to(base.model.device).split(size):
        logits = base.model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        nats += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").double())
    return nats / rows[:, 1:].numel()


def _length(base: Base, wished: int) -> int:
    return min(wished, getattr(base.model.config, "max_position_embeddings", wished))
