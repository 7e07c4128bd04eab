"""The participant's side of the loop: one table from the kind of a task to the function that performs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from potluck.compose.decoding.models import NextToken
from potluck.compose.decoding.participants import KIND as PREDICT
from potluck.compose.decoding.participants import answered
from potluck.contribution import Contribution, Task
from potluck.corpus.batches import Batches, Seat
from potluck.corpus.shards import Shard
from potluck.errors import EditError, TrainingError
from potluck.local.evaluate import negative_log_likelihood
from potluck.local.network import Network
from potluck.local.optimizers import InnerOptimizer
from potluck.local.replicas import AdaptiveState, stream_steps
from potluck.local.steps import StepReport, joined, local_steps
from potluck.local_state import LocalState
from potluck.models.flat import state_hash
from potluck.recipe import Recipe
from potluck.recipe.outer import OuterNesterov, OuterSgd
from potluck.recipe.schedules import rate_factor
from potluck.recipe.seeds import seed_of
from potluck.recipe.updates import Streaming
from potluck.updates.download import absorb
from potluck.updates.fragments import Fragment
from potluck.updates.links import link_of, pack

CLAIMS = "claims"
EDITING = (CLAIMS, "moments", "edit")  # kinds of tasks of an edit by many (`potluck.edit.together`)
CHANGED = "changed."  # before a layer's number: its map, as an edit that is under way has left it


class Editor(Protocol):
    """What answers the tasks of an edit by many."""

    def answer(self, task: Task, start: Tensor, now: Tensor) -> Contribution:
        """The answer, from the shared state at the start of the edit and from what it is by now."""

    def changed(self, start: Tensor, maps: Mapping[int, Tensor]) -> Tensor:
        """The shared state with other maps at some layers."""


@dataclass(frozen=True)
class Participant:
    """One party: its text, its state, and the network it computes with.

    Attributes:
        batches: Where its training sequences come from. A step takes ``batch_size`` sequences from each: one for
            an ordinary participant, everybody's for the pooled run.
        validation: Its held-out text, if it has any.
        network, optimizer: Shared by all participants of a process; they take turns.
        fragments: Parts of the model that are exchanged in turn.
        predictor: A model of its own, which answers questions for next tokens.
        editor: Holds its edits and answers for them.
    """

    name: str
    recipe: Recipe
    network: Network
    optimizer: InnerOptimizer
    batches: tuple[Batches | Seat, ...]
    validation: Shard | None
    state: LocalState
    fragments: tuple[Fragment, ...]
    predictor: NextToken | None = None
    editor: Editor | None = None

    def perform(self, task: Task) -> Contribution:
        """Do a task.

        Raises:
            TrainingError: The kind of task is not known here, or training failed.
        """
        known = (*_TASKS, PREDICT, *EDITING)
        if task.kind not in known:
            raise TrainingError(f"{self.name} does not know how to {task.kind!r}", f"known: {', '.join(known)}")
        try:
            if task.kind == PREDICT:  # it brings a question, not the shared state
                return predict(self, task)
            if task.kind in EDITING:
                return edit(self, task)
            shared = absorb(self.recipe.updates.download, self.fragments, task.tensors, self.state.shared)
            self.state.shared = shared
            if task.state and state_hash(shared) != task.state:
                self.state.shared = None  # the coordinator will send all of it
                raise TrainingError("the shared state here is not the one that the task names")
            return _TASKS[task.kind](self, task, shared)
        except (RuntimeError, MemoryError, IndexError) as error:  # what torch raises, out of memory above all
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(f"{self.name} could not {task.kind}: {reason}") from error

    def go_ahead(self) -> None:
        """Take the local steps that may go on while the last update travels; without this the next task takes them."""
        state, vector = self.state, self.network.flat.vector
        if state.pending[1] and state.ahead is None:
            assert state.own is not None
            vector.copy_(state.own)
            with _bound_optimizer(self):
                report = _steps(self, *state.pending)
            state.ahead = (report, vector.to("cpu", copy=True))


def train(participant: Participant, task: Task, shared: Tensor) -> Contribution:
    """H local steps from the shared state; the update is what they reached, or in full precision where they led."""
    recipe, state, network = participant.recipe, participant.state, participant.network
    if not recipe.local.keep_optimizer:
        state.moments.zero_()
        state.optimizer_steps = 0
    network.flat.vector.copy_(shared)
    anchor = shared.to(network.device) if recipe.local.proximal else None
    first, steps = int(task.parameters["first_step"]), int(task.parameters["steps"])
    if state.adaptive is not None:
        report = _adaptive_steps(participant, state.adaptive, first, steps, anchor)
    else:
        with _bound_optimizer(participant):
            report = _steps(participant, first, steps, anchor)
    reached = network.flat.vector.cpu()
    if not recipe.updates.links:
        return _contribution(participant, task, report, {"parameters": reached})
    return _contribution(participant, task, report, _packed(participant, task, shared - reached))


def stream(participant: Participant, task: Task, shared: Tensor) -> Contribution:
    """Local steps that go on from one's own parameters, and an update of the fragment whose turn it is.

    While the last update travelled, ``pending`` steps went on. What has come back of it is mixed in where it arrived,
    ``theta_i,p <- alpha theta_i,p + (1 - alpha) Theta_p``, and after the other steps the next fragment leaves, with
    ``Delta_p = Theta_p - theta_i,p`` (Streaming DiLoCo, arXiv 2501.18512).
    """
    recipe, state, vector = participant.recipe, participant.state, participant.network.flat.vector
    assert isinstance(recipe.rounds.streaming, Streaming)
    vector.copy_(shared if state.own is None else state.own)
    with _bound_optimizer(participant):
        overlapped = _overlapped(participant)
        for place in _changed(state.merged, task.revision, len(participant.fragments)):
            fragment = participant.fragments[place]
            theirs = fragment.take(shared).to(vector.device)
            fragment.put(vector, theirs.lerp(fragment.take(vector), recipe.rounds.streaming.mixing))
        rest = _steps(participant, int(task.parameters["first_step"]), int(task.parameters["steps"]))
    state.own = vector.to("cpu", copy=True)
    state.merged = task.revision
    _go_on(state, task)
    fragment = _turn(participant, task)
    if recipe.updates.links:
        tensors = _packed(participant, task, fragment.take(shared) - fragment.take(state.own))
    else:
        tensors = {"parameters": fragment.take(state.own)}
    return _contribution(participant, task, joined(overlapped, rest), tensors)


def eager(participant: Participant, task: Task, shared: Tensor) -> Contribution:
    """A round of local steps while the last round's updates travel; one's own part in the outer step is taken at once.

    ``own`` is where the participant's round starts. After it ``Delta_i = own - theta_i`` leaves, and the next round
    starts from ``Theta - g Delta_i / M``: the newest shared state, which lacks this round's updates, and the
    participant's own part of what this one will do to it, with gain g = eta, for Nesterov eta (1 + mu). A form of eager
    updates (arXiv 2502.12996) in which the outer optimizer stays with the coordinator.
    """
    recipe, state, vector = participant.recipe, participant.state, participant.network.flat.vector
    start = shared if state.own is None else state.own
    vector.copy_(start)
    with _bound_optimizer(participant):
        overlapped = _overlapped(participant)
        rest = _steps(participant, int(task.parameters["first_step"]), int(task.parameters["steps"]))
    delta = start - vector.cpu()
    tensors = _packed(participant, task, delta)
    outer = recipe.outer
    assert isinstance(outer, OuterSgd | OuterNesterov)  # the recipe refuses others
    gain = outer.learning_rate * (1 + outer.momentum if isinstance(outer, OuterNesterov) else 1)
    state.own = torch.sub(shared, delta, alpha=gain / recipe.asked_per_round)
    _go_on(state, task)
    return _contribution(participant, task, joined(overlapped, rest), tensors)


def evaluate(participant: Participant, task: Task, shared: Tensor) -> Contribution:
    """The shared state's loss on the participant's held-out text: sums, so that they add up to the union's."""
    if participant.validation is None:
        raise TrainingError(f"{participant.name} has no held-out text")
    shard = participant.validation
    participant.network.flat.vector.copy_(shared)
    nats, tokens = negative_log_likelihood(participant.network, shard.tokens, participant.recipe.local.sequence_length)
    header = {"nats": nats, "tokens": tokens, "bytes": shard.text_bytes}
    return Contribution(kind="evaluate", revision=task.revision, header=header)


