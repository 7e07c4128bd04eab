"""WISE (arXiv 2405.14768): edits in side weights beside one map, at work only where a text asks for one of them.

Edits are cut into shards, each with entries of its own to write to (knowledge sharding). Of a shard's Δ is asked that
the targets follow where a prompt ends, that ``‖Δ x‖`` is large there and small on everything else: on texts that the
model writes, on the same prompts about others, real and invented, and from the last token of an answer on, where the
unedited model goes on with the text. Three things differ
from the paper. Margins are in units of what the map gives on text that the model writes itself, and the threshold is
put between both sides, so that nothing depends on the size of a model. Whether an edit is asked for is decided at a
token, and held for the tokens of an answer, for each text of a batch: the paper's memory stays on for all that follows,
and a model that has said its answer says it again. And a shard is trained on all its edits together, with Adam: the
participant has them, so none has to be forgotten for another; one that is taken back leaves no trace.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from potluck.compose.base import Base
from potluck.compose.merging.rules import Ties, merged
from potluck.edit.contexts import contexts
from potluck.edit.facts import Edit, checked_edits
from potluck.edit.invented_names import stranger_names
from potluck.edit.layout import layout_of
from potluck.edit.side_memory import Asked, asked, keys_of_texts
from potluck.errors import EditError
from potluck.models.memory import Shards

_STRIDE = 4  # every fourth token of the quiet texts is looked at in a step


@dataclass(frozen=True)
class WiseSettings:
    """How edits are put into side weights.

    Attributes:
        shard: Edits in one shard, at most.
        density: ρ, share of the map's entries that a shard may change.
        mode: ``retrieve``: the shard that recognises a text best; ``merge``: all shards as one, by TIES.
        inside, outside: ``‖Δ x‖`` is at least ``inside`` where an edit is asked for and at most ``outside`` elsewhere,
            in units of the mean ``‖W x‖`` but for first tokens, where models have attention sinks.
        margin: Weight of both.
        steps, learning_rate: Of Adam.
        enough: A shard whose loss is below it is left as it is.
        contexts: Beginnings of texts that each prompt is tried after, beside none.
        quiet: Texts that the model writes, to stand for all that is not asked for.
        near: Names of others that each prompt is tried with, to stand for what looks like it.
        onward: Tokens after each answer that the unedited model writes, to stand for how a text goes on.
        seed: Of masks, contexts and these texts.
    """

    shard: int = 25
    density: float = 0.5
    mode: Literal["retrieve", "merge"] = "retrieve"
    inside: float = 1.0
    outside: float = 0.2
    margin: float = 5.0
    steps: int = 60
    learning_rate: float = 1e-2
    enough: float = 0.02
    contexts: int = 1
    quiet: int = 150
    near: int = 4
    onward: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Shard:
    """Side weights of some edits.

    Attributes:
        delta: ``W' − W``, ``(d_out, d_in)``, zero outside its mask.
        threshold: ε: ``‖Δ x‖`` from which a text is taken to ask for one of them.
        span: Tokens of the longest target: for so many it is at work.
    """

    delta: Tensor
    threshold: float
    edits: tuple[Edit, ...]
    span: int


@dataclass(frozen=True)
class WiseMemory:
    """All shards.

    Attributes:
        layer: Of the map.
        quiet: Texts that the model wrote, to stand for all that is not asked for, and the map's inputs, once drawn.
    """

    layer: int
    settings: WiseSettings
    shards: tuple[Shard, ...] = ()
    quiet: tuple[tuple[str, Tensor], ...] = field(default=(), repr=False, compare=False)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits that it holds."""
        return tuple(edit for shard in self.shards for edit in shard.edits)

    def module(self) -> Shards:
        """What is at work in the model."""
        deltas, thresholds, spans = ([getattr(s, n) for s in self.shards] for n in ("delta", "threshold", "span"))
        if self.settings.mode == "merge" and len(deltas) > 1:
            deltas, thresholds, spans = [ties(deltas)], [min(thresholds)], [max(spans)]
        size = self.shards[0].delta.shape if self.shards else (0, 0)
        module = Shards(len(deltas), size[1], size[0])
        if deltas:
            held = {"thresholds": torch.tensor(thresholds), "spans": torch.tensor(spans)}
            module.load_state_dict({"deltas": torch.stack(deltas), **held})
        return module

    def facts(self) -> dict[str, Any]:
        """Settings, and how many edits each shard has."""
        return {"settings": asdict(self.settings), "shards": [len(shard.edits) for shard in self.shards]}


def wise_memory(base: Base, layer: int, settings: WiseSettings | None = None) -> WiseMemory:
    """An empty memory.

    Raises:
        ModelError: The model's layout is not known.
        EditError: It has no such layer.
    """
    layout_of(base.model).check_layers((layer,))
    return WiseMemory(layer, settings or WiseSettings())


def edit_with_wise(base: Base, memory: WiseMemory, edits: Sequence[Edit]) -> WiseMemory:
    """The memory with further edits: the newest shard is filled and trained anew, then others begin.

    Raises:
        EditError: Edits contradict each other, one has the id of an earlier one, or training diverged.
    """
    edits = checked_edits(edits, "these edits")
    for twice in {edit.id for edit in memory.edits} & {edit.id for edit in edits}:
        raise EditError(f"there is an edit {twice} already", "give it another id, or take the earlier one back")
    memory = memory if memory.quiet else replace(memory, quiet=_quiet(base, memory))
    shards, waiting = list(memory.shards), list(edits)
    if shards and len(shards[-1].edits) < memory.settings.shard:
        waiting = [*shards.pop().edits, *waiting]
    for begin in range(0, len(waiting), memory.settings.shard):
        some = tuple(waiting[begin : begin + memory.settings.shard])
        shards.append(_trained(base, memory, len(shards), some))
    return replace(memory, shards=tuple(shards))


