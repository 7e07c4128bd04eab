"""Synchronous rounds: the state goes out, contributions come back, one outer step is taken.

::

    for round in 1 .. R:
        ask a sample of the participants for H local steps from theta
        mean  <- sum_i w_i theta_i / sum_i w_i       over those who contributed
        theta <- outer_step(theta, mean)             pseudo-gradient Delta = theta - mean

FedAvg (arXiv 1602.05629) with H local steps; DiLoCo (arXiv 2311.08105) with AdamW inside and Nesterov outside.
``examples/one_file_diloco.py`` tells the same in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from potluck.aggregation.mean import Aggregator
from potluck.aggregation.outer import outer_step
from potluck.contribution import Header, Task
from potluck.engine.protocol import Engine
from potluck.errors import Interrupted, TooFewContributors, TrainingError
from potluck.recipe import Recipe
from potluck.records.events import EventLog
from potluck.rounds.evaluation import evaluate_shared
from potluck.rounds.receiving import FIGURES, examine, in_order
from potluck.rounds.sampling import asked_by_round
from potluck.rounds.state import SharedState


def run_rounds(
    recipe: Recipe,
    trainers: Sequence[str],
    engine: Engine,
    aggregator: Aggregator,
    shared: SharedState,
    log: EventLog,
    checkpoint: Callable[[float | None], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Run the rounds that are left, changing ``shared``.

    Args:
        trainers: Who trains; everybody on the engine's roster evaluates.
        checkpoint: Saves everything, given the union's held-out bits per byte if it was just measured.
        stop_requested: Asked after each round.

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
        score = None
        if last or shared.revision % settings.evaluate_every == 0:
            score = evaluate_shared(engine, shared, log)
        if stop:
            log.write("run_interrupted", round=shared.revision)
        if last or stop or shared.revision % recipe.records.checkpoint_every == 0:
            checkpoint(score)
        if stop:
            raise Interrupted(f"after round {shared.revision} of {settings.count}")


def one_round(
    recipe: Recipe, names: Sequence[str], engine: Engine, aggregator: Aggregator, shared: SharedState, log: EventLog
) -> None:
    """Ask ``names`` for local steps, average what they reached, take the outer step."""
    began, number, steps = engine.now(), shared.revision + 1, recipe.local_steps
    task = Task(
        kind="train",
        revision=shared.revision,
        parameters={"first_step": shared.revision * steps, "steps": steps},
        tensors={"parameters": shared.theta},
    )
    sent = {engine.send(name, task): name for name in names}
    aggregator.init()
    contributors = tokens = 0
    for reply in in_order(engine, sent):
        verdict = examine(reply, shared, steps)
        facts: dict[str, object] = {"reason": verdict.reason}
        if verdict.contribution is not None:
            header = verdict.contribution.header
            weight = _weight(recipe, header)
            aggregator.accumulate(verdict.contribution.tensors["parameters"], weight)
            contributors, tokens = contributors + 1, tokens + int(header["tokens"])
            facts |= {"weight": weight, "update_norm": verdict.update_norm, **{key: header[key] for key in FIGURES}}
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
        if verdict.contribution is None and recipe.rounds.on_failure == "stop":
            raise TrainingError(f"round {number}: {reply.participant} did not contribute: {verdict.reason}")
    if contributors < recipe.min_contributors:
        raise TooFewContributors(
            f"round {number}: {contributors} of {len(names)} contributed, "
            f"rounds.min_contributors is {recipe.min_contributors}",
            "the events of this round say why each participant failed; mend that and resume",
        )
    delta_norm = outer_step(recipe.outer, shared.theta, aggregator.finish(), shared.outer)
    shared.revision, shared.total_tokens = number, shared.total_tokens + tokens
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


def _weight(recipe: Recipe, header: Header) -> float:
    match recipe.rounds.weights:
        case "uniform":
            return 1.0
        case counted:
            return float(header[counted])
