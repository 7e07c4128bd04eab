"""ROME, MEMIT and AlphaEdit on one model: edits written into weights, each of which can be taken back.

What a batch of edits did is kept as keys and residuals, so that ``W = W₀ + Σ Δ`` is made again without those that are
reverted. Reverting all gives the old weights bit for bit. Reverting one of several is exact where one layer is edited;
with several layers, or later batches, their keys and residuals were measured while it was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.edit.closed_form import alphaedit_update, asked_in, memit_update, null_space, rome_update, sums
from potluck.edit.contexts import Site, contexts, hidden_at, keys_at
from potluck.edit.facts import Edit, checked_edits
from potluck.edit.layout import Layout, layout_of
from potluck.edit.moments import moment_of
from potluck.edit.values import ValueSettings, targets
from potluck.errors import EditError

Method = Literal["rome", "memit", "alphaedit"]


@dataclass(frozen=True)
class WeightSettings:
    """How edits are written.

    Attributes:
        layers: Whose maps are edited; ROME has one.
        at: Whose last token is edited, the subject's as in the papers, or the prompt's.
        moment_weight: λ of MEMIT, for ``C = E[k kᵀ]``: how many tokens of text weigh as much as one edit.
        null_weight: λ of AlphaEdit, in units of what a key of the batch has in the free directions, ``‖U₀ᵀ k‖²``: of a
            single edit ``1 / (1 + λ)`` is written.
        free: Share of all directions, those that the text uses least, in which AlphaEdit writes.
        remember: Whether MEMIT adds the keys of earlier edits to C, against forgetting (CollabEdit); AlphaEdit does.
        ridge: ROME's, of the median diagonal of C.
        seed: Of the contexts.
        values: How target values are found.
    """

    method: Method = "memit"
    layers: tuple[int, ...] = (1, 2)
    at: Site = "subject"
    moment_weight: float = 8000.0
    null_weight: float = 2.0
    free: float = 0.75
    remember: bool = True
    ridge: float = 0.03
    seed: int = 0
    values: ValueSettings = field(default_factory=ValueSettings)


@dataclass(frozen=True)
class Written:
    """One batch, as it was written.

    Attributes:
        keys: Of each layer, ``(E, d_in)``.
        residuals: Of each layer, ``(E, d_out)``.
        after: Keys once all layers were written: what later edits have to respect.
    """

    edits: tuple[Edit, ...]
    keys: Mapping[int, Tensor]
    residuals: Mapping[int, Tensor]
    after: Mapping[int, Tensor]

    def without(self, ids: frozenset[str]) -> Written:
        """The batch as if these edits had not been in it."""
        kept = [i for i, edit in enumerate(self.edits) if edit.id not in ids]
        keys, residuals, after = ({layer: tensor[kept] for layer, tensor in part.items()} for part in self._parts())
        return Written(tuple(self.edits[i] for i in kept), keys, residuals, after)

    def _parts(self) -> tuple[Mapping[int, Tensor], ...]:
        return self.keys, self.residuals, self.after


@dataclass
class WeightEditor:
    """An editor of one model's weights, with all that it did.

    Attributes:
        base: The model; its weights are the edited ones.
        moments: Of the text that shall stay as it is (`potluck.edit.moments`), measured on the unedited model.
        originals: The edited weights as they were, ``(d_out, d_in)``.
        written: Batches in order.
        held: Of each layer, ``Kᵀ K`` of prompts whose answers shall stay, beside what the text's moments protect.
    """

    base: Base
    moments: Statistics
    settings: WeightSettings
    originals: Mapping[int, Tensor]
    written: list[Written] = field(default_factory=list)
    held: Mapping[int, Tensor] = field(default_factory=dict)
    _free: dict[tuple[int, float], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        """Where the model keeps facts."""
        return layout_of(self.base.model)

    def write(self, edits: Sequence[Edit]) -> Written:
        """Make edits true; ROME writes one after the other, the others all at once.

        Raises:
            EditError: They contradict each other, one has the id of an earlier edit, or no solution was found; the
                model is as it was.
        """
        edits = checked_edits(edits, "these edits")
        for twice in {edit.id for edit in self.edits} & {edit.id for edit in edits}:
            raise EditError(f"there is an edit {twice} already", "give it another id, or revert the earlier one")
        batches = [[edit] for edit in edits] if self.settings.method == "rome" else [list(edits)]
        before = len(self.written)
        try:
            for batch in batches:
                self._write(batch)
        except BaseException:
            del self.written[before:]
            self._restore()
            raise
        return self.written[-1]

    def revert(self, ids: Sequence[str]) -> None:
        """Take edits back.

        Raises:
            EditError: One of them was never made.
        """
        known = {edit.id for edit in self.edits}
        missing = sorted(set(ids) - known)
        if missing:
            raise EditError(f"there is no edit {', '.join(missing)}", f"there are {', '.join(sorted(known)[:20])}")
        gone = frozenset(ids)
        left = [batch.without(gone) for batch in self.written]
        self.written[:] = [batch for batch in left if batch.edits]
        self._restore()

    @property
    def edits(self) -> list[Edit]:
        """All edits that hold."""
        return [edit for batch in self.written for edit in batch.edits]

    def _write(self, edits: list[Edit]) -> None:
        settings, layout = self.settings, self.layout
        before = contexts(self.base, settings.seed)
        z = targets(self.base, layout, settings.layers[-1], edits, before, settings.values, settings.at)
        keys: dict[int, Tensor] = {}
        residuals: dict[int, Tensor] = {}
        past = {layer: self._past(layer) for layer in settings.layers}
        for place, layer in enumerate(settings.layers):
            now = hidden_at(self.base, layout, settings.layers[-1], edits, settings.at)
            keys |= keys_at(self.base, layout, (layer,), edits, before, settings.at)
            residuals[layer] = (z - now) / (len(settings.layers) - place)
            add(layout, layer, self._solved(layer, keys[layer], residuals[layer], past[layer]))
        after = keys_at(self.base, layout, settings.layers, edits, before, settings.at)
        self.written.append(Written(tuple(edits), keys, residuals, after))

    def _restore(self) -> None:
        """Make the weights of the originals and what was written."""
        layout = self.layout
        for layer, original in self.originals.items():
            past = self._held(layer)
            put(layout, layer, original)
            for batch in self.written:
                add(layout, layer, self._solved(layer, batch.keys[layer], batch.residuals[layer], past))
                past += sums(batch.after[layer], batch.residuals[layer])[1]

    def _held(self, layer: int) -> Tensor:
        none = torch.zeros(self.layout.d_in, self.layout.d_in, dtype=torch.float64)
        return self.held.get(layer, none).clone()

    def _past(self, layer: int) -> Tensor:
        past = self._held(layer)
        for batch in self.written:
            past += batch.after[layer].T @ batch.after[layer]
        return past

    def _solved(self, layer: int, keys: Tensor, residuals: Tensor, past: Tensor) -> Tensor:
        settings = self.settings
        moment = moment_of(self.moments, self.moments.base_hash, self.layout, layer)
        if settings.method == "rome":
            return rome_update(keys[0], residuals[0], moment, settings.ridge)
        m, g = sums(keys, residuals)
        if settings.method == "alphaedit":
            if (layer, settings.free) not in self._free:
                self._free[layer, settings.free] = null_space(moment, settings.free)
            free = self._free[layer, settings.free]
            return alphaedit_update(m, g, past, free, settings.null_weight * asked_in(g, free, len(keys)))
        return memit_update(m, g + past * settings.remember, moment, settings.moment_weight)


def weight_editor(base: Base, moments: Statistics, settings: WeightSettings, hold: Sequence[Edit] = ()) -> WeightEditor:
    """An editor that has not edited yet.

    Args:
        hold: Prompts, with their subjects, whose answers shall stay; each counts as much as an edit.

    Raises:
        ModelError: The model's layout is not known.
        EditError: The layers are not there, ROME was given several, or the moments are of another model.
    """
    layout = layout_of(base.model)
    layers = layout.check_layers(settings.layers)
    if settings.method == "rome" and len(layers) != 1:
        raise EditError(f"rome edits one layer, not {len(layers)}", "name one, for example with `potluck edit locate`")
    for layer in layers:
        moment_of(moments, base.content_hash, layout, layer)
    originals = {layer: layout.weight(layer).cpu().clone() for layer in layers}
    return WeightEditor(base, moments, settings, originals, held=held_keys(base, layers, hold, settings.at))


def held_keys(base: Base, layers: Sequence[int], hold: Sequence[Edit], at: Site) -> dict[int, Tensor]:
    """``Kᵀ K`` of prompts at each layer, ``(d_in, d_in)``; of none there is nothing."""
    keys = keys_at(base, layout_of(base.model), layers, hold, (), at) if hold else {}
    return {layer: k.T @ k for layer, k in keys.items()}


def add(layout: Layout, layer: int, delta: Tensor) -> None:
    """``W ← W + Δ``, summed in float64."""
    weight = layout.weight(layer)
    weight.copy_((weight.to("cpu", torch.float64) + delta).to(weight.dtype))


def put(layout: Layout, layer: int, value: Tensor) -> None:
    """``W ← value``."""
    layout.weight(layer).copy_(value)