def predict(participant: Participant, task: Task) -> Contribution:
    """What the participant's own model says comes next; neither the run's model nor its state take part in it."""
    if participant.predictor is None:
        raise TrainingError(f"{participant.name} has no model of its own to predict with")
    return answered(participant.predictor, task)


def edit(participant: Participant, task: Task) -> Contribution:
    """A participant's answer in an edit by many, about the shared state and the layers that the edit has changed.

    The shared state stays what it is until the coordinator says otherwise.
    """
    editor, state = participant.editor, participant.state
    if editor is None:
        raise TrainingError(f"{participant.name} takes part in no edits")
    maps = {name: tensor for name, tensor in task.tensors.items() if name.startswith(CHANGED)}
    rest = {name: tensor for name, tensor in task.tensors.items() if name not in maps}
    start = now = torch.empty(0)
    try:
        if task.kind != CLAIMS:
            start = absorb(participant.recipe.updates.download, participant.fragments, rest, state.shared)
            state.shared = start
            now = editor.changed(start, {int(name.removeprefix(CHANGED)): tensor for name, tensor in maps.items()})
            if state_hash(now) != task.state:
                state.shared = None  # the coordinator will send all of it
                raise TrainingError("the shared state here is not the one that the task names")
        return editor.answer(replace(task, tensors=rest), start, now)
    except (EditError, ValueError) as error:
        raise TrainingError(str(error)) from error


