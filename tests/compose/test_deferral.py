"""Learned deferral: gates against a plain reference, the budget, the rule, and the folder."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.base import Base
from potluck.compose.decoding.decode import Sampling, Text, decode
from potluck.compose.decoding.deferral import (
    Defer,
    Foretold,
    Lesson,
    called,
    fixed_mixture,
    foretold,
    learn_deferral,
    learn_gates,
    losses,
    stretches_of,
    threshold_for,
)
from potluck.compose.decoding.gates import Deferral, Gates, load_deferral, save_deferral
from potluck.compose.decoding.models import Here
from potluck.corpus.tokenizer import vocabulary_of
from potluck.errors import CorpusError, ModelError, RecipeError, StorageError, TrainingError

if TYPE_CHECKING:
    from tests.conftest import Potluck

V, END = 40, 0


def tiny(seed: int) -> Here:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    return Here(f"model {seed}", LlamaForCausalLM(config).eval(), V)


@pytest.fixture(scope="module")
def models() -> list[Here]:
    return [tiny(seed) for seed in range(3)]


def random_text(count: int, assistants: int, seed: int = 0) -> Foretold:
    draw = torch.Generator().manual_seed(seed)
    log_p = torch.randn(count, assistants + 1, 9, generator=draw).log_softmax(-1)
    right = log_p.argmax(-1) == 0
    return Foretold(torch.randn(count, 6, generator=draw), torch.rand(count, generator=draw), log_p[:, :, 0], right)


def two_domains(count: int, seed: int) -> Foretold:
    """Text of two kinds, which the hidden state tells apart: the base is good at one, the assistant at the other."""
    draw = torch.Generator().manual_seed(seed)
    theirs = torch.rand(count, generator=draw) < 0.25
    hidden = torch.randn(count, 6, generator=draw)
    hidden[:, 0] += torch.where(theirs, 3.0, -3.0)
    good, bad = -1 - torch.rand(count, generator=draw), -4 - torch.rand(count, generator=draw)
    log_p = torch.stack([torch.where(theirs, bad, good), torch.where(theirs, good, bad)], dim=1)
    return Foretold(hidden, torch.zeros(count), log_p, log_p > -3)


@pytest.mark.parametrize("assistants", [1, 3])
def test_the_likelihood_is_the_papers(assistants: int) -> None:
    text = random_text(50, assistants)
    draw = torch.Generator().manual_seed(1)
    gates = Gates(torch.randn(assistants, 6, generator=draw), torch.randn(assistants, generator=draw))
    turns = gates.log_turns(text.states).double().exp()
    assert torch.allclose(turns.sum(1), torch.ones(50, dtype=torch.double), atol=1e-6)
    if assistants == 1:
        d = (text.states @ gates.rows[0] + gates.bias).double()
        ours = (gates.log_turns(text.states) + text.log_p).logsumexp(1).double()
        base, assistant = text.log_p.double().T
        theirs = torch.logaddexp(
            torch.nn.functional.logsigmoid(-d) + base, torch.nn.functional.logsigmoid(d) + assistant
        )
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.allclose(called(gates.log_turns(text.states)).double(), d.sigmoid(), atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_a_threshold_keeps_to_its_budget(rate: float) -> None:
    log_turns = Gates(torch.ones(1, 6), torch.zeros(1)).log_turns(random_text(1000, 1).states)
    count = int((called(log_turns) > threshold_for(log_turns, rate)).sum())
    assert 1000 * rate - 2 <= count <= 1000 * rate
    equal = torch.full((10, 2), math.log(0.5))
    assert not (called(equal) > threshold_for(equal, 0.5)).any()


def test_losses_are_those_of_what_is_drawn_from() -> None:
    text = random_text(200, 2)
    gates = Gates(torch.randn(2, 6, generator=torch.Generator().manual_seed(2)), torch.zeros(2))
    log_turns = gates.log_turns(text.states)
    threshold = threshold_for(log_turns, 0.4)
    found = losses(log_turns, text.log_p, threshold)
    asked = called(log_turns) > threshold
    assert int(asked.sum()) in (79, 80)
    exact = (log_turns.double().exp(), text.log_p.double().exp(), found.double(), asked)
    for turns, p, loss, called_for in zip(*exact, strict=True):
        k = 1 + int(turns[1:].argmax())
        mixed = (turns[0] * p[0] + turns[k] * p[k]) / (turns[0] + turns[k])
        assert math.exp(-loss) == pytest.approx(float(mixed if called_for else p[0]), rel=1e-4)


def test_gates_learn_whose_text_it_is() -> None:
    learn, test = two_domains(3000, 0), two_domains(1000, 1)
    gates = learn_gates(learn, torch.zeros(6), Lesson(learning_rate=3e-2))
    log_turns = gates.log_turns(test.states)
    loss = float(losses(log_turns, test.log_p, threshold_for(log_turns, 0.3)).mean())
    alone = (-test.log_p.mean(0)).tolist()
    assert loss < 1.65 < min(*alone, fixed_mixture(test.log_p)[1])
    again = learn_gates(learn, torch.zeros(6), Lesson(learning_rate=3e-2))
    assert torch.equal(gates.rows, again.rows) and torch.equal(gates.bias, again.bias)


def test_gates_choose_among_assistants() -> None:
    draw = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 3, (3000,), generator=draw)
    hidden = one_hot(kind, 6).float() * 4
    log_p = torch.where(one_hot(kind, 3).bool(), -1.0, -5.0)
    gates = learn_gates(Foretold(hidden, hidden[:, 0], log_p, log_p > -3), torch.zeros(6), Lesson(learning_rate=3e-2))
    assert torch.equal(gates.log_turns(hidden).argmax(1), kind)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    text = random_text(10, 1)
    never = Foretold(text.states, text.entropy, torch.full((10, 2), -torch.inf), text.right)
    with pytest.raises(TrainingError, match="not finite"):
        learn_gates(never, torch.zeros(6), Lesson())


def test_the_fixed_mixture_is_the_best_of_a_grid() -> None:
    log_p = random_text(500, 1).log_p
    weights, loss = fixed_mixture(log_p)
    grid = torch.linspace(0, 1, 1001)[1:-1]
    mixed = [-float(torch.logaddexp((1 - w).log() + log_p[:, 0], w.log() + log_p[:, 1]).mean()) for w in grid]
    assert loss == pytest.approx(min(mixed), abs=1e-5)
    assert float(weights.sum()) == pytest.approx(1)


# --- models ------------------------------------------------------------------------------------


def test_a_text_is_foretold_stretch_by_stretch(models: list[Here]) -> None:
    stream = np.random.default_rng(0).integers(0, V, 23)
    found = foretold(models[0], models[1:], stretches_of(stream, 8))
    assert found.log_p.shape == (22, 3) and found.states.shape == (22, 32)
    at = 0
    for start in range(0, 22, 8):
        tokens = torch.from_numpy(stream[start : start + 9])
        for column, here in enumerate(models):
            with torch.inference_mode():
                rows = here.model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
            expected = rows.gather(1, tokens[1:, None]).squeeze(1)
            assert torch.allclose(found.log_p[at : at + len(rows), column], expected, atol=1e-5)
        at += len(rows)
    assert (found.entropy > 0).all() and (found.entropy <= math.log(V) + 1e-5).all()
    with pytest.raises(CorpusError):
        stretches_of(stream[:1], 8)


def test_the_rule_calls_an_assistant_above_its_threshold_only(models: list[Here]) -> None:
    base, assistants = models[0], models[1:]
    gates = Gates(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, -0.1]))
    rule = Defer(gates, 0.6)
    found = decode(base, assistants, rule, [END, 3], max_tokens=30, stops={V}, sampling=Sampling())
    tokens = [END, 3]
    for token, by in zip(found.tokens, found.by, strict=True):
        rows, states = base.look(tokens)
        turns = gates.log_turns(states[-1]).exp()
        if 1 - turns[0] > 0.6:
            k = int(turns[1:].argmax())
            other = assistants[k].log_probs(tokens)[-1].exp()
            assert by == assistants[k].name
            assert token == int((turns[0] * rows[-1].exp() + turns[1 + k] * other).argmax())
        else:
            assert by == base.name and token == int(rows[-1].argmax())
        tokens.append(token)
    assert len(found.said) > 1
    assert sum(found.counts[model.name].calls for model in assistants) == 30 - found.said[base.name]


def test_a_threshold_of_one_is_the_base_alone(models: list[Here]) -> None:
    gates = Gates(torch.zeros(1, 16), torch.ones(1))
    for threshold, speaker in ((1.0, models[0]), (0.0, models[1])):
        (said,) = Defer(gates, threshold)(models[0], [models[1]], Text([1, 2], 5), Sampling())
        assert said.by == speaker.name


def test_what_deferral_refuses(models: list[Here]) -> None:
    class Elsewhere:
        name, vocabulary, whole = "elsewhere", V, True

    rule = Defer(Gates(torch.zeros(1, 16), torch.zeros(1)))
    with pytest.raises(RecipeError, match="1 assistants, 2"):
        rule.check(models[0], models[1:])
    with pytest.raises(RecipeError, match="in this process"):
        rule.check(Elsewhere(), models[1:2])  # type: ignore[arg-type]


# --- the folder --------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Deferral, Path]:
    draw = torch.Generator().manual_seed(0)
    gates = Gates(torch.randn(2, 6, generator=draw), torch.randn(2, generator=draw))
    deferral = Deferral(gates, 0.25, "a" * 64, ("ada", "bob"), {"called": 0.3})
    save_deferral(deferral, tmp_path / "kept")
    return deferral, tmp_path / "kept"


def test_what_was_learnt_comes_back(kept: tuple[Deferral, Path]) -> None:
    deferral, folder = kept
    found = load_deferral(folder, "a" * 64)
    assert torch.equal(found.gates.rows, deferral.gates.rows) and torch.equal(found.gates.bias, deferral.gates.bias)
    assert (found.threshold, found.assistants, found.figures) == (0.25, ("ada", "bob"), {"called": 0.3})
    assert [path.name for path in folder.parent.iterdir()] == ["kept"]
    with pytest.raises(StorageError, match="already"):
        save_deferral(deferral, folder)
    with pytest.raises(ModelError, match="another base"):
        load_deferral(folder, "b" * 64)


def change_about(folder: Path, **changes: Any) -> None:
    path = folder / "deferral.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, **changes: Tensor) -> None:
    save_file({**load_file(folder / "deferral.safetensors"), **changes}, folder / "deferral.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "deferral.json").unlink(),
        lambda f: (f / "deferral.json").write_text("[]"),
        lambda f: (f / "deferral.safetensors").write_bytes(b"no"),
        lambda f: change_about(f, assistants=["ada"]),
        lambda f: change_about(f, threshold=1.5),
        lambda f: change_about(f, format="another"),
        lambda f: change_tensors(f, bias=torch.tensor([0.0, torch.nan])),
        lambda f: change_tensors(f, rows=torch.zeros(6)),
    ],
)
def test_a_damaged_folder_is_refused(kept: tuple[Deferral, Path], damage: Any) -> None:
    damage(kept[1])
    with pytest.raises(ModelError, match="not a learnt deferral"):
        load_deferral(kept[1], "a" * 64)


# --- from text to text -------------------------------------------------------------------------


def letters() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({chr(96 + n): n for n in range(V)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return vocabulary_of(tokenizer.to_str(), END)


def test_deferral_is_learnt_from_texts(models: list[Here]) -> None:
    base = Base(models[0].model, letters(), "base")
    texts = ["abcdefgh" * 9, "hgfedcba" * 9, "aabbccdd" * 9, "ahbgcfde" * 9]
    lesson = Lesson(rate=0.25, sequence_length=16, epochs=1)
    found = learn_deferral(base, models[0], models[1:], texts, lesson)
    assert found.gates.rows.shape == (2, 32) and found.base_hash == base.content_hash
    assert found.assistants == ("model 1", "model 2")
    assert set(found.figures["nats_per_token"]) == {"model 0", "model 1", "model 2", "best fixed mixture", "deferral"}
    assert found.figures["called"] <= 0.25
    again = learn_deferral(base, models[0], models[1:], texts, lesson)
    assert torch.equal(found.gates.rows, again.gates.rows) and found.figures == again.figures
    with pytest.raises(CorpusError, match="too few"):
        learn_deferral(base, models[0], models[1:], texts[:1], replace(lesson, sequence_length=32))


def test_the_verb_learns_and_generate_defers(potluck: Potluck, tmp_path: Path, tables: Any, texts: Path) -> None:
    from potluck.commands import defer

    run, other = tmp_path / "run", tmp_path / "other"
    potluck("train", potluck.recipe(tables, rounds={"count": 1, "local_steps": 1}), "--set", f"records.folder={run}")
    shutil.copytree(run / "model", other)
    weights = other / "model.safetensors"
    save_file({name: 0.9 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    found = defer(run, [str(other)], texts / "ada", tmp_path / "turns", Lesson(sequence_length=32, epochs=1), "")
    assert found["called"] <= 0.3 and (tmp_path / "turns" / "deferral.safetensors").exists()
    together = ("generate", run, "--assistant", other, "--rule", "deferral", "--deferral", tmp_path / "turns")
    told = potluck(*together, "--max-tokens", 8, "--threshold", 0, "--json").result
    assert told["rule"] == "deferral" and told["models"][str(other)]["said"] == told["models"][str(run)]["calls"]
    potluck("generate", other, "--assistant", run, *together[4:], code=5)
