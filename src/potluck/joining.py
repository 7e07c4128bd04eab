"""The participant's side of a run on real machines: join, do what is asked and allowed, leave.

::

    read what the run is about; show it beside one's own policy
    prepare text and network
    repeat for each task:
        its answer was kept?         -> send it again
        the policy does not allow it -> say so
        a limit of the owner's is reached -> say so, and leave
        else perform it, keep state and answer on disk, note what leaves, send the answer
        local steps go on while the answer travels, if the task lets them
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from potluck import __version__
from potluck.asking import Asks, Request, about_asks, check_kept, check_size, request_of, words_contribution
from potluck.compose.base import load_base
from potluck.compose.decoding.factory import same_tokens
from potluck.compose.decoding.models import Here
from potluck.compose.decoding.participants import KIND as PREDICT
from potluck.contribution import Contribution
from potluck.corpus.shards import Corpus, Holding, build_corpus
from potluck.corpus.tokenizer import Vocabulary, vocabulary_of
from potluck.edit.facts import usable_edits
from potluck.edit.together.edit_hashes import read_secret
from potluck.embedded import batches_of, environment, fragments_in, held_out_of, site_in
from potluck.engine.nats.about import read_about
from potluck.engine.nats.post import Post
from potluck.engine.nats.site import Received
from potluck.errors import (
    AlreadyServed,
    Damaged,
    EngineError,
    Interrupted,
    ModelError,
    PolicyError,
    PotluckError,
    TrainingError,
)
from potluck.footprint import states_kept
from potluck.joined import Joined
from potluck.local.network import Network, device_named, place
from potluck.local.optimizers import InnerOptimizer
from potluck.local_state import LocalState, new_state
from potluck.local_store import Answer, LocalStore, layout_hash
from potluck.models.build import build_model
from potluck.models.flat import state_hash
from potluck.models.shapes import parameter_count
from potluck.participant import CHANGED, EDITING, Participant
from potluck.recipe import Recipe
from potluck.records.units import bytes_text, duration_text
from potluck.sent import TRAINING

WAIT_SECONDS = 2.0
NOWHERE = -2  # the state in memory is that of no revision


def understand(post: Post, stop: Callable[[], bool]) -> tuple[Asks, Recipe, Vocabulary | None]:
    """What the run is about: wait for the coordinator to say it.

    Raises:
        EngineError: The server is away for long, or it says something that the coordinator did not.
        RecipeError: It is not a recipe that this potluck understands.
    """
    while (about := read_about(post, stop)) is None:
        if stop():
            raise Interrupted("before the coordinator was there")
        time.sleep(WAIT_SECONDS / 4)
    said, payload = about
    asks, recipe = about_asks(said)
    if payload is None or said.end_of_text is None:
        return asks, recipe, None
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise ModelError("not a tokenizer: the run's is no text") from None
    return asks, recipe, vocabulary_of(text, said.end_of_text, said.stops, said.beginning)


def attend(joined: Joined) -> dict[str, Any]:
    """Take part until the run is over or a stop is asked for.

    Raises:
        PolicyError, CorpusError, ModelError, CheckpointError: It cannot take part.
    """
    site = joined.site
    try:
        vocabulary = _vocabulary(joined)
        if vocabulary is None:
            return joined.result("the run was over before it began")
        participant, store = _prepare(joined, vocabulary)
        site.say(status="ready", task="")
        joined.journal("ready", participant=participant.name)
        return joined.result(_serve(joined, participant, store))
    except Interrupted:
        site.say(reason="it was asked to leave")
        raise
    except PotluckError as error:
        site.say(reason=str(error))
        raise
    finally:
        joined.ended = True
        joined.behind.shutdown(wait=True, cancel_futures=True)
        try:
            site.leave()
        except AlreadyServed:
            pass  # another process goes on under this name
        except PotluckError:
            joined.journal("could not say goodbye: the server is away")


def _vocabulary(joined: Joined) -> Vocabulary | None:
    """The run's vocabulary; until there is one, count words if that is asked and allowed."""
    site, stop = joined.site, joined.stop
    while True:
        asks, _, vocabulary = understand(site.post, stop)
        if vocabulary is not None:
            return vocabulary
        if "words" in asks.kinds and "words" not in joined.policy.kinds:
            raise PolicyError(
                "the run trains its tokenizer on everybody's words, and the policy here does not allow `words`",
                "join with --allow words, if the coordinator may know how often each word stands in your text; "
                "or ask for a run with a tokenizer that exists",
            )
        site.say(status="reading", words=True, task="")
        received = site.next(WAIT_SECONDS)
        if received is not None and received.ends:
            received.delivery.done()
            return None
        if received is not None:
            _counted_words(joined, received)
        if stop():
            raise Interrupted("before the run began")


