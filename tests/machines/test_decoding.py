"""Decoding together with a participant behind a message server."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.asking import local_recipe
from potluck.compose.decoding.decode import Sampling, decode
from potluck.compose.decoding.models import Here
from potluck.compose.decoding.participants import AtParticipant, answered
from potluck.compose.decoding.rules import Speculative
from potluck.contribution import Contribution, Task
from potluck.corpus.tokenizer import build_vocabulary
from potluck.engine.nats.site import Site
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import EngineError, Interrupted, PotluckError, RecipeError, TrainingError
from potluck.hosting import say_about
from potluck.joining import Joined, attend
from potluck.local.network import place
from potluck.models.build import build_model
from potluck.models.export import export_folder
from potluck.recipe import load_recipe
from potluck.recipe.part import load_part
from potluck.records.journal import Journal
from potluck.sent import Sent
from tests.machines.world import World

V, END, PROMPT = 48, 0, [0, 7, 11]


def tiny(name: str, seed: int) -> Here:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=END, eos_token_id=END, initializer_range=0.3,
    )  # fmt: skip
    return Here(name, LlamaForCausalLM(config).eval(), V)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, ("ada", "bob"))
    yield world
    world.close()


def test_a_participant_over_nats_says_what_its_model_would(world: World) -> None:
    small, large = tiny("small", 0), tiny("large", 1)
    asked: list[Task] = []

    def perform(name: str, task: Task) -> Contribution:
        asked.append(task)
        return answered(large, task)

    def fails(name: str, task: Task) -> Contribution:
        raise TrainingError("has no model of its own")

    world.attend("ada", perform)
    world.attend("bob", fails)
    world.wait_for_all()
    how: dict[str, Any] = {"max_tokens": 12, "stops": {END}, "sampling": Sampling()}
    ada = AtParticipant(world.engine, "ada", V)
    found = decode(small, [ada], Speculative(3), PROMPT, **how)
    assert found.tokens == decode(small, [tiny("large", 1)], Speculative(3), PROMPT, **how).tokens
    counts = found.counts["ada"]
    assert counts.calls == len(asked) > 1 and counts.predictions == sum(int(t.parameters["positions"]) for t in asked)
    assert counts.sent_bytes > 8 * sum(len(t.tensors["tokens"]) for t in asked)
    assert counts.received_bytes > 2 * V * counts.predictions and counts.seconds > 0
    again = decode(small, [ada], Speculative(3), PROMPT, **how)  # the same questions are answered anew
    assert again.tokens == found.tokens and len(asked) == 2 * counts.calls
    text = [END, *range(1, 20)]
    assert torch.equal(ada.gold(text).log_p, large.gold(text).log_p)
    with pytest.raises(EngineError, match="bob did not foretell: has no model of its own"):
        AtParticipant(world.engine, "bob", V).log_probs([1])
    assert not world.told


def test_who_does_not_answer_is_given_up(world: World) -> None:
    world.site("ada")
    world.site("bob")
    world.wait_for_all()
    with pytest.raises(EngineError, match="ada did not answer within"):
        AtParticipant(world.engine, "ada", V, seconds=0.3).log_probs([1])


@pytest.mark.parametrize("own", ["model", "foreign"])
def test_who_joined_answers_with_its_own_model(tmp_path: Path, recipe_file: Path, texts: Path, own: str) -> None:
    """As `potluck join` does it, under its policy; nothing of it stays on its disk."""
    recipe = load_recipe(recipe_file, ["engine={kind='nats', heartbeat=0.2}"])
    vocabulary = build_vocabulary(recipe, {})
    network = place(build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, 0), recipe.compute)
    other = build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, 7)
    export_folder(other, recipe.tokenizer, vocabulary.tokenizer, vocabulary.end_of_text, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "foreign")
    file = tmp_path / "foreign" / "tokenizer.json"
    swapped = json.loads(file.read_text())
    words = swapped["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(swapped))
    source = {"source": {"path": str(texts / "ada")}, "predicts_with": str(tmp_path / own)}
    part = load_part(None, source, {}, ["predict"])
    world = World(tmp_path / "world", recipe.participant_names)
    journal = Journal(tmp_path / "join.log", lambda text: None)
    sent = Sent(tmp_path / "at" / "sent.jsonl", part.limits)
    over, failures = threading.Event(), list[Exception]()
    try:
        say_about(world.engine, world.post(COORDINATOR), recipe, vocabulary, network)
        site = Site(world.post("ada"), "ada", recipe.engine, lambda _: None)
        mine = local_recipe(recipe, "ada", part, str(tmp_path / "shards"))
        own_model = Path(part.predicts_with)
        joined = Joined(site, "ada", mine, part.policy, tmp_path / "at", journal, sent, over.is_set, own_model)

        def work() -> None:
            try:
                attend(joined)
            except PotluckError as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        if own == "foreign":
            thread.join(30)
            assert "another tokenizer than the run" in str(failures)
            return
        until = time.monotonic() + 30
        while world.members.presence("ada") != "ready":
            assert time.monotonic() < until and not failures, failures
            time.sleep(0.01)
        tokens = [vocabulary.end_of_text, 5, 6]
        rows = AtParticipant(world.engine, "ada", vocabulary.size).log_probs(tokens, 2)
        assert torch.allclose(rows, Here("own", other.eval(), vocabulary.size).log_probs(tokens, 2), rtol=2**-10)
        assert not list((tmp_path / "at").rglob("*.safetensors"))
        over.set()
        thread.join(30)
        assert joined.tasks == 1 and [type(error) for error in failures] == [Interrupted]
    finally:
        over.set()
        sent.close()
        world.close()
        journal.close()


def test_a_part_names_the_model_and_allows_the_kind(texts: Path) -> None:
    source = {"source": {"path": str(texts / "ada")}}
    for changes, allow in ((source, ["predict"]), ({**source, "predicts_with": "model"}, [])):
        with pytest.raises(RecipeError, match="one needs the other"):
            load_part(None, changes, {}, allow)
