"""A tiny network, and runs on random tokens without folders or text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potluck.aggregation.mean import WeightedMean
from potluck.contribution import ParticipantInfo
from potluck.corpus.batches import Batches
from potluck.engine.inprocess import InProcess, Perform
from potluck.local.network import Network, place
from potluck.local.optimizers import InnerOptimizer
from potluck.local_state import new_state
from potluck.models.build import build_model
from potluck.participant import Participant
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe
from potluck.recipe.sources import Profile
from potluck.records.events import Event, EventLog
from potluck.rounds.state import SharedState, begin
from potluck.rounds.sync import run_rounds
from potluck.updates.codec import wire_bytes
from potluck.updates.fragments import Fragment, fragments_of

SHAPE = {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64}
VOCABULARY, LENGTH, BATCH = 61, 16, 2


def recipe_of(participants: int = 3, **tables: Any) -> Recipe:
    local = {"sequence_length": LENGTH, "batch_size": BATCH, **tables.pop("local", {})}
    data = {"source": {"path": "text"}, "split": {"participants": participants}}
    compute = {"device": "cpu", "precision": "fp32"}
    return parse_recipe({"model": SHAPE, "data": data, "compute": compute, "local": local, **tables})


def network_of(recipe: Recipe) -> Network:
    return place(build_model(recipe.model, VOCABULARY, 0, recipe.seed), recipe.compute)


def participant_of(recipe: Recipe, name: str, network: Network, optimizer: InnerOptimizer | None = None) -> Participant:
    """One with 400 random tokens of its own."""
    optimizer = optimizer or InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
    seed = recipe.participant_names.index(name)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 400, dtype=np.uint16)
    batches = Batches(tokens, recipe.local.sequence_length, seed)
    fragments = fragments_in(network, recipe)
    state = new_state(network, optimizer, recipe, fragments)
    return Participant(name, recipe, network, optimizer, (batches,), None, state, fragments)


def fragments_in(network: Network, recipe: Recipe) -> tuple[Fragment, ...]:
    return fragments_of([(entry.name, entry.shape) for entry in network.flat.manifest], recipe.fragments)


@dataclass
class World:
    """One run, its state and what it wrote."""

    recipe: Recipe
    participants: dict[str, Participant]
    shared: SharedState
    log: EventLog
    events: list[Event] = field(default_factory=list)
    holds: dict[str, int] = field(default_factory=dict)

    def run(
        self, perform: Perform | None = None, profiles: dict[str, Profile] | None = None, names: Sequence[str] = ()
    ) -> torch.Tensor:
        everybody = self.recipe.participant_names
        roster = [ParticipantInfo(name=n, evaluates=False, holds=self.holds.get(n, 0)) for n in everybody]
        do = perform or (lambda name, task: self.participants[name].perform(task))
        engine = InProcess(roster, do, wire_bytes, profiles, self.recipe.seed)
        mean = WeightedMean(self.shared.theta.numel())
        run_rounds(
            self.recipe, names or self.recipe.participant_names, engine, mean, self.shared, self.log,
            lambda score: None, lambda: False,
        )  # fmt: skip
        return self.shared.theta

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    return recipe_of


@pytest.fixture
def make_network() -> Callable[[Recipe], Network]:
    return network_of


@pytest.fixture
def make_participant() -> Callable[..., Participant]:
    return participant_of


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """A run whose participants share one network; with ``theta`` the shared state is any vector."""
    logs: list[EventLog] = []

    def make(recipe: Recipe, theta: torch.Tensor | None = None) -> World:
        participants: dict[str, Participant] = {}
        fragments = (Fragment(((theta.numel(),),), (slice(0, theta.numel()),)),) if theta is not None else ()
        if theta is None:
            network = network_of(recipe)
            theta = network.flat.vector.clone()
            fragments = fragments_in(network, recipe)
            optimizer = InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
            participants = {n: participant_of(recipe, n, network, optimizer) for n in recipe.participant_names}
        events: list[Event] = []
        logs.append(log := EventLog(tmp_path / "events.jsonl", listeners=(events.append,)))
        return World(recipe, participants, begin(recipe, theta, fragments), log, events)

    yield make
    for log in logs:
        log.close()
