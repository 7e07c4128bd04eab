"""What a model says by itself, where a whole answer is expected: greedily, as many tokens as the answer has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from potluck.compose.base import Base
from potluck.edit.prompts import Row

_ROWS = 16  # in a batch


def free_answers(base: Base, rows: Sequence[Row], hits: Sequence[Sequence[bool]]) -> list[str]:
    """Greedy answers, each as long in tokens as the one that is expected, or up to the end of the text.

    Nothing of an expected answer is given to the model. Only, what it would say is known up to its first token that is
    not the expected one, from having the answer put before it; from there on it writes.

    Args:
        rows: Prompts with the answers that are expected.
        hits: Of each, whether each token was the likeliest (`potluck.edit.forgetting.quality.told_of`).
    """
    expected = [row.ids[row.prompt :] for row in rows]
    right = [next((i for i, hit in enumerate(of) if not hit), len(of)) for of in hits]
    said = [list(tokens[:count]) for tokens, count in zip(expected, right, strict=True)]
    open_rows = [i for i, count in enumerate(right) if count < len(expected[i])]
    open_rows.sort(key=lambda i: len(expected[i]) - right[i])
    for begin in range(0, len(open_rows), _ROWS):
        places = open_rows[begin : begin + _ROWS]
        begun = [[*rows[i].ids[: rows[i].prompt], *said[i]] for i in places]
        count = max(len(expected[i]) - right[i] for i in places)
        for i, more in zip(places, _continued(base, begun, count), strict=True):
            said[i] += more[: len(expected[i]) - right[i]]
    return [_text(base, tokens) for tokens in said]


@torch.inference_mode()
def _continued(base: Base, begun: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """So many greedy tokens after each; shorter ones are padded at the left, where nobody looks."""
    model, width = base.model, max(map(len, begun))
    ids = torch.full((len(begun), width), base.vocabulary.end_of_text, device=model.device)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(begun):
        ids[i, width - len(tokens) :] = torch.tensor(tokens)
        mask[i, width - len(tokens) :] = 1
    numbered = "position_ids" in inspect.signature(model.forward).parameters
    step, cache, found = ids, None, []
    for _ in range(count):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        out = model(
            input_ids=step,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": places} if numbered else {}),
        )
        cache = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        found.append(step[:, 0].tolist())
        mask = torch.cat([mask, torch.ones_like(step)], 1)
    return [list(tokens) for tokens in zip(*found, strict=True)]


def _text(base: Base, tokens: list[int]) -> str:
    stops = base.vocabulary.stops
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    text: str = base.vocabulary.tokenizer.decode(tokens[:end])
    return text.strip()