_TASKS: Mapping[str, Callable[[Participant, Task, Tensor], Contribution]] = {
    "train": train,
    "stream": stream,
    "eager": eager,
    "evaluate": evaluate,
}


def _steps(participant: Participant, first: int, count: int, anchor: Tensor | None = None) -> StepReport:
    """Local steps ``first`` to ``first + count`` of the run, from where the network is."""
    recipe, network = participant.recipe, participant.network
    _seed_dropout(network.device, seed_of(recipe.seed, participant.name, first))
    rates = (rate_factor(recipe.local.schedule, s, recipe.total_local_steps) for s in range(first, first + count))
    report = local_steps(network, participant.optimizer, recipe.local, lambda _: _draw(participant), rates, anchor)
    participant.state.tokens += report.tokens
    return report


def _overlapped(participant: Participant) -> StepReport:
    """The steps while the last update travelled: those that were taken then, or else now."""
    state = participant.state
    if state.ahead is None:
        report = _steps(participant, *state.pending)
    else:
        report, reached = state.ahead
        participant.network.flat.vector.copy_(reached)
    state.pending, state.ahead = (0, 0), None
    return report


def _adaptive_steps(
    participant: Participant, streams: AdaptiveState, first: int, count: int, anchor: Tensor | None
) -> StepReport:
    """The same of all streams, with batches as large as each of them asks for."""
    recipe, network, state = participant.recipe, participant.network, participant.state
    table = recipe.local.adaptive_batch
    assert table is not None

    def draw(rows: int) -> list[Tensor]:
        state.cursor += rows
        return [torch.from_numpy(batches.draw(state.cursor - rows, rows)) for batches in participant.batches]

    _seed_dropout(network.device, seed_of(recipe.seed, participant.name, first))
    rates = [rate_factor(recipe.local.schedule, s, recipe.total_local_steps) for s in range(first, first + count)]
    report = stream_steps(network, participant.optimizer, recipe.local, table, streams, draw, rates, anchor)
    state.tokens += report.tokens
    return report


@contextmanager
def _bound_optimizer(participant: Participant) -> Iterator[None]:
    """The inner optimizer goes on from the participant's moments; what a failing one has done stays done."""
    state, optimizer = participant.state, participant.optimizer
    optimizer.bind(state.moments, state.optimizer_steps)
    try:
        yield
    finally:
        state.optimizer_steps = optimizer.steps
        optimizer.release(state.moments)


def _changed(merged: int, revision: int, fragments: int) -> list[int]:
    """Fragments that outer steps ``merged + 1`` to ``revision`` have changed; they take turns."""
    return sorted({(number - 1) % fragments for number in range(merged + 1, revision + 1)})


def _turn(participant: Participant, task: Task) -> Fragment:
    return participant.fragments[task.revision % len(participant.fragments)]


def _go_on(state: LocalState, task: Task) -> None:
    """Note the local steps that may be taken while the update travels: they come just after those of the task."""
    after = int(task.parameters["first_step"]) + int(task.parameters["steps"])
    state.pending = (after, int(task.parameters.get("overlap", 0)))


def _packed(participant: Participant, task: Task, delta: Tensor) -> dict[str, Tensor]:
    """The pseudo-gradient of the fragment whose turn it is, through the links."""
    recipe, fragments = participant.recipe, participant.fragments
    link, place = link_of(recipe.updates.links), task.revision % len(fragments)
    if task.parameters.get("lost"):  # what error feedback keeps of an update that did not count would count twice
        participant.state.links = tuple(link.init(fragment.layout) for fragment in fragments)
    draw = seed_of(recipe.seed, "links", task.revision)
    return pack(link, delta, fragments[place].layout, participant.state.links[place], draw)


def _contribution(
    participant: Participant, task: Task, report: StepReport, tensors: Mapping[str, Tensor]
) -> Contribution:
    cursor = participant.state.cursor
    return Contribution(
        kind=task.kind,
        revision=task.revision,
        header={
            "loss": report.loss,
            "steps": report.steps,
            "skipped_steps": report.skipped_steps,
            "tokens": report.tokens,
            "examples": report.examples,
            "cursor": cursor,
            "epoch": cursor // participant.batches[0].sequences,
        },
        tensors=tensors,
    )


def _seed_dropout(device: torch.device, seed: int) -> None:
    """``torch.manual_seed`` where it counts; that one also formats a traceback for every backend not yet in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _draw(participant: Participant) -> list[Tensor]:
    """The batches of the next local step; the cursor moves on."""
    local, state = participant.recipe.local, participant.state
    drawn = []
    for _ in range(local.accumulation):
        drawn += [torch.from_numpy(b.draw(state.cursor, local.batch_size)) for b in participant.batches]
        state.cursor += local.batch_size
    return drawn
