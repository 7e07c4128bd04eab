"""ColD Fusion: rounds of training and averaging, and the gate that keeps out what does harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from potluck.compose.cold_fusion import Fused, Gate, cold_fusion, fuse_folders, gated
from potluck.compose.merging.rules import Ties
from potluck.compose.training import Lesson

LESSON = Lesson(steps=10, batch_size=2, sequence_length=8, learning_rate=1e-2, device="cpu")


def stream(words: Sequence[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(words, 400).astype(np.int64)


TASKS = {"ada": [stream([1, 2, 3, 4], 0)], "bob": [stream([5, 6, 7, 8], 1)]}
GATE = Gate([stream([1, 2, 3, 4], 2)[:200], stream([5, 6, 7, 8], 3)[:200]], sequence_length=8, device="cpu")


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2)).eval()


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_rounds_lower_the_loss_and_say_how_far(model: PreTrainedModel) -> None:
    start = GATE.loss(model)
    rounds = list(cold_fusion(model, TASKS, GATE, LESSON, rounds=2))
    assert [fused.taken for fused in rounds] == [("ada", "bob")] * 2
    assert start == rounds[0].before > rounds[0].after == rounds[1].before > rounds[1].after
    assert GATE.loss(model) == rounds[1].after


def test_what_does_harm_is_left_out(model: PreTrainedModel) -> None:
    """A contributor whose text is nobody else's, when the others have learned what there is to learn."""
    *_, settled = cold_fusion(model, TASKS, GATE, LESSON, rounds=8)
    eve = {"eve": [stream([15, 16], 4)]}
    (fused,) = cold_fusion(model, {**TASKS, **eve}, GATE, LESSON, rounds=1)
    assert fused.left_out[0] == "eve" and fused.after <= settled.after
    before = weights(model)
    (alone,) = cold_fusion(model, eve, GATE, LESSON, rounds=1)
    assert alone == Fused(alone.before, alone.before, (), ("eve",))
    assert torch.equal(weights(model), before)


def test_folders_are_fused_as_models_in_memory_are(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "theta")
    for name, streams in TASKS.items():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "theta")
        list(cold_fusion(one, {name: streams}, Gate(streams, 8, device="cpu"), LESSON, rounds=1))
        one.save_pretrained(tmp_path / name)
    (expected,) = cold_fusion(model, TASKS, GATE, LESSON, rounds=1)
    found = fuse_folders(tmp_path / "theta", [tmp_path / "ada", tmp_path / "bob"], tmp_path / "next", GATE)
    assert found.taken == (str(tmp_path / "ada"), str(tmp_path / "bob"))
    assert found.after == pytest.approx(expected.after, abs=1e-6)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "next")
    torch.testing.assert_close(weights(fused), weights(model))


def test_refused_folders_leave_nothing_behind(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "theta")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(20, 16))
    model.save_pretrained(tmp_path / "noise")
    fused = fuse_folders(tmp_path / "theta", [tmp_path / "noise"], tmp_path / "next", GATE, Ties(1.0))
    assert (fused.taken, fused.after) == ((), fused.before)
    assert {path.name for path in tmp_path.iterdir()} == {"theta", "noise"}


def test_the_gate_leaves_out_whose_absence_helps_most() -> None:
    harm = {"ada": -0.1, "bob": 0.5, "eve": math.nan, "kim": 0.3}

    def attempt(names: Sequence[str]) -> float:
        return 2 + sum(harm[name] for name in names)

    assert gated(list(harm), attempt, 2.0, 0.0) == Fused(2.0, 1.9, ("ada",), ("eve", "bob", "kim"))
    assert gated(["bob"], attempt, 2.0, 0.5) == Fused(2.0, 2.5, ("bob",), ())
    assert gated([], attempt, 2.0, 0.0) == Fused(2.0, 2.0, (), ())
