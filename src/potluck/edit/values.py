"""What a layer should give at the subject, so that the model answers as the edit says: all edits of a batch at once.

``z = h + δ`` on the residual stream, with δ found by Adam for every edit side by side; nothing is shared between edits,
so that the result is that of one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from potluck.compose.base import Base
from potluck.edit.contexts import Site, hidden_at, prompt_row
from potluck.edit.facts import Edit
from potluck.edit.layout import Layout, from_layer
from potluck.edit.prompts import Row, Rows, row, rows_of
from potluck.errors import EditError


@dataclass(frozen=True)
class ValueSettings:
    """How δ is found.

    Attributes:
        steps: Of Adam, at most.
        learning_rate: Of Adam, for δ in units of ``‖h‖ / √d``, so that it fits every size of model.
        clamp: ``‖δ‖ ≤ clamp ‖h‖``.
        decay: Weight of ``‖δ‖² / ‖h‖²``.
        essence: Weight of ``KL(now ‖ before)`` after "SUBJECT is a".
        enough: An edit whose loss is below it stays as it is.
        batch: Edits side by side.
    """

    steps: int = 40
    learning_rate: float = 0.5
    clamp: float = 4.0
    decay: float = 0.05
    essence: float = 0.0625
    enough: float = 0.05
    batch: int = 50


def targets(
    base: Base,
    layout: Layout,
    layer: int,
    edits: Sequence[Edit],
    before: Sequence[str],
    settings: ValueSettings,
    at: Site = "subject",
) -> Tensor:
    """``z``, ``(E, d_out)``, float64: what the residual stream after ``layer`` should be at each edited token.

    ``loss = NLL(target; prompt and contexts) + essence KL + decay ‖δ‖² / ‖h‖²`` (arXiv 2202.05262, 2210.07229).

    Args:
        before: Contexts that each prompt is tried with, beside none.

    Raises:
        EditError: The optimisation diverged.
    """
    found = [
        _targets(base, layout, layer, edits[begin : begin + settings.batch], before, settings, at)
        for begin in range(0, len(edits), settings.batch)
    ]
    return torch.cat(found)


def _targets(
    base: Base,
    layout: Layout,
    layer: int,
    edits: Sequence[Edit],
    before: Sequence[str],
    settings: ValueSettings,
    at: Site,
) -> Tensor:
    model = base.model
    asked, essences = _rows(base, edits, before, at)
    batch = rows_of([*asked, *essences], base.vocabulary.end_of_text).to(model.device)
    owner = torch.arange(len(edits), device=model.device)
    owner = torch.cat([owner.repeat_interleave(1 + len(before)), owner])
    start = hidden_at(base, layout, layer, edits, at).to(model.device, torch.float32)
    size = start.norm(dim=1, keepdim=True)
    unit = size / start.shape[1] ** 0.5
    delta = torch.zeros_like(start, requires_grad=True)  # in units
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    places, usual = (torch.arange(len(batch.ids), device=model.device), batch.subject), None
    done = torch.zeros(len(edits), dtype=torch.bool, device=model.device)
    model.requires_grad_(False)

    def run() -> object:
        return model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)

    below, resumed = from_layer(layout, layer, run)
    for _ in range(settings.steps):
        hidden = below.index_put(places, (delta * unit)[owner].to(below.dtype), accumulate=True)
        nll, after = _measured(base, batch, resumed(hidden), len(asked))
        usual = after.detach() if usual is None else usual  # δ is 0 at first
        kl = kl_div(usual, after, reduction="none", log_target=True).sum(1)
        nll = nll.view(len(edits), -1).mean(1)
        loss = nll + settings.essence * kl + settings.decay * ((delta * unit) / size).square().sum(1)
        if not torch.isfinite(loss).all():
            raise EditError("the answers' loss became NaN or infinite while edits were sought", "lower the rate")
        done |= loss.detach() < settings.enough
        if bool(done.all()):
            break
        (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
        held = delta.detach()[done].clone()
        adam.step()
        with torch.no_grad():
            delta.mul_((settings.clamp * size / (delta * unit).norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
            delta[done] = held
    z: Tensor = start + (delta * unit).detach()
    return z.to("cpu", torch.float64)


def _rows(base: Base, edits: Sequence[Edit], before: Sequence[str], at: Site) -> tuple[list[Row], list[Row]]:
    asked = [prompt_row(base, edit, context, edit.target, at) for edit in edits for context in ("", *before)]
    essences = [row(base.vocabulary, f"{edit.subject} is a", subject=edit.subject) for edit in edits]
    if at == "prompt":  # an edited prompt's end says nothing of the subject elsewhere
        essences = [replace(essence, subject=0) for essence in essences]
    return asked, essences


def _measured(base: Base, batch: Rows, hidden: Tensor, asked: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each asked row's answer, and log-probabilities at the end of the other rows.

    Only where something is foretold is the whole vocabulary looked at.
    """
    head = base.model.get_output_embeddings()
    places = batch.labels[:asked] != -100
    rows = torch.arange(asked, device=places.device)[:, None].expand_as(places)[places]
    logits = head(hidden[:asked][places]).float()
    nats = torch.nn.functional.cross_entropy(logits, batch.labels[:asked][places], reduction="none")
    count = places.sum(1).clamp(min=1)
    nll: Tensor = torch.zeros(asked, device=nats.device).index_add(0, rows, nats) / count
    last = batch.last[asked:]
    after: Tensor = head(hidden[torch.arange(asked, len(hidden), device=last.device), last]).float()
    return nll, after.log_softmax(-1)
