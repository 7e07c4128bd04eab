"""How well a network predicts a text that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from potluck.local.network import Network, next_logits
from potluck.models.footprint import evaluated_at_once, losses_at_once


def negative_log_likelihood(network: Network, stream: np.ndarray, sequence_length: int) -> tuple[float, int]:
    """Nats that a network needs for every token of a stream but the first.

    The stream is cut into stretches of ``sequence_length`` predictions, each begun with no more context than the token
    before it: the same for every network that is compared. Memory does not grow with vocabulary times stream: there are
    logits of ``evaluated_at_once`` stretches at a time, and loss of ``losses_at_once`` of their tokens.

    Args:
        stream: Token ids, shape ``(T,)``.

    Returns:
        Sum of ``-ln p`` in nats and the number of predictions, ``T - 1``.
    """
    network.model.eval()
    rows = (len(stream) - 1) // sequence_length
    pieces = []
    if rows:
        whole = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)[::sequence_length]
        at_once = evaluated_at_once(network.model.config.vocab_size, sequence_length)
        pieces = [whole[start : start + at_once] for start in range(0, rows, at_once)]
    rest = stream[rows * sequence_length :]
    if len(rest) > 1:
        pieces.append(rest[None])
    nats = 0.0
    with torch.inference_mode():
        for piece in pieces:
            tokens = torch.from_numpy(piece.astype(np.int64)).to(network.device)
            nats += _nats(next_logits(network, tokens).flatten(0, 1), tokens[:, 1:].flatten())
    return nats, len(stream) - 1


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows of ``-ln softmax(logits)[target]``; the softmax is of some rows at a time, and in fp32."""
    rows = losses_at_once(logits.shape[1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return sum(float(functional.cross_entropy(part.float(), target, reduction="sum")) for part, target in parts)