def without(base: Base, memory: WiseMemory, ids: Sequence[str]) -> WiseMemory:
    """The memory as if these edits had never been in their shards, which are trained anew; empty ones go.

    Raises:
        EditError: One of them is not in it.
    """
    missing = sorted(set(ids) - {edit.id for edit in memory.edits})
    if missing:
        raise EditError(f"there is no edit {', '.join(missing)}")
    memory = memory if memory.quiet else replace(memory, quiet=_quiet(base, memory))
    shards = []
    for place, shard in enumerate(memory.shards):
        left = tuple(edit for edit in shard.edits if edit.id not in ids)
        if left == shard.edits:
            shards.append(shard)
        elif left:
            shards.append(_trained(base, memory, place, left))
    return replace(memory, shards=tuple(shards))


def ties(deltas: Sequence[Tensor], density: float = 0.53) -> Tensor:
    """Shards as one (TIES, arXiv 2306.01708); where only one has written, its entry is left whole."""
    stack = torch.stack(list(deltas))
    return merged(Ties(density=density), "shards", torch.ones(len(stack)), stack)


def _trained(base: Base, memory: WiseMemory, place: int, edits: tuple[Edit, ...]) -> Shard:
    settings, layout = memory.settings, layout_of(base.model)
    before = contexts(base, settings.seed, settings.contexts)
    rows = asked(base, layout, memory.layer, edits, before, settings.onward)
    others = [keys for text, keys in memory.quiet if not any(edit.subject in text for edit in edits)]
    others = others or [keys for _, keys in memory.quiet]
    quiet, sinkless = (torch.cat([keys[begin:] for keys in others]).to(rows.keys.device) for begin in (0, 1))
    alike, unseen = (keys_of_texts(base, layout, memory.layer, t) for t in _near(edits, settings.near, settings.seed))
    near = torch.cat(alike).to(quiet) if alike else quiet[:0]
    typical = float((sinkless @ layout.weight(memory.layer).T).norm(dim=1).mean())
    draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + place)
    mask = (torch.rand(layout.d_out, layout.d_in, generator=draw) < settings.density).to(rows.keys.device)
    free = torch.zeros(layout.d_out, layout.d_in, device=rows.keys.device, requires_grad=True)
    adam = torch.optim.Adam([free], lr=settings.learning_rate)
    inside, outside = _sides(rows)
    for step in range(settings.steps):
        delta = free * mask
        added = linear(rows.keys, delta)
        loss = rows.nll(rows.tails.of(added)).mean()
        size = added.norm(dim=-1) / typical
        missed, touched = relu(settings.inside - size[inside]), relu(size[outside] - settings.outside)
        some = torch.cat([near, quiet[step % _STRIDE :: _STRIDE]])
        stirred = relu(linear(some, delta).norm(dim=-1) / typical - settings.outside).square()
        elsewhere = touched.square().sum() + stirred[: len(near)].sum() + _STRIDE * stirred[len(near) :].sum()
        total = loss + settings.margin * (missed.mean() + elsewhere / len(edits))
        if not torch.isfinite(total):
            raise EditError("the loss of side weights became NaN or infinite", "lower the learning rate")
        if float(total.detach()) < settings.enough:
            break
        (free.grad,) = torch.autograd.grad(total, free)
        adam.step()
    delta = (free * mask).detach()
    size = linear(rows.keys, delta).norm(dim=-1)
    low = float(torch.cat([size[outside], linear(quiet, delta).norm(dim=-1)]).quantile(0.999))
    if unseen:
        ends = torch.stack([keys[-1] for keys in unseen]).to(quiet)
        low = max(low, float(linear(ends, delta).norm(dim=-1).quantile(0.9)))
    high = 0.99 * float(size[inside].min())  # every edit of the shard is recognised
    threshold = (low * high) ** 0.5 if low < high else high
    return Shard(delta.cpu(), threshold, edits, int((rows.rows.labels != -100).sum(1).max()))


def _quiet(base: Base, memory: WiseMemory) -> tuple[tuple[str, Tensor], ...]:
    texts = contexts(base, memory.settings.seed + 1, memory.settings.quiet, 40)
    keys = keys_of_texts(base, layout_of(base.model), memory.layer, texts)
    return tuple(zip(texts, keys, strict=True))


def _near(edits: Sequence[Edit], count: int, seed: int) -> tuple[list[str], list[str]]:
    """What looks like a shard's edits and is not asked for: their prompts about others, real or invented.

    Returns:
        Prompts to train on, and others, with names of their own, to put the threshold by.
    """
    asks, subjects = {edit.asks for edit in edits}, sorted({edit.subject for edit in edits})
    try:
        invented = stranger_names(subjects, seed)
    except EditError:  # from so few names no other can be made
        invented = []
    draw, half = random.Random(seed), len(invented) // 2

    def about(names: Sequence[str], each: int) -> list[str]:
        others = [edit.about(name) for edit in edits for name in draw.sample(names, min(each, len(names)))]
        return [other.prompt for other in others if other.asks not in asks]

    return about([*subjects, *invented[:half]], count), about(invented[half:], 1)


def _sides(rows: Asked) -> tuple[Tensor, Tensor]:
    """Where an edit is asked for, at a prompt's end, and where not, before it and from its answer's last token on.

    Both ``(B, T)``.
    """
    at = torch.arange(rows.rows.ids.shape[1], device=rows.rows.ids.device)
    last, answer = rows.rows.last[:, None], (rows.rows.labels != -100).sum(1, keepdim=True)
    return at == last, (at < last) | ((at >= last + answer) & rows.rows.mask.bool())
