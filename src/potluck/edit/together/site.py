"""A participant's side of an edit by many: its edits stay here, hashes and sums leave.

A task is answered from its arguments and the shared state alone, so it may come twice. Targets, which are slow to find,
are kept in memory until another edit begins; after a restart they are found again, and are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.contribution import Contribution, Scalar, Task
from potluck.corpus.tokenizer import Vocabulary
from potluck.edit.contexts import contexts, hidden_at, keys_at
from potluck.edit.evaluation import right_answers
from potluck.edit.facts import Edit, usable_edits
from potluck.edit.layout import layout_of
from potluck.edit.together.edit_hashes import claim_tensors, claims_of
from potluck.edit.together.exchange import EDIT, MOMENTS, read_contexts
from potluck.edit.together.maps import Maps
from potluck.edit.together.sums import Hiding, edit_sums, packed, token_moments, wire_of
from potluck.edit.values import ValueSettings, targets
from potluck.errors import EditError
from potluck.local.network import Network
from potluck.models.flat import state_hash
from potluck.recipe.editing import Editing

PHASES = ("layer", "all", "after")


@dataclass
class Site:
    """One participant at an edit by many.

    Attributes:
        network: What it computes with; every task puts its own state into it.
        edits: Its file, read anew for each edit of the model; ``None`` if it edits nothing.
        secret: Shared with the other participants.
        tokens: Its text.
        seed: Of the contexts.
    """

    name: str
    network: Network
    vocabulary: Vocabulary
    editing: Editing
    maps: Maps
    edits: Path | None
    secret: bytes | None
    tokens: np.ndarray
    sequence_length: int
    seed: int = 0
    _found: tuple[str, Tensor] | None = field(default=None, repr=False)
    _covered: dict[str, str] = field(default_factory=dict, repr=False)

    def answer(self, task: Task, start: Tensor, now: Tensor) -> Contribution:
        """Do a task of an edit.

        Args:
            start: The shared state before the edit.
            now: The same with the layers that are edited already.

        Raises:
            EditError: It cannot be done, or is none.
        """
        with _at_rest(self.network):
            match task.kind:
                case "claims":
                    header, tensors = self._claims(task.parameters)
                case "moments":
                    header, tensors = self._moments(task.parameters, now)
                case "edit":
                    header, tensors = self._edit(task.parameters, start, now)
                case other:
                    raise EditError(f"{self.name}: {other!r} is no task of an edit")
        return Contribution(kind=task.kind, revision=task.revision, header=header, tensors=tensors)

    def changed(self, start: Tensor, maps: Mapping[int, Tensor]) -> Tensor:
        """The shared state with other maps at some layers; without any, ``start`` itself.

        Raises:
            EditError: One does not fit.
        """
        now = start.clone() if maps else start
        for layer, weight in maps.items():
            place = self.maps.get(layer)
            if place is None or (weight.shape, weight.dtype) != ((place.d_out, place.d_in), start.dtype):
                raise EditError(f"{self.name}: what came for layer {layer} is not its map")
            place.of(now).copy_(weight)
        return now

    def _claims(self, about: Mapping[str, Scalar]) -> tuple[dict[str, Scalar], dict[str, Tensor]]:
        first, edits = self._turn(about)
        if not edits:
            return {"edits": 0}, {}
        return {"edits": len(edits)}, claim_tensors(claims_of(self.name, edits, self._secret(), first))

    def _moments(self, about: Mapping[str, Scalar], now: Tensor) -> tuple[dict[str, Scalar], dict[str, Tensor]]:
        base = self._base(now)
        tokens = self.tokens[: self.editing.moment_tokens]
        length = min(self.sequence_length, getattr(base.model.config, "max_position_embeddings", self.sequence_length))
        sums = token_moments(base, layout_of(base.model), list(self.maps), tokens, length)
        count = len(tokens) // length * length
        drawn = json.dumps(contexts(base, self.seed))
        header: dict[str, Scalar] = {"base": state_hash(now), "count": count, "contexts": drawn}
        return header, self._packed(MOMENTS, about, header, sums)

    def _edit(
        self, about: Mapping[str, Scalar], start: Tensor, now: Tensor
    ) -> tuple[dict[str, Scalar], dict[str, Tensor]]:
        phase, layers, share = str(about.get("phase")), _numbers(about.get("layers")), about.get("share")
        if phase not in PHASES or not layers or not set(layers) <= self.maps.keys() or type(share) is not int:
            raise EditError(f"{self.name}: not a task of an edit")
        before = tuple(json.loads(read_contexts(about.get("contexts"))))
        first, edits = self._turn(about)
        out = set(_numbers(about.get("left_out")))
        edits = [edit for number, edit in enumerate(edits, first) if number not in out]
        header: dict[str, Scalar] = {"base": state_hash(now), "count": len(edits)}
        if phase == "after":
            sums, header["told"] = self._held(layers, edits, before, now)
        else:
            sums = self._statistics(layers, edits, before, start, now, max(1, share))
        return header, self._packed(EDIT, about, header, sums)

    def _statistics(
        self, layers: Sequence[int], edits: list[Edit], before: tuple[str, ...], start: Tensor, now: Tensor, share: int
    ) -> dict[str, Tensor]:
        """``M`` and ``G`` at some layers on the weights that are there ``now``."""
        z = self._targets(edits, before, start)
        base = self._base(now)
        layout, last = layout_of(base.model), max(self.maps)
        if not edits:
            return edit_sums(_no_keys(layers, self.maps), {layer: z for layer in layers})
        residual = (z - hidden_at(base, layout, last, edits, self.editing.at)) / share
        return edit_sums(
            keys_at(base, layout, layers, edits, before, self.editing.at), {layer: residual for layer in layers}
        )

    def _held(
        self, layers: Sequence[int], edits: list[Edit], before: tuple[str, ...], now: Tensor
    ) -> tuple[dict[str, Tensor], int]:
        """Keys on the edited weights, and how many edits the edited model answers by itself."""
        base = self._base(now)
        if not edits:
            return edit_sums(_no_keys(layers, self.maps), {}), 0
        told = sum(right_answers(base, edits))
        return edit_sums(keys_at(base, layout_of(base.model), layers, edits, before, self.editing.at), {}), told

    def _targets(self, edits: list[Edit], before: tuple[str, ...], start: Tensor) -> Tensor:
        """``z`` of each edit, which depends on the unedited model alone."""
        asked = json.dumps([state_hash(start), before, [asdict(edit) for edit in edits]])
        name = hashlib.sha256(asked.encode()).hexdigest()
        if self._found is None or self._found[0] != name:
            base = self._base(start)
            layout = layout_of(base.model)
            if not edits:
                return start.new_zeros((0, layout.d_out)).cpu().double()
            settings = ValueSettings(**self.editing.values.model_dump())
            self._found = (name, targets(base, layout, max(self.maps), edits, before, settings, self.editing.at))
        return self._found[1]

    def _turn(self, about: Mapping[str, Scalar]) -> tuple[int, list[Edit]]:
        """The edits whose turn it is, and the number of the first of them."""
        number, size = about.get("session"), self.editing.at_once
        if type(number) is not int or number < 0:
            raise EditError(f"{self.name}: not a task of an edit")
        if self.edits is None:
            return 0, []
        edits = usable_edits(self.edits, lambda _: None)  # it was said before the first round
        first = number * size
        return first, edits[first : first + size] if size else edits

    def _base(self, theta: Tensor) -> Base:
        """The run's model in a state."""
        self.network.flat.vector.copy_(theta)
        return Base(self.network.model, self.vocabulary, self.name)

    def _secret(self) -> bytes:
        if self.secret is None:
            raise EditError(f"{self.name} has no secret", "name the participants' secret file: `edit_secret`")
        return self.secret

    def _packed(
        self, kind: str, about: Mapping[str, Scalar], header: Mapping[str, Scalar], sums: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As they travel; under one mask there is one message."""
        wire = wire_of(self.editing)
        if wire.fraction is None:
            return packed(sums, wire, None)
        parties, nonce = tuple(str(about.get("parties")).split(",")), about.get("nonce")
        if self.name not in parties or len(set(parties)) < max(2, len(parties)) or not isinstance(nonce, str):
            raise EditError(f"{self.name}: a masked sum needs two participants at least, and this one among them")
        context = json.dumps([kind, *(f"{key}={about.get(key)}" for key in _MASKED), header["base"]])
        found = packed(sums, wire, Hiding(self._secret(), self.name, parties, context))
        digest = hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).hexdigest()
        if self._covered.setdefault(context, digest) != digest:
            raise EditError(f"{self.name}: asked for two messages under one mask, which would show their difference")
        return found


_MASKED = ("session", "phase", "layers", "share", "parties", "nonce")


@contextmanager
def _at_rest(network: Network) -> Iterator[None]:
    """Within, the model evaluates and learns nothing; afterwards it is as it was."""
    training, learns = network.model.training, [p.requires_grad for p in network.model.parameters()]
    network.model.eval()
    try:
        yield
    finally:
        network.model.train(training)
        for parameter, value in zip(network.model.parameters(), learns, strict=True):
            parameter.requires_grad_(value)


def _no_keys(layers: Sequence[int], maps: Maps) -> dict[int, Tensor]:
    return {layer: torch.zeros(0, maps[layer].d_in, dtype=torch.float64) for layer in layers}


def _numbers(said: Scalar | None) -> tuple[int, ...]:
    """Numbers from a list with commas.

    Raises:
        EditError: It is none.
    """
    if not isinstance(said, str) or not all(part.isdecimal() and len(part) < 10 for part in said.split(",") if said):
        raise EditError("not a list of numbers")
    return tuple(map(int, said.split(","))) if said else ()
