"""What GRACE and WISE share: a memory beside one map of a model, at work while it is attached, saved as a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from potluck.compose.base import Base
from potluck.edit.contexts import prompt_row
from potluck.edit.facts import Edit
from potluck.edit.layout import Layout, host, layout_of, run_to
from potluck.edit.prefix_cache import Tails, tails_of
from potluck.edit.prompts import Row, Rows, row, rows_of
from potluck.files import appearing, storing, write_text
from potluck.models.export import save_like
from potluck.models.memory import EditedConfig, EditedForCausalLM, Memory, install

RECORD = "memory.json"
_ROWS = 64  # in a batch


class SideMemory(Protocol):
    """A memory of edits, whatever its kind."""

    @property
    def layer(self) -> int:
        """Of the map."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits that it holds."""

    def module(self) -> Memory:
        """What is at work in the model."""

    def facts(self) -> dict[str, Any]:
        """What a record says of it, beside its tensors."""


@contextmanager
def attached(base: Base, memory: SideMemory) -> Iterator[None]:
    """Within, the model answers with the memory."""
    module = memory.module().to(base.model.device)
    detach = install(base.model, layout_of(base.model).path(memory.layer), module)
    try:
        yield
    finally:
        detach()


def save_with_memory(base: Base, memory: SideMemory, folder: Path) -> None:
    """A new folder that `load_base` opens with the same answers, and that plain `transformers` refuses.

    Raises:
        StorageError: There is something there already, or it cannot be written.
    """
    layout, module = layout_of(base.model), memory.module()
    table = base.model.config.to_dict()
    config = EditedConfig(
        base=table,
        path=layout.path(memory.layer),
        kind=type(module).__name__.lower(),
        entries=len(next(module.buffers())),
        d_in=layout.d_in,
        d_out=layout.d_out,
        vocab_size=base.model.config.vocab_size,
        hidden_size=layout.d_out,
        num_hidden_layers=layout.count,
        max_position_embeddings=getattr(base.model.config, "max_position_embeddings", 0),
    )
    model = EditedForCausalLM(config)
    model.edited.load_state_dict(base.model.state_dict())
    model.memory.load_state_dict(module.state_dict())
    model.generation_config = base.model.generation_config
    record = {"kind": config.kind, "layer": memory.layer, **memory.facts()}
    record["edits"] = [asdict(edit) for edit in memory.edits]
    with appearing(folder) as being_written, storing(folder):
        save_like(model, Path(base.place), being_written)
        write_text(being_written / RECORD, json.dumps(record, indent=1, ensure_ascii=False))


@dataclass(frozen=True)
class Asked:
    """Edits as rows of tokens at one map.

    Attributes:
        rows: Each edit's prompt after each context, with its target.
        keys: The map's inputs, ``(B, T, d_in)``.
        plain: The map's outputs, ``(B, T, d_out)``.
        tails: The rows from the last token of each prompt on, above the map's layer.
    """

    rows: Rows
    keys: Tensor
    plain: Tensor
    tails: Tails
    base: Base

    def nll(self, added: Tensor) -> Tensor:
        """Mean cross-entropy of each row's target, ``(B,)``, with something added to what the map gives.

        Args:
            added: From the last token of each prompt on, ``(B, S, d_out)``.
        """
        return self.tails.nll(self.base, self.tails.ended(self.tails.stream + added))


def asked(
    base: Base, layout: Layout, layer: int, edits: Sequence[Edit], before: Sequence[str], onward: int = 0
) -> Asked:
    """Rows for a search at one map.

    Args:
        before: Contexts that each prompt is tried with, beside none.
        onward: Tokens that the model writes after each target, which are in the rows but not among the labels.
    """
    rows = [prompt_row(base, edit, context, edit.target, "prompt") for edit in edits for context in ("", *before)]
    labels = rows_of(rows, 0).labels
    longer = continued(base, rows, onward) if onward else rows
    batch = rows_of(longer, base.vocabulary.end_of_text)
    batch = replace(batch, labels=pad(labels, (0, batch.ids.shape[1] - labels.shape[1]), value=-100))
    batch = batch.to(base.model.device)
    found: list[Tensor] = []
    base.model.requires_grad_(False)
    run_to(
        layout,
        {layer: layout.map(layer)},
        lambda _, keys, plain: found.extend((keys, plain)),
        input_ids=batch.ids,
        attention_mask=batch.mask,
    )
    return Asked(batch, found[0], found[1], tails_of(base, layout, layer, batch, batch.last), base)


@torch.inference_mode()
def continued(base: Base, rows: Sequence[Row], count: int) -> list[Row]:
    """Rows that the model went on with for some tokens, greedily; those of one length together."""
    lengths: dict[int, list[int]] = {}
    for place, one in enumerate(rows):
        lengths.setdefault(len(one.ids), []).append(place)
    found = list(rows)
    for places in lengths.values():
        ids = torch.tensor([rows[place].ids for place in places], device=base.model.device)
        step, cache = ids, None
        for _ in range(count):
            out = base.model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
        for place, whole in zip(places, ids.tolist(), strict=True):
            found[place] = replace(rows[place], ids=tuple(whole))
    return found


def keys_of_texts(base: Base, layout: Layout, layer: int, texts: Sequence[str]) -> list[Tensor]:
    """The map's inputs at every token of each text, ``(N, d_in)``, float32."""
    found: list[Tensor] = []
    for begin in range(0, len(texts), _ROWS):
        rows = [row(base.vocabulary, text) for text in texts[begin : begin + _ROWS]]
        batch = rows_of(rows, base.vocabulary.end_of_text).to(base.model.device)

        def take(key: int, keys: Tensor, output: Tensor, batch: Rows = batch) -> None:
            found.extend(own[mask].float() for own, mask in zip(host(keys), batch.mask.cpu().bool(), strict=True))

        with torch.inference_mode():
            run_to(layout, {layer: layout.map(layer)}, take, input_ids=batch.ids, attention_mask=batch.mask)
    return found
