"""Means and outer steps against plain PyTorch, bit for bit, and against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.nn.functional import cross_entropy

from potluck.aggregation import outer as outer_module
from potluck.aggregation.mean import WeightedMean
from potluck.aggregation.outer import init_outer, outer_step
from potluck.contribution import Contribution
from potluck.models.build import build_model
from potluck.recipe.outer import Outer

RULES = [
    {"kind": "sgd"},
    {"kind": "sgd", "learning_rate": 0.3},
    {"kind": "sgd", "learning_rate": 0.5, "momentum": 0.8},
    {"kind": "nesterov"},
    {"kind": "nesterov", "momentum": 0.0},
    {"kind": "adam", "learning_rate": 0.1, "beta1": 0.9, "epsilon": 1e-3},
    {"kind": "yogi", "learning_rate": 0.1, "beta1": 0.9, "epsilon": 1e-3},
    {"kind": "adagrad", "learning_rate": 0.1, "beta1": 0.5, "epsilon": 1e-3},
    {"kind": "sign", "learning_rate": 0.1, "weight_decay": 0.2},
]
each_rule = pytest.mark.parametrize("table", RULES, ids=lambda table: "-".join(map(str, table.values())))
sizes, seeds = st.integers(1, 200), st.integers(0, 2**32 - 1)


def rule_of(table: dict[str, Any]) -> Outer:
    return TypeAdapter(Outer).validate_python(table)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# --- plain training -------------------------------------------------------------------------------


def plain_optimizers(kind: str, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    table = [p for name, p in model.named_parameters() if "embed" in name]
    if kind == "sgd":
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors}]
        return [torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)]
    groups = [{"params": matrices if kind == "adamw" else table}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=True)
    return [adamw] if kind == "adamw" else [torch.optim.Muon(inner, lr=0.02, momentum=0.95, weight_decay=0.1), adamw]


INNER = {"adamw": {}, "sgd": {"momentum": 0.9, "weight_decay": 0.01}, "muon": {}}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize(("rounds", "steps"), [(10, 1), (2, 5)])
def test_one_participant_is_plain_training_bit_for_bit(make_recipe, make_world, kind, rounds, steps) -> None:
    local = {"optimizer": {"kind": kind, **INNER[kind]}, "schedule": {"kind": "cosine", "warmup_steps": 3}}
    recipe = make_recipe(1, rounds={"count": rounds, "local_steps": steps}, local=local)
    world = make_world(recipe)
    batches = world.participants["p0"].batches[0]
    vocabulary = world.participants["p0"].network.model.config.vocab_size

    def factor(step: int) -> float:
        return (step + 1) / 4 if step < 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 7)) / 2

    model = build_model(recipe.model, vocabulary, 0, recipe.seed)
    optimizers = plain_optimizers(kind, model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    for step in range(10):
        tokens = torch.from_numpy(batches.draw(step * 2, 2))
        model.zero_grad()
        cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedulers):
            stepper.step()

    assert torch.equal(world.run(), torch.nn.utils.parameters_to_vector(model.parameters()))


# --- the mean -------------------------------------------------------------------------------------


@given(seeds, st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20), sizes)
@settings(deadline=None)
def test_the_running_mean_is_the_weighted_mean(seed, weights, size) -> None:
    vectors, aggregator = normal(seed, len(weights), size), WeightedMean(size)
    for _ in range(2):  # a round leaves nothing behind for the next
        aggregator.init(size)
        for vector, weight in zip(vectors, weights, strict=True):
            aggregator.accumulate(vector, weight)
    expected = np.average(vectors.double().numpy(), axis=0, weights=weights)
    np.testing.assert_allclose(aggregator.finish().numpy(), expected, atol=1e-6 * math.sqrt(len(weights)))


@given(seeds, st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
@settings(deadline=None)
def test_weights_sum_to_one(seed, weights) -> None:
    """So that the mean of equal vectors is that vector, to the bit."""
    vector, aggregator = normal(seed, 50), WeightedMean(50)
    aggregator.init(50)
    for weight in weights:
        aggregator.accumulate(vector, weight)
    assert torch.equal(aggregator.finish(), vector)


@pytest.mark.parametrize(
    ("vector", "weight"),
    [(torch.zeros(4), w) for w in (0.0, -1.0, math.inf, math.nan)]
    + [(v, 1.0) for v in (torch.zeros(5), torch.zeros(2, 2), torch.zeros(4).double())],
)
def test_the_mean_refuses_what_it_cannot_weigh(vector, weight) -> None:
    aggregator = WeightedMean(4)
    aggregator.init(4)
    with pytest.raises(ValueError, match=r"expected fp32|not positive and finite"):
        aggregator.accumulate(vector, weight)
    with pytest.raises(ValueError, match="no contributions"):
        aggregator.finish()


def test_fedavg_by_hand(make_recipe, make_world) -> None:
    recipe = make_recipe(3, rounds={"count": 1, "local_steps": 1}, local={"sequence_length": 70})
    reached, counts = normal(1, 3, 1000), [5, 70, 1]

    def perform(name, task):
        header = {"loss": 1.0, **dict.fromkeys(("steps", "skipped_steps", "examples", "cursor", "epoch"), 1)}
        header["tokens"] = counts[int(name[1])]
        return Contribution(
            kind="train", revision=task.revision, header=header, tensors={"parameters": reached[int(name[1])]}
        )

    theta = make_world(recipe, normal(0, 1000)).run(perform)
    expected = sum(n * x for n, x in zip(counts, reached.double(), strict=True)) / sum(counts)
    torch.testing.assert_close(theta.double(), expected, atol=1e-6, rtol=0)


# --- the outer step -------------------------------------------------------------------------------


RATE = 0.5  # of the local schedule


def reference(table: dict[str, Any], theta: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The table of docs/algorithms, one line a rule, in float64."""
    rule = rule_of(table).model_dump()
    eta, mu, beta1, beta2 = (rule.get(key, 0.0) for key in ("learning_rate", "momentum", "beta1", "beta2"))
    b, m, v = 0.0, 0.0, rule.get("epsilon", 0.0) ** 2
    for mean in means:
        delta = theta - mean
        b, m = mu * b + delta, beta1 * m + (1 - beta1) * delta
        match rule["kind"]:
            case "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            case "yogi":
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            case "adagrad":
                v = v + delta**2
        match rule["kind"]:
            case "sgd":
                theta = theta - eta * b
            case "nesterov":
                theta = theta - eta * (delta + mu * b)
            case "sign":
                theta = (1 - eta * RATE * rule["weight_decay"]) * theta - eta * RATE * np.sign(delta)
            case _:
                theta = theta - eta * m / (np.sqrt(v) + rule["epsilon"])
    return theta


