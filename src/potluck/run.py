"""One run of the coordinator's side in its folder: rounds on an engine, events, checkpoints.

Where participants are is the affair of the `Side` that the run is given: all in this process
(`potluck.embedded`), or on machines of their own (`potluck.hosting`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import potluck
from potluck.aggregation.mean import WeightedMean
from potluck.contribution import HeldOutText
from potluck.edit.together.maps import Maps
from potluck.edit_rounds import EditRounds
from potluck.engine.inprocess import InProcess
from potluck.engine.protocol import Engine
from potluck.errors import CheckpointError, EditError, TrainingError
from potluck.footprint import with_period
from potluck.recipe import Recipe, recipe_hash
from potluck.records.checkpoint import (
    Checkpoint,
    attempts,
    list_checkpoints,
    load_checkpoint,
    note_attempt,
    prune_checkpoints,
    save_checkpoint,
    step_back,
)
from potluck.records.events import SCHEMA, Event, EventLog, Listener, read_events
from potluck.records.folder import Variant
from potluck.rounds.evaluation import better, evaluate_shared
from potluck.rounds.state import begin
from potluck.rounds.sync import run_rounds
from potluck.rounds.under_way import restore as restore_under_way
from potluck.rounds.under_way import saved as under_way_of
from potluck.updates.codec import payload_parts
from potluck.updates.fragments import Fragment

Parts = dict[str, dict[str, Tensor]]
Facts = dict[str, Any]


class Side(Protocol):
    """The participants' side, as a run sees it."""

    def engine(self) -> Engine:
        """What reaches the participants."""

    def identity(self) -> Facts:
        """What must not change between a checkpoint and a run that goes on from it."""

    def description(self) -> Facts:
        """What the first event says of participants and machine."""

    def maps(self) -> Maps:
        """Where the layers that the recipe edits lie in the shared state; none if it edits none."""

    def saved(self) -> tuple[Facts, Parts]:
        """What of the participants' state goes into the run's checkpoint: facts by participant, and tensors."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to what ``saved`` said."""