def _counted_words(joined: Joined, received: Received) -> None:
    """Answer a task while there is no vocabulary: words can be counted, and nothing else done."""

    def perform(request: Request) -> Answer:
        if request.kind != "words":
            raise TrainingError(f"there is no vocabulary yet to {request.kind} with")
        return Answer(words_contribution(joined.recipe, request.revision), "")

    joined.site.say(status="working", task=received.name)
    with received.delivery.kept():
        answer = _answer(joined, received, perform)
        if answer is not None:
            _send(joined, received, answer)


def _prepare(joined: Joined, vocabulary: Vocabulary) -> tuple[Participant, LocalStore]:
    """Text, network and state."""
    recipe, name = joined.recipe, joined.name
    _check_size(joined, vocabulary)
    joined.site.say(status="reading", words=False, potluck=__version__)
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    corpus: Corpus = build_corpus(recipe, joined.journal, vocabulary)
    holding: Holding = corpus.holdings[name]
    for note in holding.notes:
        joined.journal(note)
    network = place(build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed), recipe.compute)
    _check_layout(joined, network)
    fragments = fragments_in(network, recipe)
    optimizer = InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
    state = new_state(network, optimizer, recipe, fragments)
    identity = {"run": joined.site.post.names.run, "text": holding.content_hash, "tokenizer": vocabulary.content_hash}
    check_kept(joined.policy, *(kept := states_kept(recipe, network.flat.vector.numel())))
    store = LocalStore(joined.folder, identity, kept[0])
    batches = (batches_of(recipe, holding),)
    predictor = _predictor(joined, vocabulary)
    if joined.edits is not None and recipe.editing is None:
        joined.journal("this run edits no facts: the edits that are named here stay unused")
    elif joined.edits is not None:
        usable_edits(Path(joined.edits), joined.journal)
    secret = None if joined.edit_secret is None else read_secret(joined.edit_secret)
    editor = site_in(network, recipe, name, vocabulary, holding.train.tokens, joined.edits, secret)
    participant = Participant(
        name, recipe, network, optimizer, batches, held_out_of(holding), state, fragments, predictor, editor
    )
    state.shared = store.shared()
    joined.site.say(
        holding=holding.facts,
        evaluates=held_out_of(holding) is not None,
        vocabulary=vocabulary.content_hash,
        model=layout_hash(network),
        environment=environment(network),
    )
    return participant, store


def _predictor(joined: Joined, vocabulary: Vocabulary) -> Here | None:
    """The participant's own model, which must speak the run's vocabulary."""
    if joined.predicts_with is None:
        return None
    own = load_base(joined.predicts_with)
    if not same_tokens(own.vocabulary, vocabulary):
        raise ModelError(f"{own.place}: has another tokenizer than the run", "predicts_with needs the run's")
    model: Any = own.model
    return Here(joined.name, model.to(device_named(joined.recipe.compute.device)), vocabulary.size)


def _check_layout(joined: Joined, network: Network) -> None:
    about = read_about(joined.site.post, joined.stop)
    theirs = about[0].model if about is not None else ""
    if theirs and theirs != layout_hash(network):
        hint = "the same model folder, and the same versions of potluck and transformers, are needed on both sides"
        raise PolicyError("the model here has other parameters than the coordinator's", hint)


