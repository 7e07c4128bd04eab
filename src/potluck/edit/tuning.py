"""Plain fine-tuning on the edits, of an edited map or by LoRA: the baselines that editing has to beat.

Both see each edit's prompt, with and without contexts before it, and its target. What they change is kept only as a
whole: single edits cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potluck.compose.adapter import Factors
from potluck.compose.base import Base
from potluck.compose.lora import LowRank, added
from potluck.compose.training import only_training
from potluck.edit.contexts import contexts, prompt_row
from potluck.edit.facts import Edit, checked_edits
from potluck.edit.layout import layout_of
from potluck.edit.prompts import answer_nll, logits_of, rows_of
from potluck.errors import EditError

_ROWS = 64  # in a batch


@dataclass(frozen=True)
class Tuning:
    """How it is trained.

    Attributes:
        layers: Whose maps learn.
        rank: Of LoRA; 0 trains the maps themselves ("FT").
        steps: Of AdamW, at most; it ends when the mean loss is below ``enough``.
        seed: Of the contexts and LoRA's start.
    """

    layers: tuple[int, ...] = (1,)
    rank: int = 0
    steps: int = 25
    learning_rate: float = 5e-4
    enough: float = 0.02
    seed: int = 0


def fine_tune(base: Base, edits: Sequence[Edit], settings: Tuning) -> None:
    """Train the model in place until it answers the edits.

    Raises:
        EditError: Edits contradict each other, a layer is not there, or the loss became NaN; the model is as it was.
    """
    edits = checked_edits(edits, "these edits")
    layout = layout_of(base.model)
    layers = layout.check_layers(settings.layers)
    draw = torch.Generator().manual_seed(settings.seed)
    device = base.model.device
    additions = {layer: _addition(layout.d_in, layout.d_out, settings.rank, draw).to(device) for layer in layers}
    part = [parameter for addition in additions.values() for parameter in addition.parameters()]
    at_work = added(base.model, {layout.path(layer): addition for layer, addition in additions.items()})
    with at_work, only_training(base.model, part):
        _train(base, edits, settings, part)
    for layer, addition in additions.items():
        layout.weight(layer).add_(_delta(addition))


def _train(base: Base, edits: Sequence[Edit], settings: Tuning, part: Sequence[nn.Parameter]) -> None:
    before = ("", *contexts(base, settings.seed))
    asked = [prompt_row(base, edit, context, edit.target) for edit in edits for context in before]
    batches = [
        rows_of(asked[begin : begin + _ROWS], base.vocabulary.end_of_text).to(base.model.device)
        for begin in range(0, len(asked), _ROWS)
    ]
    optimizer = torch.optim.AdamW(part, lr=settings.learning_rate, weight_decay=0.0)
    for _ in range(settings.steps):
        total = 0.0
        for batch in batches:
            loss = answer_nll(logits_of(base.model, batch), batch.labels).mean()
            if not torch.isfinite(loss):
                raise EditError("the loss became NaN or infinite", "lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        if total / len(batches) < settings.enough:
            return


def _addition(d_in: int, d_out: int, rank: int, draw: torch.Generator) -> nn.Module:
    """What is trained beside a map: a whole matrix that is 0, or low-rank factors of which one is 0."""
    if rank:
        down = (2 * torch.rand(rank, d_in, generator=draw) - 1) / d_in**0.5
        return LowRank(Factors(down, torch.zeros(d_out, rank)), scale=2.0)
    whole = nn.Linear(d_in, d_out, bias=False)
    nn.init.zeros_(whole.weight)
    return whole


def _delta(addition: nn.Module) -> Tensor:
    if isinstance(addition, LowRank):
        return addition.scale * addition.up.detach() @ addition.down.detach()
    assert isinstance(addition, nn.Linear)
    return addition.weight.detach()
