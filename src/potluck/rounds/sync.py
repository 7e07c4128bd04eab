"""The rounds: the state goes out, contributions come back, one outer step is taken.

::

    for round in 1 .. R:
        ask a sample of the participants for H local steps from theta
        mean  <- sum_i w_i theta_i / sum_i w_i       over those who contributed
        theta <- outer_step(theta, mean)             pseudo-gradient Delta = theta - mean

FedAvg (arXiv 1602.05629) with H local steps; DiLoCo (arXiv 2311.08105) with AdamW inside and Nesterov outside.
``examples/one_file_diloco.py`` tells the same in one file. With links the mean is that of decoded pseudo-gradients.
With fragments theta is the one whose turn it is, and each has an outer optimizer of its own: Streaming DiLoCo
(arXiv 2501.18512). What overlaps is in the tasks, so the loop is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

from torch import Tensor

from potluck.aggregation.mean import Aggregator
from potluck.aggregation.outer import outer_step
from potluck.contribution import Header, Reply, Scalar, Task
from potluck.engine.protocol import Engine
from potluck.errors import Interrupted, TooFewContributors, TrainingError
from potluck.recipe import Recipe
from potluck.recipe.schedules import rate_factor
from potluck.recipe.seeds import seed_of
from potluck.recipe.updates import Eager
from potluck.records.events import EventLog
from potluck.rounds.evaluation import Facts, evaluate_shared
from potluck.rounds.figures import FIGURES, limits_of
from potluck.rounds.receiving import Asked, Verdict, Window, examine, in_order
from potluck.rounds.sampling import asked_by_round
from potluck.rounds.state import Late, SharedState
from potluck.updates.links import link_of


def run_rounds(
    recipe: Recipe,
    trainers: Sequence[str],
    engine: Engine,
    aggregator: Aggregator,
    shared: SharedState,
    log: EventLog,
    checkpoint: Callable[[Facts | None], None],
    stop_requested: Callable[[], bool],
    amend: Callable[[Facts | None], tuple[bool, Facts | None]] = lambda found: (False, found),
) -> None:
    """Run the rounds that are left, changing ``shared``.

    Args:
        trainers: Who trains; everybody on the engine's roster evaluates.
        checkpoint: Saves everything, given the evaluation if there was just one.
        stop_requested: Asked after each round.
        amend: May change the shared state after each round; told the evaluation, it says whether it did, and the new
            one.

    Raises:
        TooFewContributors: A round had fewer contributions than ``rounds.min_contributors``.
        TrainingError: A participant failed and ``rounds.on_failure`` is ``stop``.
        Interrupted: A stop was requested; the last completed round is saved.
    """
    settings = recipe.rounds
    asked = asked_by_round(trainers, recipe.asked_per_round, settings.sampling, recipe.seed)
    for names in islice(asked, shared.revision, settings.count):
        one_round(recipe, names, engine, aggregator, shared, log)
        last = shared.revision == settings.count
        stop = stop_requested() and not last
        found = None
        if last or shared.revision % settings.evaluate_every == 0:
            found = evaluate_shared(engine, shared, log, recipe.deadline)
        amended, found = amend(found)
        if stop:
            log.write("run_interrupted", round=shared.revision)
        if last or stop or amended or shared.revision % (recipe.records.checkpoint_every or 1) == 0:
            checkpoint(found)
        if stop:
            raise Interrupted(f"after round {shared.revision} of {settings.count}")


def one_round(
    recipe: Recipe, names: Sequence[str], engine: Engine, aggregator: Aggregator, shared: SharedState, log: EventLog
) -> None:
    """Ask ``names`` for local steps, average their updates of the fragment whose turn it is, take its outer step."""
    began, number = engine.now(), shared.revision + 1
    asked, window = what_is_asked(recipe, shared, shared.revision, _texts(recipe, names)), _window(recipe, engine)
    tasks = {name: _task(recipe, engine, shared, name) for name in names}
    sent = {engine.send(name, task): name for name, task in tasks.items()}

    def judged(reply: Reply, wanted: Asked) -> Verdict:
        return _weighable(recipe, engine, examine(reply, shared, wanted), reply.participant)

    counts = lambda reply: judged(reply, asked).vector is not None  # noqa: E731
    aggregator.init(asked.fragment.size)
    contributors = tokens = 0
    for reply, wanted in chain(
        ((reply, asked) for reply in in_order(engine, sent, window, shared.arrived, counts)),
        _from_earlier(recipe, engine, shared),
    ):
        verdict = judged(reply, wanted)
        facts: dict[str, object] = {"reason": verdict.reason}
        if wanted.revision < shared.revision:
            facts["staleness"] = shared.revision - wanted.revision
        if verdict.vector is not None:
            weight = _weight(recipe, engine, reply.participant, verdict.header)
            aggregator.accumulate(verdict.vector, weight)
            contributors, tokens = contributors + 1, tokens + int(verdict.header["tokens"])
            figures = {key: verdict.header[key] for key in FIGURES}
            facts |= {"weight": weight, "update_norm": verdict.update_norm, **figures}
        _note(engine, shared, reply, verdict, tasks)
        log.write(
            "contribution",
            round=number,
            participant=reply.participant,
            status=verdict.status,
            **facts,
            down_bytes=reply.down_bytes,
            up_bytes=reply.up_bytes,
            seconds=reply.seconds,
        )
        if verdict.vector is None and recipe.rounds.on_failure == "stop":
            raise TrainingError(f"round {number}: {reply.participant} did not contribute: {verdict.reason}")
    if contributors < recipe.min_contributors:
        raise _too_few(recipe, number, contributors, len(names))
    delta_norm = _outer_step(recipe, shared, asked, aggregator.finish())
    shared.tidy()
    shared.total_tokens += tokens
    log.write(
        "round",
        round=number,
        revision=shared.revision,
        asked=len(names),
        contributors=contributors,
        delta_norm=delta_norm,
        total_tokens=shared.total_tokens,
        seconds=engine.now() - began,
    )


def _too_few(recipe: Recipe, number: int, contributors: int, asked: int) -> TooFewContributors:
    return TooFewContributors(
        f"round {number}: {contributors} of {asked} contributed, rounds.min_contributors is {recipe.min_contributors}",
        "the events of this round say why each participant failed; mend that and resume. Of simulated devices a "
        "resume draws anew who is there: lower rounds.min_contributors if it fails often",
    )


def what_is_asked(recipe: Recipe, shared: SharedState, revision: int, texts: int = 1) -> Asked:
    """Of the round after ``revision``: fragments take turns; without links an update is parameters, unless eager."""
    links = recipe.updates.links
    plain = not links and not isinstance(recipe.rounds.streaming, Eager)
    return Asked(
        kind=recipe.training_kind,
        fragment=shared.fragments[revision % len(shared.fragments)],
        link=None if plain else link_of(links),
        draw=seed_of(recipe.seed, "links", revision),
        limits=limits_of(recipe, texts),
        revision=revision,
        max_norm=recipe.rounds.max_update_norm,
    )


def _texts(recipe: Recipe, names: Sequence[str]) -> int:
    """How many texts a local step draws from: everybody's where somebody trains who holds none, the pooled run."""
    return 1 if set(names) <= set(recipe.participant_names) else len(recipe.participant_names)