def _check_size(joined: Joined, vocabulary: Vocabulary) -> None:
    """Hold the model against the policy, before anything of it is built."""
    count, local, policy = parameter_count(joined.recipe.model, vocabulary.size), joined.recipe.local, joined.policy
    streams = local.adaptive_batch.streams if local.adaptive_batch else 1
    if streams * count > policy.max_parameters:
        times = f"{streams} models side by side" if streams > 1 else "a model"
        raise PolicyError(f"{times} of {count:,} parameters; the policy allows {policy.max_parameters:,}")


def _serve(joined: Joined, participant: Participant, store: LocalStore) -> str:
    """Task after task; the reason why it ended."""
    why = ""
    while not (joined.stop() or (why := joined.sent.over())):
        received = joined.upcoming.result() if joined.upcoming is not None else joined.site.next(WAIT_SECONDS)
        joined.upcoming = None
        if received is None:
            continue
        if received.ends:
            received.delivery.done()
            return received.facts.reason or "the run is over"
        if received.fields.get("kind") in TRAINING and (why := joined.sent.over(received.name)):
            _send(joined, received, Answer(None, why))
            break
        joined.site.say(status="working", task=received.name)
        _one_task(joined, participant, store, received)
        joined.site.say(status="ready", task="", worked_seconds=round(joined.worked_seconds, 1))
    if not why:
        raise Interrupted(
            f"left after {joined.sent.rounds} rounds, {bytes_text(joined.sent.bytes)} sent; the run goes on without "
            f"{joined.name}, and what it took part in stays in the model"
        )
    joined.site.say(reason=why)
    return why


def _one_task(joined: Joined, participant: Participant, store: LocalStore, received: Received) -> None:
    """Answer one task; it is acknowledged when the answer is with the server.

    Where local steps go on while an exchange travels, the answer leaves and the next task comes behind their back.
    """
    with received.delivery.kept():
        answer = _answer(joined, received, lambda request: _kept_or_done(joined, participant, store, received, request))
        if answer is None:
            return
        joined.tasks += 1
        if not participant.state.pending[1] or answer.contribution is None:
            _send(joined, received, answer)
            return
    joined.upcoming = joined.behind.submit(_send_and_fetch, joined, received, answer)
    worked = time.monotonic()
    participant.go_ahead()
    joined.work(time.monotonic() - worked, trains=True)


def _answer(joined: Joined, received: Received, perform: Callable[[Request], Answer]) -> Answer | None:
    """The one road of every task: it is read, held to the policy, and performed; ``None`` if it may come again.

    A refusal and a failure are answers, too. So is a defect of potluck's own, which then ends this process: the task
    is done with, and does not come again to whoever joins next.
    """
    try:
        return perform(request_of(joined.policy, joined.recipe, received.fields, received.payload_bytes))
    except (PolicyError, TrainingError, Damaged) as error:
        joined.journal(f"task {received.name}: {error}")
        return Answer(None, str(error))
    except EngineError as error:
        joined.journal(f"task {received.name}: {error}")
        return None
    except PotluckError:
        raise
    except Exception as error:
        reason = f"a defect of potluck: {type(error).__name__}: {error}"
        joined.site.answer(received.name, None, reason, joined.stop, "defect")
        received.delivery.done()
        raise


def _kept_or_done(
    joined: Joined, participant: Participant, store: LocalStore, received: Received, request: Request
) -> Answer:
    """What a task comes to, or came to before."""
    if (answer := store.answer(received.name)) is None:
        return _perform(joined, participant, store, received, request)
    joined.journal(f"task {received.name} was done before; its answer is sent again")
    return answer


def _send(joined: Joined, received: Received, answer: Answer) -> None:
    began, before = time.monotonic(), joined.sent.bytes
    try:
        joined.site.answer(received.name, answer.contribution, answer.reason, _too_late(joined, received))
        received.delivery.done()
    except PotluckError as error:
        joined.journal(f"task {received.name}: the answer could not be sent: {error}")
        return
    sent = f"sent {bytes_text(joined.sent.bytes - before)} in {duration_text(time.monotonic() - began)}"
    done = f"task {received.name}: not done" if answer.contribution is None else _done(joined, answer.contribution)
    joined.journal(f"{done}; {sent}, {bytes_text(joined.sent.bytes)} so far", task=received.name)