class Run:
    """A run in its folder, at the round it has reached.

    Args:
        side: The participants' side.
        initial: The shared state before the first round; copied.
        fragments: Parts of it that are exchanged in turn.
        variant: Who trains, on whose text.
        folder: The run folder; the caller holds its lock.
        recipe: The variant's own recipe.
        listeners: Told every event.
        checkpoint: Where to go on from; ``None`` starts.
    """

    def __init__(
        self,
        side: Side,
        initial: Tensor,
        fragments: tuple[Fragment, ...],
        variant: Variant,
        folder: Path,
        recipe: Recipe,
        listeners: tuple[Listener, ...] = (),
        checkpoint: Checkpoint | None = None,
    ) -> None:
        recipe = self.recipe = with_period(recipe, initial.numel(), len(variant.trainers))
        self.folder, self.variant, self.side = folder, variant, side
        self.shared, self.engine = begin(recipe, initial.clone(), fragments), side.engine()
        self._checkpoints = folder / "checkpoints"
        if isinstance(self.engine, InProcess):
            self.engine.attempts = attempts(self._checkpoints)
        self.edits = EditRounds(recipe, side.maps())
        self.best: Facts | None = None  # the best evaluation
        self.continued = checkpoint is not None
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        if checkpoint is not None:
            try:
                self._restore(checkpoint)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{folder}: the checkpoint of round {checkpoint.round} is damaged ({error})"
                ) from None
            step_back(folder / "checkpoints", checkpoint.round)
        position = checkpoint.facts["events_position"] if checkpoint else 0
        self.log = EventLog(folder / "events.jsonl", position, listeners)

    def finish(self, stop_requested: Callable[[], bool]) -> None:
        """Run the rounds that are left; the errors are those of ``run_rounds``, and `StorageError`."""
        engine = self.engine
        try:
            if self.continued:
                self.log.write("run_resumed", round=self.shared.revision)
            else:
                self.log.write("run_started", **self._description())
                found = evaluate_shared(engine, self.shared, self.log, self.recipe.deadline)
                self.save(self._amend(engine, found)[1])
            if self.continued and self.edits.due(self.shared.revision):  # what stood in its way may be mended
                self.save(self._amend(engine, None)[1])
            mean = WeightedMean(self.shared.theta.numel())
            trainers = self.variant.trainers
            amend = lambda found: self._amend(engine, found)  # noqa: E731
            run_rounds(self.recipe, trainers, engine, mean, self.shared, self.log, self.save, stop_requested, amend)
            self.log.write(
                "run_finished",
                rounds=self.shared.revision,
                total_tokens=self.shared.total_tokens,
                state_hash=self.shared.digest,
                seconds=self._seconds(),
            )
        except TrainingError:
            if isinstance(engine, InProcess) and engine.simulated:  # who is there is drawn anew the next time
                note_attempt(self._checkpoints, self.shared.revision)
            raise
        finally:
            self.log.close()

    def _amend(self, engine: Engine, found: Facts | None) -> tuple[bool, Facts | None]:
        """Edit the shared state if its time has come; what it was is saved if that fails."""
        if not self.edits.due(self.shared.revision):
            return False, found
        try:
            return True, self.edits.edit(engine, self.shared, self.log)
        except EditError:
            self.save(found)
            raise

    def _seconds(self) -> float:
        """Wall time of this run, that of its earlier sessions up to their last checkpoint included."""
        return self._earlier_seconds + time.monotonic() - self._began

    def save(self, found: Facts | None) -> None:
        """Checkpoint everything; ``found`` is the evaluation, if there was just one."""
        number, digest = self.shared.revision, self.shared.digest
        if found is not None and found["union"] and (self.best is None or better(found, self.best)):
            self.best = {key: found[key] for key in ("round", "participants")}
        self.log.write("checkpoint", round=number, state_hash=digest)
        participants, parts = self.side.saved()
        editing, past = self.edits.saved()
        waiting, under_way = under_way_of(self.shared, self.engine)
        facts = {
            "recipe": recipe_hash(self.recipe),
            "variant": _variant_facts(self.variant),
            **self.side.identity(),
            "state_hash": digest,
            "total_tokens": self.shared.total_tokens,
            "lost": sorted(self.shared.lost),
            "measured": {name: [text.tokens, text.bytes] for name, text in self.shared.measured.items()},
            "events_position": self.log.sync(),
            "best": self.best,
            "seconds": self._seconds(),
            "participants": participants,
            "editing": editing,
            "under_way": waiting,
        }
        shared: Parts = {"shared": {"theta": self.shared.theta}, "outer": self._coordinator_tensors()}
        more = {name: part for name, part in (("past", past), ("under-way", under_way)) if part}
        pieces = {name: payload_parts(part) for name, part in {**shared, **more, **parts}.items()}
        save_checkpoint(self._checkpoints, number, facts, pieces)
        keep_best = self.best["round"] if self.best is not None and self.recipe.records.keep_best else None
        prune_checkpoints(self._checkpoints, self.recipe.records.keep_last, keep_best)

    def _restore(self, checkpoint: Checkpoint) -> None:
        facts, parts = checkpoint.facts, checkpoint.parts
        if (facts["recipe"], facts["variant"]) != (recipe_hash(self.recipe), _variant_facts(self.variant)):
            raise CheckpointError(
                f"{self.folder}: the checkpoint of round {checkpoint.round} belongs to another recipe",
                "a run goes on with the recipe it began with; start a new run for the changed one",
            )
        check_identity(self.side.identity(), checkpoint, self.folder)
        self.shared.theta.copy_(parts["shared"]["theta"])
        for name, vector in self._coordinator_tensors().items():
            vector.copy_(parts["outer"][name])
        self.shared.revision, self.shared.total_tokens = checkpoint.round, facts["total_tokens"]
        self.shared.lost = set(facts["lost"])
        self.shared.measured = {name: HeldOutText(*sizes) for name, sizes in facts.get("measured", {}).items()}
        self.best = facts["best"] if isinstance(facts["best"], dict) else None
        self._earlier_seconds = facts["seconds"]
        if "editing" in facts:
            self.edits.restore(facts["editing"], parts.get("past", {}))
        self.side.restore(checkpoint)
        if "under_way" in facts:
            restore_under_way(self.shared, self.engine, facts["under_way"], parts.get("under-way", {}))

    def _coordinator_tensors(self) -> dict[str, Tensor]:
        """For each fragment: the outer optimizer's vectors, and what downloads have not said yet."""
        return {
            f"{kind}.{place}.{name}": tensor
            for kind, states in (("outer", self.shared.outer), ("download", self.shared.downloads.states))
            for place, state in enumerate(states)
            for name, tensor in state.items()
        }

    def _description(self) -> Mapping[str, Any]:
        recipe = self.recipe
        return {
            "schema": SCHEMA,
            "potluck": potluck.__version__,
            "recipe_hash": recipe_hash(recipe),
            "variant": self.variant.kind,
            "trainers": list(self.variant.trainers),
            "parameters": self.shared.theta.numel(),
            "rounds": recipe.rounds.count,
            "local_steps": recipe.local_steps,
            "tokens_per_step": recipe.tokens_per_step,
            **self.side.description(),
        }


def best_round(facts: Facts) -> int:
    """The round of the best evaluation that a checkpoint's facts tell of; version 0.1 told a score and a round."""
    best = facts["best"]
    return int(best["round"] if isinstance(best, dict) else best[1])


def newest_checkpoint(folder: Path, number: int | None = None) -> Checkpoint | None:
    """A run's newest checkpoint, or that of round ``number``; ``None`` if it has not got that far."""
    checkpoints = folder / "checkpoints"
    return load_checkpoint(checkpoints, number) if number is not None or list_checkpoints(checkpoints) else None


def history(folder: Path, checkpoint: Checkpoint | None) -> list[Event]:
    """The events up to a checkpoint: what a continued run keeps of its log."""
    if checkpoint is None:
        return []
    return list(read_events(folder / "events.jsonl", checkpoint.facts["events_position"]))


def check_identity(identity: Facts, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse to go on with a checkpoint on other text, with another tokenizer or network.

    Raises:
        CheckpointError: naming what has changed.
    """
    for what, now in identity.items():
        if checkpoint.facts.get(what) != now:
            raise CheckpointError(
                f"{folder}: the checkpoint of round {checkpoint.round} was made with another {what}",
                "restore what has changed since the run began, or start a new run",
            )


def _variant_facts(variant: Variant) -> list[str]:
    return [variant.kind, *variant.trainers]