def _window(recipe: Recipe, engine: Engine) -> Window:
    ends = None if recipe.deadline is None else engine.now() + recipe.deadline
    return Window(ends, recipe.min_contributors, recipe.rounds.grace)


def _from_earlier(recipe: Recipe, engine: Engine, shared: SharedState) -> Iterator[tuple[Reply, Asked]]:
    """What came late of the last round and is kept; whoever has not even answered by now is given up."""
    replies = {reply.task: reply for reply in shared.arrived if reply.task in shared.late}
    for task, late in list(shared.late.items()):
        if task in replies:
            yield replies[task], what_is_asked(recipe, shared, late.task.revision)
        elif late.task.revision < shared.revision:
            engine.cancel(task)
            del shared.late[task]
            _missed(shared, late.participant)
    shared.arrived.clear()


def _task(recipe: Recipe, engine: Engine, shared: SharedState, name: str) -> Task:
    """Local steps for one participant, with what it lacks of the shared state."""
    number = shared.revision + 1
    head, tail = recipe.steps_of_round(number)
    parameters: dict[str, Scalar] = {"first_step": number * recipe.local_steps - head, "steps": head}
    if tail:
        parameters["overlap"] = tail
    if name in shared.lost:
        parameters["lost"] = True
        shared.lost.discard(name)  # told; should this update not count either, the next task tells it again
    return Task(
        kind=recipe.training_kind,
        revision=shared.revision,
        parameters=parameters,
        tensors=shared.downloads.tensors(name, shared.given, shared.revision),
        state=shared.digest if engine.remote else "",
        seconds=recipe.patience,
    )


def _note(engine: Engine, shared: SharedState, reply: Reply, verdict: Verdict, tasks: Mapping[str, Task]) -> None:
    """Of one whose update does not count, nothing is taken for granted; one that is late may count yet."""
    known = shared.late.pop(reply.task, None)
    if verdict.vector is not None:
        return
    if verdict.status == "late" and shared.outlived and known is None:
        shared.late[reply.task] = Late(reply.participant, replace(tasks[reply.participant], tensors={}))
        shared.downloads.forget(reply.participant)  # what it is sent meanwhile must not build on this task
        return
    engine.cancel(reply.task)
    _missed(shared, reply.participant)


def _missed(shared: SharedState, name: str) -> None:
    """An update did not count: what error feedback keeps of it is void, and it may not hold what it was sent."""
    shared.downloads.forget(name)
    shared.lost.add(name)


def _outer_step(recipe: Recipe, shared: SharedState, asked: Asked, mean: Tensor) -> float:
    """Step the fragment with its own optimizer, and settle what participants will be told of it."""
    place = shared.revision % len(shared.fragments)
    elements = asked.fragment.take(shared.theta)
    before = elements.clone()
    rate = rate_factor(recipe.local.schedule, shared.revision * recipe.local_steps, recipe.total_local_steps)
    norm = outer_step(recipe.outer_rule, elements, mean, shared.outer[place], asked.of, rate)
    asked.fragment.put(shared.theta, elements)
    shared.revision += 1
    shared.downloads.settle(shared.theta, before, shared.revision)
    return norm


def _weight(recipe: Recipe, engine: Engine, name: str, header: Header) -> float:
    """What a contribution weighs: tokens or examples of its local steps, the text that its participant holds, or 1."""
    match recipe.rounds.weights:
        case "uniform":
            return 1.0
        case "data":
            return float(engine.roster()[name].holds)
        case counted:
            return float(header[counted])


def _weighable(recipe: Recipe, engine: Engine, verdict: Verdict, name: str) -> Verdict:
    """The verdict, but for one whose contribution would weigh nothing: it is rejected."""
    if verdict.vector is None or _weight(recipe, engine, name, verdict.header) > 0:
        return verdict
    return Verdict(
        status="rejected", reason="it said that it holds no training text, by which contributions are weighed"
    )