def _done(joined: Joined, contribution: Contribution) -> str:
    """What a task came to, for its owner."""
    said, kind, count = contribution.header, contribution.kind, joined.recipe.rounds.count
    if kind in TRAINING:
        return f"round {contribution.revision + 1} of {count}: {said['steps']} local steps, loss {said['loss']:.3g}"
    if kind == "evaluate":
        bits = float(said["nats"]) / (math.log(2) * max(1, int(said["bytes"])))
        when = f"after round {contribution.revision} of {count}" if contribution.revision else "before training"
        return f"{when}: held-out {bits:.3g} bits/byte"
    return f"task of kind `{kind}` done"


def _send_and_fetch(joined: Joined, received: Received, answer: Answer) -> Received | None:
    """Send an answer, then wait for the next task and fetch its tensors."""
    with received.delivery.kept():
        _send(joined, received, answer)
    while not (joined.stop() or joined.ended):
        upcoming = joined.site.next(WAIT_SECONDS)
        if upcoming is None:
            continue
        with suppress(PolicyError, TrainingError, EngineError), upcoming.delivery.kept():  # they show again later
            if not upcoming.ends:
                request_of(joined.policy, joined.recipe, upcoming.fields, upcoming.payload_bytes)
                joined.site.fetch(upcoming, _too_late(joined, upcoming))
        return upcoming
    return None


def _too_late(joined: Joined, received: Received) -> Callable[[], bool]:
    """Whether a task's transfers are given up: nobody waits for the answer any more by the clock here, or we leave."""
    ends = float("inf") if received.seconds is None else time.monotonic() + received.seconds
    return lambda: time.monotonic() > ends or joined.hurries()


def _perform(
    joined: Joined, participant: Participant, store: LocalStore, received: Received, request: Request
) -> Answer:
    """Do a task and keep what it came to. One that fails changes nothing."""
    state, trains = participant.state, request.kind in TRAINING
    task = joined.site.task(received, _too_late(joined, received))
    if trains and joined.done != store.last_before(task.revision):
        _go_back(joined, participant, store, task.revision)
    if trains:
        joined.journal(f"round {task.revision + 1} of {joined.recipe.rounds.count}: local steps begin")
    worked = time.monotonic()
    joined.done = NOWHERE if trains else joined.done
    contribution = participant.perform(task)
    joined.work(time.monotonic() - worked, trains)
    check_size(joined.policy, contribution)
    if task.kind in EDITING and state.shared is not None and any(not n.startswith(CHANGED) for n in task.tensors):
        store.keep_shared(state.shared, state_hash(state.shared))
    if task.kind == PREDICT or task.kind in EDITING:  # it changes nothing, and is answered again as easily
        return Answer(contribution, "")
    if task.tensors and state.shared is not None:
        store.keep_shared(state.shared, task.state)
    answer = Answer(_lasting(contribution), "")
    store.keep(received.name, task.revision, trains, state, answer)
    if trains:
        joined.done = task.revision
    return answer


def _go_back(joined: Joined, participant: Participant, store: LocalStore, revision: int) -> None:
    """To the state that training from ``revision`` begins with: after a restart, here or at the coordinator."""

    def fresh() -> LocalState:
        return new_state(participant.network, participant.optimizer, participant.recipe, participant.fragments)

    store.go_back(participant.state, fresh, revision)
    joined.done = store.last_before(revision)
    joined.journal(f"going on from the state after round {joined.done + 1}")


def _lasting(contribution: Contribution) -> Contribution:
    """A contribution that outlives the next task: it travels while local steps go on."""
    return replace(contribution, tensors={name: tensor.clone() for name, tensor in contribution.tensors.items()})
