"""Keys and hidden states of edits: what a map gets, and a layer gives, at the token that is edited.

That is the last one of the subject, or of the prompt, whichever the model's answer comes from (`potluck edit locate`).

A key is ``½ k(prompt) + ½ mean k(context + prompt)`` over texts that may stand before the prompt. The model writes
these itself, from a seed, and nothing keeps them between calls: parties that edit together are given the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.facts import Edit
from potluck.edit.layout import Layout, host, run_to
from potluck.edit.prompts import Row, row, rows_of
from potluck.errors import EditError

COUNT, LENGTH = 5, 10  # texts, and tokens of each
_ROWS = 64  # in a batch
Site = Literal["subject", "prompt"]  # whose last token is edited


def contexts(base: Base, seed: int = 0, count: int = COUNT, length: int = LENGTH) -> tuple[str, ...]:
    """Beginnings of texts, drawn from the model: the same for the same weights and seed on one kind of machine."""
    draw = torch.Generator().manual_seed(seed)
    start = base.vocabulary.prompt("")
    ids = torch.tensor([start] * count, device=base.model.device)
    step, cache = ids, None
    with torch.inference_mode():
        for _ in range(length):
            out = base.model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            logits[:, sorted(base.vocabulary.stops)] = -torch.inf
            step = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=draw).to(ids.device)
            ids = torch.cat([ids, step], dim=1)
    return tuple(base.vocabulary.tokenizer.decode(tokens[len(start) :]).strip() for tokens in ids.tolist())


def prompt_row(base: Base, edit: Edit, before: str = "", answer: str = "", at: Site = "subject") -> Row:
    """An edit's prompt as tokens, after a context; the token that is edited stands as that of the subject.

    No text's first token is edited: whatever it is, models make an attention sink of it, with a key that all texts have
    in common. Where the subject ends there, the token after it is edited.

    Raises:
        EditError: The tokenizer does not say where the subject ends, or the prompt is one token alone.
    """
    found = row(base.vocabulary, edit.prompt, answer, edit.subject, before, edit.place)
    alone = row(base.vocabulary, edit.prompt, "", edit.subject, "", edit.place) if before else found
    if alone.prompt < 2:
        raise EditError(f"edit {edit.id}: the prompt {edit.prompt!r} is one token", "ask in more words")
    return replace(found, subject=found.prompt - 1 if at == "prompt" else found.subject + (alone.subject == 0))


def keys_at(
    base: Base,
    layout: Layout,
    layers: Sequence[int],
    edits: Sequence[Edit],
    before: Sequence[str],
    at: Site = "subject",
) -> dict[int, Tensor]:
    """Keys of the edits at each layer, ``(E, d_in)``, float64.

    Args:
        before: Contexts; none of them leaves the plain prompt's key.
    """
    plain = _at_subject(base, layout, layers, [prompt_row(base, edit, at=at) for edit in edits])
    if not before:
        return plain
    rows = [prompt_row(base, edit, context, at=at) for edit in edits for context in before]
    varied = _at_subject(base, layout, layers, rows)
    shape = (len(edits), len(before), -1)
    return {layer: (plain[layer] + varied[layer].reshape(shape).mean(1)) / 2 for layer in layers}


def hidden_at(base: Base, layout: Layout, layer: int, edits: Sequence[Edit], at: Site = "subject") -> Tensor:
    """The residual stream after a layer at the edited token of each plain prompt, ``(E, d_out)``, float64."""
    rows = [prompt_row(base, edit, at=at) for edit in edits]
    found = _collected(base, layout, rows, {layer: layout.block(layer)}, inputs=False)
    return found[layer]


def _at_subject(base: Base, layout: Layout, layers: Sequence[int], rows: Sequence[Row]) -> dict[int, Tensor]:
    return _collected(base, layout, rows, {layer: layout.map(layer) for layer in layers}, inputs=True)


@torch.inference_mode()
def _collected(
    base: Base, layout: Layout, rows: Sequence[Row], modules: dict[int, torch.nn.Module], *, inputs: bool
) -> dict[int, Tensor]:
    found: dict[int, list[Tensor]] = {key: [] for key in modules}
    for begin in range(0, len(rows), _ROWS):
        batch = rows_of(rows[begin : begin + _ROWS], base.vocabulary.end_of_text).to(base.model.device)
        places = (torch.arange(len(batch.ids), device=batch.ids.device), batch.subject)

        def take(key: int, entered: Tensor, left: Tensor, places: tuple[Tensor, Tensor] = places) -> None:
            found[key].append(host((entered if inputs else left)[places]))

        run_to(layout, modules, take, input_ids=batch.ids, attention_mask=batch.mask)
    return {key: torch.cat(parts) for key, parts in found.items()}