def check_rule(table: dict[str, Any], size: int, seed: int) -> None:
    rule, theta, means = rule_of(table), normal(seed, size), normal(seed + 1, 3, size)
    expected = reference(table, theta.double().numpy(), means.double().numpy())
    first_delta = float((theta.double() - means[0].double()).norm())
    for of in ("parameters", "pseudo-gradient"):
        stepped, state = theta.clone(), init_outer(rule, theta)
        norms = [
            outer_step(rule, stepped, mean if of == "parameters" else stepped - mean, state, of, RATE) for mean in means
        ]
        np.testing.assert_allclose(stepped.numpy(), expected, atol=2e-5 if "beta1" in rule.model_dump() else 2e-6)
        assert norms[0] == pytest.approx(first_delta, rel=1e-5)


@each_rule
@given(sizes, seeds)
@settings(deadline=None, max_examples=40)
def test_outer_rules_follow_their_equations(table, size, seed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer_module, "_PIECE", 64)
        check_rule(table, size, seed)


@each_rule
def test_outer_rules_cross_real_pieces(table) -> None:
    check_rule(table, 2 * outer_module._PIECE + 7, 0)


@each_rule
@given(seeds)
@settings(deadline=None, max_examples=20)
def test_every_rule_moves_towards_a_single_participant(table, seed) -> None:
    theta, reached = normal(seed, 100), normal(seed + 1, 100)
    before = theta.clone()
    outer_step(rule_of(table), theta, reached, init_outer(rule_of(table), theta))
    assert ((theta - before) * (reached - before) > 0).all()


@given(sizes, seeds)
@settings(deadline=None)
def test_plain_averaging_takes_the_mean_as_it_is(size, seed) -> None:
    theta, mean = normal(seed, size), normal(seed + 1, size)
    outer_step(rule_of({"kind": "sgd"}), theta, mean, {})
    assert torch.equal(theta, mean)
