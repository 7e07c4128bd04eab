"""From a few examples: the right adapter first, and a merge no worse than the best of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.adapter import Adapter
from potluck.compose.base import Base
from potluck.compose.library.selection import best_adapters, example_losses, merge_weights
from potluck.compose.lora import attached, train_adapter
from potluck.compose.low_rank import concatenated
from potluck.compose.training import Lesson, loss_on
from potluck.corpus.tokenizer import vocabulary_from_words
from potluck.errors import CorpusError, ModelError, RecipeError

LESSON = Lesson(steps=40, batch_size=4, sequence_length=16, learning_rate=1e-2, device="cpu")


def text(start: int, length: int, seed: int = 0) -> np.ndarray:
    """Numbers of one participant's own five."""
    return start + np.random.default_rng(seed).integers(0, 5, length)


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return Base(LlamaForCausalLM(config).eval(), vocabulary_from_words({"a": 2}, 300), "tiny")


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    return {
        name: train_adapter(base, [text(start, 600)], LESSON, rank=rank)
        for name, start, rank in (("ada", 0, 2), ("bob", 5, 4), ("eve", 10, 3))
    }


def test_the_right_adapter_comes_first(base: Base, adapters: dict[str, Adapter]) -> None:
    for name, start in (("ada", 0), ("bob", 5), ("eve", 10)):
        found = best_adapters(base, adapters, [text(start, 12, 1), text(start, 30, 2)], "cpu")
        assert found[0][0] == name
        assert [loss for _, loss in found] == sorted(loss for _, loss in found)
        assert {other for other, _ in found} == set(adapters)


def test_examples_read_side_by_side_lose_what_each_loses_alone(base: Base) -> None:
    examples = [text(3, length, length) for length in (2, 33, 7, 20)]
    alone = [loss_on(base.model, example, 32, "cpu") for example in examples]
    assert example_losses(base.model, examples, "cpu").tolist() == pytest.approx(alone, rel=1e-5)


def test_the_weights_are_those_of_a_merge_that_is_no_worse(base: Base, adapters: dict[str, Adapter]) -> None:
    examples = [text(0, 20, 1), text(5, 20, 2)]
    weights, loss = merge_weights(base, adapters, examples, picks=4, device="cpu")
    assert set(weights) >= {"ada", "bob"}
    assert sum(weights.values()) == pytest.approx(1)
    assert loss < best_adapters(base, adapters, examples, "cpu")[0][1]
    parts = [adapters[name] for name in weights]
    merged = Adapter(
        {path: concatenated([p.modules[path] for p in parts], list(weights.values())) for path in parts[0].modules}
    )
    with attached(base.model, merged):
        assert float(example_losses(base.model, examples, "cpu").mean()) == pytest.approx(loss, rel=1e-5)


def test_one_pick_is_the_best_adapter(base: Base, adapters: dict[str, Adapter]) -> None:
    weights, loss = merge_weights(base, adapters, [text(5, 20, 1)], picks=1, device="cpu")
    (best, its_loss), *_ = best_adapters(base, adapters, [text(5, 20, 1)], "cpu")
    assert weights == {best: 1.0}
    assert loss == pytest.approx(its_loss, rel=1e-5)


@pytest.mark.parametrize("examples", [[], [np.zeros(1, int)], [np.zeros(34, int)]])
def test_examples_that_cannot_be_read_are_refused(
    base: Base, adapters: dict[str, Adapter], examples: list[np.ndarray]
) -> None:
    with pytest.raises(CorpusError):
        best_adapters(base, adapters, examples, "cpu")


def test_there_must_be_something_to_choose_from(base: Base, adapters: dict[str, Adapter]) -> None:
    for given, picks in (({}, 3), (adapters, 0)):
        with pytest.raises(RecipeError):
            merge_weights(base, given, [text(0, 9)], picks)
    narrow = {path: factors for path, factors in adapters["ada"].modules.items()}
    path = next(iter(narrow))
    narrow[path] = type(narrow[path])(narrow[path].down[:, :3], narrow[path].up)
    with pytest.raises(ModelError, match=path):
        merge_weights(base, {"narrow": Adapter(narrow)}, [text(0, 9)])
