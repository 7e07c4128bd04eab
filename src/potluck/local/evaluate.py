"""How well a network predicts a text that it was not trained on."""

from __future__ import annotations

import numpy as np
import torch

from potluck.local.network import Network, token_losses

_TOKENS_PER_BATCH = 8192
_LOGITS_PER_BATCH = 1 << 28  # 1 GiB in fp32


def negative_log_likelihood(network: Network, stream: np.ndarray, sequence_length: int) -> tuple[float, int]:
    """Nats that a network needs for every token of a stream but the first.

    The stream is cut into stretches of ``sequence_length`` predictions, each begun with no more context than the token
    before it: the same for every network that is compared.

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
        tokens_at_once = min(_TOKENS_PER_BATCH, _LOGITS_PER_BATCH // network.model.config.vocab_size)
        at_once = max(1, tokens_at_once // sequence_length)
        pieces = [whole[start : start + at_once] for start in range(0, rows, at_once)]
    rest = stream[rows * sequence_length :]
    if len(rest) > 1:
        pieces.append(rest[None])
    nats = 0.0
    with torch.inference_mode():
        for piece in pieces:
            tokens = torch.from_numpy(piece.astype(np.int64)).to(network.device)
            nats += float(token_losses(network, tokens, "sum"))
    return nats, len(stream) - 1
