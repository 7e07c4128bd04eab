"""Texts from one token of each on, above one layer: what a search changes there reaches nothing before it.

So the layers below, and keys and values of the tokens before, are computed once, and each step of a search costs a few
tokens in place of whole texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.layout import Layout, from_layer
from potluck.edit.prompts import Rows


@dataclass(frozen=True)
class Tails:
    """Rows from a token of each on, ``(B, S)``.

    Attributes:
        places: Where each token stands in its row, ``(B, S)``; behind a row's end its last place is repeated.
        labels: As of `Rows`, ``(B, S)``.
        stream: What the layer gives, ``(B, S, d_out)``.
        ended: From what the layer gives to the model's last hidden states, ``(B, S, d_out)`` both.
    """

    places: Tensor
    labels: Tensor
    stream: Tensor
    ended: Callable[[Tensor], Tensor]

    def of(self, whole: Tensor) -> Tensor:
        """The same tokens of ``(B, T, d)``, ``(B, S, d)``."""
        return whole.gather(1, self.places[..., None].expand(-1, -1, whole.shape[-1]))

    def nll(self, base: Base, hidden: Tensor) -> Tensor:
        """Mean cross-entropy of each row's answer by last hidden states, ``(B,)``.

        Only where something is foretold is the whole vocabulary looked at.
        """
        wanted = self.labels != -100
        logits = base.model.get_output_embeddings()(hidden[wanted]).float()
        nats = torch.nn.functional.cross_entropy(logits, self.labels[wanted], reduction="none")
        owner = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)[wanted]
        total: Tensor = torch.zeros(len(wanted), device=nats.device).index_add(0, owner, nats)
        return total / wanted.sum(1).clamp(min=1)


def tails_of(base: Base, layout: Layout, layer: int, rows: Rows, start: Tensor) -> Tails:
    """The rows from ``start``, ``(B,)``, on; none starts with its first token."""
    model, device = base.model, rows.ids.device
    length = rows.mask.sum(1, keepdim=True)
    before = start[:, None] - int(start.max()) + torch.arange(int(start.max()), device=device)  # padded at the left
    after = start[:, None] + torch.arange(int((length[:, 0] - start).max()), device=device)
    mask, inside = before >= 0, after < length
    before, after = before.clamp(min=0), torch.minimum(after, length - 1)
    with torch.no_grad():
        run = model.base_model(
            input_ids=rows.ids.gather(1, before), attention_mask=mask.long(), position_ids=before, use_cache=True
        )
    cache: Any = run.past_key_values
    kept = [(part.keys, part.values) for part in cache.layers]

    def go_on() -> object:
        return model.base_model(
            input_ids=rows.ids.gather(1, after),
            attention_mask=torch.cat([mask, inside], 1).long(),
            position_ids=after,
            past_key_values=cache,
            use_cache=True,
        )

    stream, resumed = from_layer(layout, layer, go_on)

    def ended(hidden: Tensor) -> Tensor:
        for part, (keys, values) in zip(cache.layers, kept, strict=True):  # what the last run added goes
            part.keys, part.values = keys, values
        return resumed(hidden)

    return Tails(after, rows.labels.gather(1, after).masked_fill(~inside, -100), stream, ended)
