"""The coordinator's side of an edit by many: claims, moments, then statistics layer by layer.

::

    claims of everybody -> who leaves out which edit
    C   <- sum_i n_i C_i / sum_i n_i
    for each layer l:                                     one-shot: all layers from one exchange
        M, G <- sum_i (R_i' K_i), sum_i (K_i' K_i)        on the weights that the last layer left
        W_l  <- W_l + M (lambda C + G_past + G)^-1        (MEMIT), or in the null space of C (AlphaEdit)
    G_past <- G_past + sum_i G_i                          on the weights that all layers left

It is the edit that one party with all edits would make (CollabEdit, arXiv 2410.09508). The edits never come here. Who
fails, or sends what cannot be used, is left out and everything begins again, so that it is as if it had never been
asked; the weights are those of a copy until all of it is done.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from potluck.aggregation.statistics import SummedStatistics
from potluck.contribution import Contribution, Header, Scalar
from potluck.edit.closed_form import alphaedit_update, asked_in, memit_update, null_space
from potluck.edit.contexts import COUNT, LENGTH
from potluck.edit.together.edit_hashes import Claim, Decisions, Resolution, read_claims, resolved
from potluck.edit.together.maps import Maps
from potluck.edit.together.sums import (
    GRAM,
    MOMENT,
    PRODUCT,
    edit_shapes,
    moment_shapes,
    read_sum,
    received,
    wire_of,
)
from potluck.errors import EditError
from potluck.models.flat import state_hash
from potluck.recipe.editing import Editing
from potluck.untrusted import loads

CLAIMS, MOMENTS, EDIT = "claims", "moments", "edit"
_MAX_CONTEXTS = 1 << 14  # characters
_MAX_TOKEN = 64  # characters, on the average of a text


class Ask(Protocol):
    """How the exchange reaches participants."""

    def __call__(
        self, kind: str, arguments: Mapping[str, Header], theta: Tensor, maps: Mapping[int, Tensor]
    ) -> Iterator[tuple[str, Contribution | str]]:
        """Give each participant its task; its contribution or why there is none, in the order of ``arguments``.

        Args:
            theta: The state that tasks are about: the shared one with other ``maps`` at some layers.
        """


@dataclass(frozen=True)
class Outcome:
    """What an edit came to.

    Attributes:
        theta: The edited state; ``None`` if there was nothing to edit.
        edits: By participant, how many of its edits were made ...
        told: ... and how many of them the edited model answers by itself.
        keys: Of each layer, the Gram matrix of the edits' keys on the edited weights.
        changes: Of each layer, the norm of what was added.
        refused: By participant, why it was left out.
    """

    theta: Tensor | None
    resolution: Resolution
    edits: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    changes: Mapping[int, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """One edit of the shared state by many.

    Attributes:
        names: Everybody, in the order in which statistics are summed and participants have priority.
        number: How many edits of this run were made before.
        past: Of each layer, ``G_past`` of edits that were made before and are to hold.
    """

    editing: Editing
    maps: Maps
    names: tuple[str, ...]
    ask: Ask
    number: int = 0
    past: Mapping[int, Tensor] = field(default_factory=dict)
    decisions: Decisions | None = None

    def edited(self, theta: Tensor, stop_on_failure: bool = False) -> Outcome:
        """Edit a copy of the shared state.

        Raises:
            EditError: Conflicts are not decided, too few are left, or the sums cannot be solved.
        """
        refused: dict[str, str] = {}
        while True:
            names = tuple(name for name in self.names if name not in refused)
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            if not names or (self.editing.masks is not None and len(self._editors(names)) < 2):
                raise EditError(f"too few participants are left to edit with: {reasons}")
            try:
                return replace(self._attempt(theta, names), refused=refused)
            except _Unusable as found:
                refused |= found.reasons
                if stop_on_failure:
                    name, why = next(iter(found.reasons.items()))
                    raise EditError(f"{name} could not take part in the edit: {why}") from None

    def _attempt(self, theta: Tensor, names: tuple[str, ...]) -> Outcome:
        claims = self._claims(theta, self._editors(names))
        where = self.editing.decisions or "a file"
        resolution = resolved(claims, self.editing.policy, names, self.decisions, where)
        made = {name: sum(claim.participant == name for claim in claims) for name in self._editors(names)}
        made = {name: count - len(resolution.left_out.get(name, ())) for name, count in made.items()}
        if not any(made.values()):
            return Outcome(None, resolution)
        moments, contexts = self._moments(theta, names)
        asked = [name for name, count in made.items() if count or self.editing.masks is not None]
        each = {name: made[name] for name in asked}
        attempt = _Attempt(self, theta.clone(), each, resolution, moments, contexts, sum(made.values()))
        changes = attempt.write()
        keys, told = attempt.after()
        return Outcome(attempt.theta, resolution, made, told, keys, changes)

    def _editors(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self.editing.participants or name in self.editing.participants]

    def _claims(self, theta: Tensor, names: Sequence[str]) -> list[Claim]:
        claims: list[Claim] = []

        def take(name: str, answer: Contribution) -> None:
            found = read_claims(name, answer.tensors)
            if self.editing.at_once and len(found) > self.editing.at_once:
                raise EditError(f"{len(found)} edits at once, editing.at_once is {self.editing.at_once}")
            claims.extend(found)

        self.collect(CLAIMS, {name: {"session": self.number} for name in names}, theta, (), take)
        return claims

    def _moments(self, theta: Tensor, names: tuple[str, ...]) -> tuple[dict[int, Tensor], str]:
        """``C`` of each layer, and the contexts that the first participant drew from the shared model."""
        found: list[str] = []

        def note(name: str, answer: Contribution) -> None:
            found.append(read_contexts(answer.header.get("contexts")))

        about: dict[str, Scalar] = {"session": self.number, **self.hidden(names)}
        most = dict.fromkeys(names, self.editing.moment_tokens)
        sums, count = self.summed(MOMENTS, dict.fromkeys(names, about), theta, (), moment_shapes(self.maps), note, most)
        return {layer: sums[f"{layer}.{MOMENT}"] / count for layer in self.maps}, found[0]

    def hidden(self, names: Sequence[str]) -> dict[str, Scalar]:
        """What masks need: all who put them on, and a word that no other sum has."""
        if self.editing.masks is None:
            return {}
        return {"parties": ",".join(names), "nonce": secrets.token_hex(16)}

    def summed(
        self,
        kind: str,
        arguments: Mapping[str, Header],
        theta: Tensor,
        changed: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        note: Callable[[str, Contribution], None],
        most: Mapping[str, int],
    ) -> tuple[dict[str, Tensor], int]:
        """Statistics of all who are asked, summed as they come, and what they count together, each at ``most``."""
        base, wire = state_hash(theta), wire_of(self.editing)
        total = SummedStatistics(kind, base)

        def take(name: str, answer: Contribution) -> None:
            note(name, answer)
            total.accumulate(received(name, answer, shapes, base, wire, most[name]))

        self.collect(kind, arguments, theta, changed, take)
        found = total.finish()
        return read_sum(found, wire), found.count

    def collect(
        self,
        kind: str,
        arguments: Mapping[str, Header],
        theta: Tensor,
        changed: Sequence[int],
        take: Callable[[str, Contribution], None],
    ) -> None:
        """Ask, and take in what comes.

        Raises:
            _Unusable: Somebody did not answer, or not with what was asked for.
        """
        reasons: dict[str, str] = {}
        maps = {layer: self.maps[layer].of(theta).clone(memory_format=torch.contiguous_format) for layer in changed}
        for name, answer in self.ask(kind, arguments, theta, maps):
            if isinstance(answer, str):
                reasons[name] = answer
                continue
            try:
                if name not in arguments:
                    raise EditError(f"{name} was not asked, and may not edit")
                if answer.kind != kind:
                    raise EditError(f"{name}: {answer.kind!r} where {kind!r} was asked for")
                take(name, answer)
            except (EditError, ValueError) as error:
                reasons[name] = str(error)
        if reasons:
            raise _Unusable(reasons)


@dataclass(frozen=True)
class _Attempt:
    """The layers of one edit, on a copy of the shared state; ``asked`` says how many edits each is to make."""

    whole: Exchange
    theta: Tensor
    asked: Mapping[str, int]
    resolution: Resolution
    moments: Mapping[int, Tensor]
    contexts: str
    edits: int

    def write(self) -> dict[int, float]:
        """Write all layers; norms of what was added."""
        layers = list(self.whole.maps)
        if self.whole.editing.form == "one-shot":
            sums = self._statistics("all", layers, (), len(layers))
            return {layer: self._add(layer, sums) for layer in layers}
        changes = {}
        for place, layer in enumerate(layers):
            sums = self._statistics("layer", [layer], layers[:place], len(layers) - place)
            changes[layer] = self._add(layer, sums)
        return changes

    def after(self) -> tuple[dict[int, Tensor], dict[str, int]]:
        """Gram matrices of the edits' keys on the edited weights, and how many edits hold."""
        layers, told = list(self.whole.maps), dict.fromkeys(self.asked, 0)

        def note(name: str, answer: Contribution) -> None:
            count = answer.header.get("told")
            if type(count) is not int or not 0 <= count <= self.asked[name]:
                raise EditError(f"{name}: {str(count)[:20]} of {self.asked[name]} edits told")
            told[name] = count

        sums = self._statistics("after", layers, layers, 1, note)
        return {layer: sums[f"{layer}.{GRAM}"] for layer in layers}, told

    def _statistics(
        self,
        phase: str,
        layers: Sequence[int],
        changed: Sequence[int],
        share: int,
        note: Callable[[str, Contribution], None] = lambda name, answer: None,
    ) -> dict[str, Tensor]:
        """Sums over the participants' edits at some layers; each residual is divided by ``share``."""
        common: dict[str, Scalar] = {
            "session": self.whole.number,
            "phase": phase,
            "layers": ",".join(map(str, layers)),
            "share": share,
            "contexts": self.contexts,
            **self.whole.hidden(list(self.asked)),
        }
        arguments = {
            name: {**common, "left_out": ",".join(map(str, self.resolution.left_out.get(name, ())))}
            for name in self.asked
        }
        shapes = edit_shapes(self.whole.maps, layers, products=phase != "after")
        return self.whole.summed(EDIT, arguments, self.theta, changed, shapes, note, self.asked)[0]

    def _add(self, layer: int, sums: Mapping[str, Tensor]) -> float:
        g, m = sums[f"{layer}.{GRAM}"], sums[f"{layer}.{PRODUCT}"]
        past = self.whole.past.get(layer, torch.zeros_like(g))
        delta = update_of(self.whole.editing, m, g, self.moments[layer], past, self.edits)
        if not torch.isfinite(delta).all():
            raise EditError(f"layer {layer}: what would be added is not finite")
        weight = self.whole.maps[layer].of(self.theta)
        weight.copy_(weight.double() + delta)
        return float(delta.norm())


class _Unusable(Exception):
    """Somebody has to be left out; why, by name."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def update_of(editing: Editing, m: Tensor, g: Tensor, moment: Tensor, past: Tensor, edits: int) -> Tensor:
    """``Δ``, ``(d_out, d_in)``, of summed statistics.

    Args:
        moment: C of the text.
        past: ``G_past``.
        edits: How many edits the sums are of.

    Raises:
        EditError: They cannot be solved.
    """
    if editing.method == "alphaedit":
        free = null_space(moment, editing.free_directions)
        return alphaedit_update(m, g, past, free, editing.null_weight * asked_in(g, free, edits))
    return memit_update(m, g + past, moment, editing.moment_weight)


def read_contexts(said: object) -> str:
    """Contexts of unknown origin, a JSON list of texts.

    Raises:
        EditError: They are none.
    """
    try:
        found = loads(said, most_bytes=_MAX_CONTEXTS, depth=1) if isinstance(said, str) else None
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise EditError("the contexts that came are no list of texts")
    if len(found) > COUNT or any(len(text) > LENGTH * _MAX_TOKEN for text in found):
        raise EditError(f"the contexts that came are more than {COUNT} texts of {LENGTH} tokens")
    return json.dumps(found)
