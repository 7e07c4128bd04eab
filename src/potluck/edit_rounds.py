"""Facts edited in the shared state between rounds: when, with whom, and whether the edit is kept.

The exchange itself is `potluck.edit.together.exchange`. It works on a copy. What came of it is measured on everybody's
held-out text before it counts; if anybody's loss rises too much, the shared state is put back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from potluck.contribution import Contribution, Header, Task
from potluck.edit.together.edit_hashes import Claim, Decisions, read_decisions
from potluck.edit.together.exchange import CLAIMS, Exchange, Outcome
from potluck.edit.together.maps import Maps
from potluck.engine.protocol import Engine
from potluck.models.flat import state_hash
from potluck.participant import CHANGED
from potluck.recipe import Recipe
from potluck.recipe.editing import Editing
from potluck.records.events import EventLog
from potluck.rounds.evaluation import measure_shared
from potluck.rounds.receiving import Window, in_order
from potluck.rounds.state import SharedState
from potluck.untrusted import in_a_line

Facts = dict[str, Any]


@dataclass
class EditRounds:
    """The edits of one run.

    Attributes:
        maps: Where the edited layers lie in the shared state.
        number: How many edits were made.
        done: Revision of the shared state that was edited last; -1 before.
        past: Of each layer, ``G_past``: keys of edits that are to hold.
    """

    recipe: Recipe
    maps: Maps
    number: int = 0
    done: int = -1
    past: dict[int, Tensor] = field(default_factory=dict)

    def due(self, revision: int) -> bool:
        """Whether the shared state of this revision has yet to be edited."""
        editing, last = self.recipe.editing, self.recipe.rounds.count
        if editing is None or not self.maps or self.done == revision:
            return False
        return revision == last or bool(editing.every and revision and revision % editing.every == 0)

    def edit(self, engine: Engine, shared: SharedState, log: EventLog) -> Facts:
        """Edit the shared state, and write the ``edit`` event.

        Returns:
            The evaluation of what came of it, as `potluck.rounds.evaluation.evaluate_shared`.

        Raises:
            EditError: It cannot be edited; it is as it was.
        """
        editing = self.recipe.editing
        assert editing is not None
        began, deadline, old = engine.now(), self.recipe.deadline, shared.theta.clone()
        before = measure_shared(engine, shared, deadline)
        post = _Post(engine, shared, deadline)
        names = tuple(name for name in self.recipe.participant_names if name in engine.roster())
        decisions = _decisions(editing)
        exchange = Exchange(editing, self.maps, names, post, self.number, self.past, decisions)
        outcome = exchange.edited(old, self.recipe.rounds.on_failure == "stop")
        after, reason = before, "there was nothing to edit"
        if outcome.theta is not None:
            shared.put(outcome.theta)
            after = measure_shared(engine, shared, deadline)
            reason = _too_much(editing, before, after)
            if reason:
                shared.put(old)
            else:
                self._keep(editing, outcome)
        log.write(
            "edit",
            round=shared.revision,
            number=self.number,
            kept=not reason,
            reason=reason,
            **_facts(outcome),
            before=_bits(before),
            after=_bits(after),
            transfers=post.transfers,
            seconds=engine.now() - began,
        )
        self.done, found = shared.revision, before if reason else after
        if not reason:
            log.write("evaluation", **after)
        return found

    def saved(self) -> tuple[Facts, dict[str, Tensor]]:
        """What goes into a checkpoint."""
        return {"number": self.number, "done": self.done}, {
            f"past.{layer}": tensor for layer, tensor in self.past.items()
        }

    def restore(self, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what ``saved`` said."""
        self.number, self.done = int(facts["number"]), int(facts["done"])
        self.past = {int(name.removeprefix("past.")): tensor for name, tensor in tensors.items()}

    def _keep(self, editing: Editing, outcome: Outcome) -> None:
        self.number += 1
        if editing.at_once:  # else all edits come again the next time, and with them their keys
            self.past = {layer: keys + self.past.get(layer, 0) for layer, keys in outcome.keys.items()}


@dataclass
class _Post:
    """Asks participants through the engine, and counts what travels."""

    engine: Engine
    shared: SharedState
    deadline: float | None
    transfers: dict[str, dict[str, int]] = field(default_factory=dict)

    def __call__(
        self, kind: str, arguments: Mapping[str, Header], theta: Tensor, maps: Mapping[int, Tensor]
    ) -> Iterator[tuple[str, Contribution | str]]:
        engine, digest = self.engine, state_hash(theta)
        window = Window(None if self.deadline is None else engine.now() + self.deadline)
        changed = {f"{CHANGED}{layer}": weight for layer, weight in maps.items()}
        sent = {engine.send(name, self._task(kind, name, arguments[name], digest, changed)): name for name in arguments}
        for reply in in_order(engine, sent, window, self.shared.arrived):
            count = self.transfers.setdefault(reply.participant, {"down_bytes": 0, "up_bytes": 0})
            count["down_bytes"] += reply.down_bytes
            count["up_bytes"] += reply.up_bytes
            if reply.contribution is None:
                engine.cancel(reply.task)
                self.shared.downloads.forget(reply.participant)
            yield reply.participant, reply.contribution or in_a_line(reply.reason) or reply.status

    def _task(self, kind: str, name: str, about: Header, digest: str, changed: Mapping[str, Tensor]) -> Task:
        shared, tensors = self.shared, dict[str, Tensor]()
        if kind != CLAIMS:  # of claims the shared state is no part
            tensors = {**shared.downloads.tensors(name, shared.given, shared.revision), **changed}
        return Task(
            kind=kind,
            revision=shared.revision,
            parameters=about,
            tensors=tensors,
            state=digest,
            seconds=self.deadline,
        )


def _decisions(editing: Editing) -> Decisions | None:
    return None if editing.decisions is None else read_decisions(Path(editing.decisions))


def _bits(measured: Facts) -> dict[str, float]:
    return {name: result["bits_per_byte"] for name, result in measured["participants"].items()}


def _too_much(editing: Editing, before: Facts, after: Facts) -> str:
    """Why an edit is taken back; empty if it is kept."""
    old, new = _bits(before), _bits(after)
    for name in old:
        if name not in new:
            return f"{name} did not measure the edited model: {after['missing'].get(name, 'no answer')}"
        if new[name] - old[name] > editing.max_rise:
            rise = new[name] - old[name]
            return f"held-out loss of {name} rose by {rise:.3g} bits per byte, editing.max_rise is {editing.max_rise:g}"
    return "" if old else "nobody measured the model before the edit"


def _facts(outcome: Outcome) -> Facts:
    """Of the event, what the exchange says."""
    found = outcome.resolution
    return {
        "edits": dict(outcome.edits),
        "told": dict(outcome.told),
        "left_out": {name: list(numbers) for name, numbers in found.left_out.items()},
        "overlaps": found.overlaps,
        "conflicts": [
            {"edits": _named(conflict.claims), "kept": None if conflict.kept is None else _named([conflict.kept])[0]}
            for conflict in found.conflicts
        ],
        "layers": {str(layer): norm for layer, norm in outcome.changes.items()},
        "refused": dict(outcome.refused),
    }


def _named(claims: Sequence[Claim]) -> list[list[str | int]]:
    return [[claim.participant, claim.number] for claim in claims]
