"""The coordinator's side of a run on real machines: keys and server, who is there, the rounds, the end.

A host that is started again in the same run folder goes on: with the same keys, the server that is still there or a
new one on the same store, and the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from potluck.asking import MAX_WORD_BYTES, words_of
from potluck.contribution import ParticipantId, Task
from potluck.corpus.tokenizer import (
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
    vocabulary_from_words,
)
from potluck.edit.together.maps import Maps
from potluck.edit.together.sums import message_bytes
from potluck.embedded import edited_maps, environment, fragments_in
from potluck.engine.nats.claim import Claim
from potluck.engine.nats.coordinator import NatsEngine
from potluck.engine.nats.frames import signed
from potluck.engine.nats.post import Post
from potluck.engine.nats.presence import Members
from potluck.engine.nats.refusals import Told
from potluck.engine.nats.run_status import Presence
from potluck.engine.protocol import Engine
from potluck.errors import CheckpointError, Interrupted, ModelError, TrainingError
from potluck.files import write_text
from potluck.local.network import Network, place
from potluck.local_store import layout_hash
from potluck.models.build import build_model
from potluck.recipe import Recipe
from potluck.recipe.engine import Nats
from potluck.recipe.load import renamed_paths
from potluck.recipe.schema import Bpe
from potluck.recipe.sources import Data
from potluck.records.checkpoint import Checkpoint
from potluck.records.journal import Journal
from potluck.rounds.figures import MOST
from potluck.run import Facts, Parts
from potluck.traffic import Messages
from potluck.untrusted import checked, load_json
from potluck.updates.fragments import Fragment

LOOK_SECONDS = 0.2
_HEADROOM = 1 << 16  # bytes of a message beside its tensors


@dataclass
class Hosted:
    """The participants' side of a hosted run, as `potluck.run.Run` sees it.

    Attributes:
        layout: Names and shapes of the model's parameters.
        holdings: What each participant said it holds when it first joined, by name.
        edited: Where the layers that the recipe edits lie in the shared state.
    """

    nats: NatsEngine
    recipe: Recipe
    vocabulary: Vocabulary
    initial: Tensor
    fragments: tuple[Fragment, ...]
    layout: list[list[Any]]
    machine: dict[str, Any]
    holdings: Path
    edited: Maps

    def engine(self) -> Engine:
        """What reaches the participants."""
        return self.nats

    def identity(self) -> Facts:
        """Tokenizer and the shapes of the network; each participant's text is held to its first."""
        return {"tokenizer": self.vocabulary.content_hash, "model": self.layout}

    def description(self) -> Facts:
        """Everybody's holding, and the coordinator's machine."""
        known = _read_holdings(self.holdings)
        nothing = {f"{side}_{what}": 0 for side in ("train", "validation") for what in ("tokens", "bytes", "documents")}
        people = [
            known.get(name, {"name": name, "content_hash": "", **nothing}) for name in self.recipe.participant_names
        ]
        return {"participants": people, "environment": self.machine}

    def maps(self) -> Maps:
        """Where the edited layers lie."""
        return self.edited

    def saved(self) -> tuple[Facts, Parts]:
        """Nothing: participants keep their state themselves."""
        return {}, {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Nothing: participants go back by themselves to the state that a task begins from."""


def start_engine(recipe: Recipe, post: Post, refused: Told, claim: Claim, mend: Callable[[], list[str]]) -> NatsEngine:
    """The engine, which listens from now on.

    Args:
        refused, mend: As of `NatsEngine`.
        claim: The right to coordinate this run.
    """
    assert isinstance(recipe.engine, Nats)
    members = Members(post.connection, post.names, recipe.participant_names, recipe.engine.silence)
    presence = Presence(post.connection, post.names, claim)
    presence.progress["rounds"] = recipe.rounds.count
    return NatsEngine(post, members, recipe.engine, 2 * MAX_WORD_BYTES, refused, presence, mend)


def gather(
    recipe: Recipe, engine: NatsEngine, post: Post, folder: Path, journal: Journal, stop: Callable[[], bool]
) -> Hosted:
    """Wait for the participants and agree with them on vocabulary and model, so that the rounds can begin.

    Raises:
        Interrupted: A stop was asked for.
        TrainingError: A participant's words cannot be used.
        CorpusError, ModelError: Tokenizer or model cannot be used.
    """
    assert isinstance(recipe.engine, Nats)
    members = engine.members
    if not (folder / "tokenizer").exists():  # a run that goes on has said more already
        say_about(engine, post, recipe, None, None)
    vocabulary = _vocabulary(recipe, engine, folder, journal, stop)
    network = place(build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed), recipe.compute)
    fragments = fragments_in(network, recipe)
    messages = Messages(recipe, tuple((entry.name, entry.shape) for entry in network.flat.manifest))
    edited = edited_maps(network, recipe)
    statistics = 0 if recipe.editing is None else message_bytes(edited, recipe.editing)
    engine.max_reply_bytes = max(statistics, *map(messages.update, range(len(fragments)))) + _HEADROOM
    say_about(engine, post, recipe, vocabulary, network, stop)
    holdings = folder / "host" / "holdings.json"
    members.unfit = _fitness(holdings, vocabulary, layout_hash(network), recipe.data)
    members.holds = lambda name: _read_holdings(holdings).get(name, {}).get("train_tokens", 0)
    hosted = Hosted(
        engine,
        recipe,
        vocabulary,
        network.flat.vector.cpu().clone(),
        fragments,
        network.layout,
        environment(network),
        holdings,
        edited,
    )
    _wait(engine, recipe.engine.start_with or len(recipe.participant_names), journal, stop, reading=False)
    for name, member in members.of.items():
        members.unfit(name, member.said)  # notes the holding
    return hosted


def say_about(
    engine: NatsEngine,
    post: Post,
    recipe: Recipe,
    vocabulary: Vocabulary | None,
    network: Network | None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tell participants what the run is: recipe without anybody's sources or paths, vocabulary, the model's layout."""
    bare = recipe.model_copy(
        update={
            "participants": tuple(p.model_copy(update={"source": None, "edits": None}) for p in recipe.participants)
        }
    )
    raw = bare.model_dump(mode="json", exclude_none=True, exclude={"records": {"folder"}, "compute": True})
    raw = renamed_paths(raw, lambda _: "elsewhere")
    facts: dict[str, Any] = {"run": post.names.run, "recipe": raw}
    payload = b""
    if vocabulary is not None and network is not None:
        payload = vocabulary.tokenizer.to_str().encode()
        named = packed_text(payload)
        facts |= {
            "end_of_text": vocabulary.end_of_text,
            "stops": sorted(vocabulary.stops),
            "beginning": list(vocabulary.beginning),
            "model": layout_hash(network),
            "parameters": network.flat.vector.numel(),
            "message": {"payload": named},
        }
        if len(payload) > recipe.engine.inline_bytes:  # type: ignore[union-attr]
            post.blobs.put(None, named["sha256"], [memoryview(payload)], stop)
            payload = b""
    engine.presence.tell_about(signed(post.seed, facts, payload))


def packed_text(payload: bytes) -> dict[str, Any]:
    """Size and hash of a payload, as a message names them."""
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def _vocabulary(
    recipe: Recipe, engine: NatsEngine, folder: Path, journal: Journal, stop: Callable[[], bool]
) -> Vocabulary:
    """The run's vocabulary: kept from an earlier session, made here, or trained on the sum of everybody's words."""
    try:
        return load_vocabulary(folder / "tokenizer")
    except ModelError:
        pass
    if isinstance(recipe.tokenizer, Bpe):
        journal("the tokenizer is trained on everybody's words: waiting for all participants")
        _wait(engine, len(recipe.participant_names), journal, stop, reading=True)
        vocabulary = vocabulary_from_words(_words(recipe, engine, stop), recipe.tokenizer.vocab_size)
    else:
        vocabulary = build_vocabulary(recipe, {})
    save_vocabulary(vocabulary, folder / "tokenizer")
    return vocabulary


def _words(recipe: Recipe, engine: NatsEngine, stop: Callable[[], bool]) -> Counter[str]:
    """The sum of all participants' counts."""
    sent = {engine.send(name, Task(kind="words", revision=0)): name for name in recipe.participant_names}
    total: Counter[str] = Counter()
    until = engine.now() + (recipe.deadline or 0.0)
    while sent:
        reply = engine.receive(LOOK_SECONDS)
        if stop():
            raise Interrupted("while words were counted")
        if engine.now() > until:
            raise TrainingError(f"no count of words came from {', '.join(sent.values())}")
        if reply is None or reply.task not in sent:
            continue
        name = sent.pop(reply.task)
        if reply.contribution is None:
            raise TrainingError(f"{name} did not count its words: {reply.reason}")
        try:
            total.update(words_of(reply.contribution, recipe.data.train_bytes))
        except TrainingError as error:
            engine.refused(name, f"{error}; the tokenizer is trained without its words", 1)
    if not total:
        raise TrainingError("nobody's count of words could be used")
    return total


def _wait(engine: NatsEngine, count: int, journal: Journal, stop: Callable[[], bool], reading: bool) -> None:
    """Wait until so many participants are there; say whenever somebody comes or goes."""
    shown: dict[str, str] = {}
    while True:
        away = {name: engine.members.away(name, reading, silent=False) for name in engine.members.of}
        for name, reason in away.items():
            if reason != shown.get(name, "has not joined"):
                journal(f"{name}: {reason or 'is here'}", participant=name)
        shown = away
        if sum(not reason for reason in away.values()) >= count:
            return
        if stop():
            raise Interrupted("while participants were waited for")
        engine.receive(LOOK_SECONDS)


def _fitness(
    path: Path, vocabulary: Vocabulary, layout: str, data: Data
) -> Callable[[ParticipantId, Mapping[str, Any]], str]:
    """What makes a participant unfit: another vocabulary or model, or other text than it first joined with."""
    known = _read_holdings(path)

    def unfit(name: ParticipantId, said: Mapping[str, Any]) -> str:
        holding = said.get("holding")
        if holding is None:
            return ""
        if said.get("vocabulary") != vocabulary.content_hash or said.get("model") != layout:
            return "has another vocabulary or model"
        said_holding, reason = _clean_holding(name, holding, data)
        if said_holding is None:
            return reason
        if name not in known:
            known[name] = said_holding
            write_text(path, json.dumps(known))
        return "" if known[name] == said_holding else "came back with other text"

    return unfit


def _clean_holding(name: str, holding: Mapping[str, Any], data: Data) -> tuple[dict[str, Any] | None, str]:
    """What a participant says it holds, or why that cannot be."""
    sizes = [f"{side}_{what}" for side in ("train", "validation") for what in ("tokens", "bytes", "documents")]
    numbers: dict[str, int] = {key: holding[key] for key in sizes}
    if any(number >= MOST for number in numbers.values()):
        return None, "says of its text what cannot be"
    for side, cap in (("train", data.train_bytes), ("validation", data.validation_bytes)):
        if cap is not None and numbers[f"{side}_bytes"] > cap:
            return None, f"holds {numbers[f'{side}_bytes']} bytes, data.{side}_bytes is {cap}"
    return {"name": name, "content_hash": holding["content_hash"], **numbers}, ""


def _read_holdings(path: Path) -> dict[str, dict[str, Any]]:
    """What participants said they hold when they first joined.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.exists():
        return {}
    try:
        return checked(dict[str, dict[str, Any]], load_json(path))
    except (OSError, ValueError) as error:
        hint = "restore it; without it participants are taken to hold what they say next"
        raise CheckpointError(f"{path}: damaged ({error})", hint) from None
