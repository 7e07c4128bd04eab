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
from potluck.edit.layout import Layout
from potluck.edit.prefix_cache import Tails, tails_of
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
        essence: Weight of ``KL(now ‖ before)`` after "SUBJECT is a", where the subject's last token is edited.
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
    asked, essences = _rows(base, edits, before, at)
    batch = rows_of([*asked, *essences], base.vocabulary.end_of_text).to(base.model.device)
    base.model.requires_grad_(False)
    tails = tails_of(base, layout, layer, batch, batch.subject)
    each = torch.arange(len(edits), device=batch.ids.device)
    owner = torch.cat([each.repeat_interleave(1 + len(before)), each][: 1 + bool(essences)])
    start = hidden_at(base, layout, layer, edits, at).to(batch.ids.device, torch.float32)
    size = start.norm(dim=1, keepdim=True)
    unit = size / start.shape[1] ** 0.5
    delta = torch.zeros_like(start, requires_grad=True)  # in units
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    usual: Tensor | None = None
    done = torch.zeros(len(edits), dtype=torch.bool, device=batch.ids.device)
    for _ in range(settings.steps):
        hidden = torch.cat([tails.stream[:, :1] + (delta * unit)[owner][:, None], tails.stream[:, 1:]], 1)
        nll, after = _measured(base, tails, batch, hidden, len(asked))
        usual = after.detach() if usual is None else usual  # δ is 0 at first
        kl = kl_div(usual, after, reduction="none", log_target=True).sum(1)
        nll = nll.view(len(edits), -1).mean(1)
        loss = nll + settings.decay * ((delta * unit) / size).square().sum(1)
        if essences:
            loss = loss + settings.essence * kl
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
    if at == "prompt":  # what is said at an edited prompt's end is said nowhere else
        return asked, []
    essences = [row(base.vocabulary, f"{edit.subject} is a", subject=edit.subject) for edit in edits]
    return asked, [replace(essence, subject=max(1, essence.subject)) for essence in essences]


def _measured(base: Base, tails: Tails, batch: Rows, stream: Tensor, asked: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each asked row's answer, and log-probabilities at the end of the other rows."""
    hidden = tails.ended(stream)
    others = torch.arange(asked, len(hidden), device=hidden.device)
    head = base.model.get_output_embeddings()
    after: Tensor = head(hidden[others, (batch.last - batch.subject)[asked:]]).float()
    return tails.nll(base, hidden)[:asked], after.log_softmax(-1)
