"""GRACE (arXiv 2211.11031): a codebook beside one map; what is near a key gets its value, all else stays as it was.

Edits never touch weights, and each can be taken back. What is asked in other words is seldom near the key: expect no
rephrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from potluck.compose.base import Base
from potluck.edit.facts import Edit, checked_edits
from potluck.edit.layout import layout_of
from potluck.edit.side_memory import asked
from potluck.errors import EditError
from potluck.models.memory import Codebook


@dataclass(frozen=True)
class GraceSettings:
    """How edits are put into the codebook.

    Attributes:
        radius: Of a new key, as a share of its length.
        steps, learning_rate: Of Adam, for values in units of ``‖y‖ / √d``; all edits of a batch side by side.
        enough: A value whose loss is below it is left as it is.
    """

    radius: float = 0.5
    steps: int = 60
    learning_rate: float = 0.5
    enough: float = 0.02


@dataclass(frozen=True)
class GraceMemory:
    """A codebook.

    Attributes:
        layer: Of the map.
        keys, values, radii: ``(K, d_in)``, ``(K, d_out)``, ``(K,)``.
        edits: Of each entry, in the same order.
    """

    layer: int
    settings: GraceSettings
    keys: Tensor
    values: Tensor
    radii: Tensor
    edits: tuple[Edit, ...] = ()

    def module(self) -> Codebook:
        """What is at work in the model."""
        book = Codebook(len(self.keys), self.keys.shape[1], self.values.shape[1])
        book.load_state_dict({"keys": self.keys, "values": self.values, "radii": self.radii})
        return book

    def facts(self) -> dict[str, Any]:
        """Settings."""
        return {"settings": asdict(self.settings)}


def grace_memory(base: Base, layer: int, settings: GraceSettings | None = None) -> GraceMemory:
    """An empty codebook.

    Raises:
        ModelError: The model's layout is not known.
        EditError: It has no such layer.
    """
    layout = layout_of(base.model)
    layout.check_layers((layer,))
    empty = (torch.zeros(0, layout.d_in), torch.zeros(0, layout.d_out), torch.zeros(0))
    return GraceMemory(layer, settings or GraceSettings(), *empty)


def edit_with_grace(base: Base, memory: GraceMemory, edits: Sequence[Edit]) -> GraceMemory:
    """The memory with further edits.

    Raises:
        EditError: Edits contradict each other, or one has the id of an earlier one.
    """
    edits = checked_edits(edits, "these edits")
    for twice in {edit.id for edit in memory.edits} & {edit.id for edit in edits}:
        raise EditError(f"there is an edit {twice} already", "give it another id, or take the earlier one back")
    keys, values = _entries(base, memory, edits)
    for edit, key, value in zip(edits, keys, values, strict=True):
        memory = _with_entry(memory, edit, key, value)
    return memory


def without(memory: GraceMemory, ids: Sequence[str]) -> GraceMemory:
    """The memory without some edits; radii that they made smaller stay smaller.

    Raises:
        EditError: One of them is not in it.
    """
    missing = sorted(set(ids) - {edit.id for edit in memory.edits})
    if missing:
        raise EditError(f"there is no edit {', '.join(missing)}")
    kept = [i for i, edit in enumerate(memory.edits) if edit.id not in ids]
    parts = (memory.keys[kept], memory.values[kept], memory.radii[kept])
    return GraceMemory(memory.layer, memory.settings, *parts, tuple(memory.edits[i] for i in kept))


def _entries(base: Base, memory: GraceMemory, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Keys, ``(E, d_in)``, and values, ``(E, d_out)``, found by Adam for all edits at once."""
    settings, layout = memory.settings, layout_of(base.model)
    rows = asked(base, layout, memory.layer, edits, ())
    at = (torch.arange(len(edits), device=rows.keys.device), rows.rows.last)
    start, tokens = rows.plain[at], rows.tails.stream.shape[1]
    unit = start.norm(dim=1, keepdim=True) / start.shape[1] ** 0.5
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    done = torch.zeros(len(edits), dtype=torch.bool, device=start.device)
    for _ in range(settings.steps):
        nll = rows.nll(pad((delta * unit)[:, None], (0, 0, 0, tokens - 1)))
        done |= nll.detach() < settings.enough
        if bool(done.all()):
            break
        (delta.grad,) = torch.autograd.grad(nll.sum(), delta)
        held = delta.detach()[done].clone()
        adam.step()
        with torch.no_grad():
            delta[done] = held
    return rows.keys[at].float().cpu(), (start + (delta * unit).detach()).float().cpu()


def _with_entry(memory: GraceMemory, edit: Edit, key: Tensor, value: Tensor) -> GraceMemory:
    """Add a key: a near one shrinks if it answers otherwise, and reaches further if it answers alike."""
    radius = memory.settings.radius * float(key.norm())
    radii = memory.radii.clone()
    if len(radii):
        distance, j = (found.item() for found in (memory.keys - key).norm(dim=1).min(0))
        near = int(j)
        if distance <= radius + float(radii[near]):
            if memory.edits[near].target == edit.target:
                radii[near] = max(float(radii[near]), distance)
            else:
                radii[near] = min(float(radii[near]), distance / 2 * (1 - 1e-4))
                radius = min(radius, distance / 2)
    return replace(
        memory,
        keys=torch.cat([memory.keys, key[None]]),
        values=torch.cat([memory.values, value[None]]),
        radii=torch.cat([radii, torch.tensor([radius])]),
        edits=(*memory.edits, edit),
    )
