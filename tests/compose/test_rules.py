"""Rules on task vectors against plain loops in float64, whatever blocks they come in, and against mergekit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potluck.compose.merging.rules import (
    RULES,
    DareLinear,
    DareTies,
    Della,
    MagnitudePruning,
    Rule,
    Sce,
    Sign,
    TaskArithmetic,
    Ties,
    even_weights,
    merged,
)
from potluck.compose.merging.sparsity import magnitude_thresholds, uniform
from potluck.errors import RecipeError

Array = np.ndarray
EVERY = [
    TaskArithmetic(0.3),
    MagnitudePruning(0.3, 0.7),
    Ties(),
    Ties(0.4, "frequency", "count", 1.5),
    DareLinear(0.3, seed=5),
    DareTies(0.6, sign="frequency"),
    Della(0.5, 0.3, divisor="count"),
    Sce(0.4),
    Sce(),
]
some_deltas = st.tuples(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 13), st.integers(0, 2**32), st.sampled_from(["normal", "few"])
)


def deltas_of(count: int, rows: int, columns: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Task vectors, of few distinct values (zeros and ties) or normal, and weights."""
    draw = torch.Generator().manual_seed(seed)
    deltas = torch.randn(count, rows, columns, generator=draw)
    if kind == "few":
        deltas = (2 * deltas).round() / 8
    return deltas, torch.rand(count, generator=draw) + 0.1


# --- the same, slowly ----------------------------------------------------------------------------


def trim(task: Array, density: float) -> Array:
    k = max(1, round(density * task.size))
    least = np.sort(np.abs(task), axis=None)[-k]
    return np.where(np.abs(task) >= least, task, 0)


def drop(task: Array, keep: Any, draws: Array) -> Array:
    return np.where(draws < keep, task / keep, 0)


def elect_and_average(kept: Array, weights: Array, sign: str, divisor: str) -> Array:
    out = np.zeros(kept.shape[1:])
    for place in np.ndindex(*out.shape):
        entries = kept[(slice(None), *place)]
        votes = weights if divisor == "weights" else np.ones(len(weights))
        total = (votes * (entries if sign == "total" else np.sign(entries))).sum()
        elected = 1 if total >= 0 else -1
        if entries.any() and abs(total) < 1e-6:
            out[place] = np.nan  # rounding decides
            continue
        agree = np.sign(entries) == elected
        if agree.any():
            out[place] = (weights * entries)[agree].sum() / votes[agree].sum()
    return out


def reference(rule: Rule, name: str, weights: Tensor, deltas: Tensor) -> Array:
    tasks, w = deltas.double().numpy(), weights.double().numpy()
    density = getattr(rule, "density", 1.0)
    draws = uniform(getattr(rule, "seed", 0), name, deltas.shape, 0).numpy()
    match rule:
        case TaskArithmetic():
            merged = np.einsum("n,nrc->rc", w, tasks)
        case MagnitudePruning():
            merged = np.einsum("n,nrc->rc", w, np.stack([trim(task, density) for task in tasks]))
        case Ties():
            merged = elect_and_average(np.stack([trim(t, density) for t in tasks]), w, rule.sign, rule.divisor)
        case DareLinear():
            merged = np.einsum("n,nrc->rc", w, drop(tasks, density, draws))
        case DareTies():
            merged = elect_and_average(drop(tasks, density, draws), w, rule.sign, rule.divisor)
        case Della():
            ranks = np.abs(tasks).argsort(-1, kind="stable").argsort(-1, kind="stable")
            ranks = ranks / (tasks.shape[-1] - 1) if tasks.shape[-1] > 1 else ranks + 0.5
            keep = density - rule.epsilon + 2 * rule.epsilon * ranks
            merged = elect_and_average(drop(tasks, keep, draws), w, rule.sign, rule.divisor)
        case Sce():
            merged = sce(tasks, w, rule.select)
        case _:
            raise AssertionError(rule)
    return getattr(rule, "scale", 1.0) * merged


def sce(tasks: Array, weights: Array, select: float) -> Array:
    variance = torch.from_numpy(tasks).float().var(dim=0, correction=0).numpy()
    if select < 1:
        k = max(1, round(select * np.count_nonzero(variance)))
        tasks = tasks * (variance >= np.sort(variance, axis=None)[-k])
    energy = (tasks**2).sum((1, 2))
    coefficients = weights * (energy / energy.sum() if energy.sum() else 1)
    elected = np.where(tasks.sum(0) >= 0, 1, -1)
    agree = np.sign(tasks) == elected
    below = np.einsum("n,nrc->rc", coefficients, agree)
    return np.einsum("n,nrc->rc", coefficients, tasks * agree) / np.where(below == 0, 1, below)


# --- what must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@settings(max_examples=25, deadline=None)
@given(given_deltas=some_deltas)
def test_a_rule_is_its_formula(rule: Rule, given_deltas: tuple[int, int, int, int, str]) -> None:
    deltas, weights = deltas_of(*given_deltas)
    found, expected = merged(rule, "layer", weights, deltas).numpy(), reference(rule, "layer", weights, deltas)
    np.testing.assert_allclose(np.where(np.isnan(expected), np.nan, found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@settings(max_examples=25, deadline=None)
@given(given_deltas=some_deltas, cut=st.integers(1, 9))
def test_blocks_change_nothing(rule: Rule, given_deltas: tuple[int, int, int, int, str], cut: int) -> None:
    deltas, weights = deltas_of(*given_deltas)
    combine = rule.fit("layer", weights, lambda: deltas.split(cut, dim=1))
    pieces = [combine(block.clone(), i * cut) for i, block in enumerate(deltas.split(cut, dim=1))]
    torch.testing.assert_close(torch.cat(pieces), merged(rule, "layer", weights, deltas), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "rule", [*(kind(density=1.0) for kind in (MagnitudePruning, Ties, DareLinear, DareTies)), Sce()]
)
def test_nothing_removed_from_one_model_is_that_model(rule: Rule) -> None:
    deltas, _ = deltas_of(1, 3, 7, 0, "few")
    torch.testing.assert_close(merged(rule, "layer", torch.ones(1), deltas), deltas[0])
    same = deltas.expand(4, -1, -1).contiguous()
    torch.testing.assert_close(merged(rule, "layer", torch.tensor(even_weights(rule, 4)), same), deltas[0])


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_models_that_learned_nothing_leave_the_base(rule: Rule) -> None:
    assert not merged(rule, "layer", torch.ones(3), torch.zeros(3, 2, 5)).any()


@settings(max_examples=60, deadline=None)
@given(given_deltas=some_deltas, density=st.floats(0.01, 1))
def test_thresholds_are_exact(given_deltas: tuple[int, int, int, int, str], density: float) -> None:
    deltas, _ = deltas_of(*given_deltas)
    n = deltas[0].numel()
    thresholds = magnitude_thresholds(lambda: deltas.split(2, dim=1), density)
    if density < 1:
        assert thresholds.tolist() == [t.abs().flatten().sort().values[-max(1, round(density * n))] for t in deltas]


def test_what_is_drawn_depends_on_name_model_and_seed_and_is_even() -> None:
    shape = torch.Size((2, 100, 101))
    first, second = drawn = uniform(0, "a", shape, 0)
    others = [second, uniform(1, "a", shape, 0)[0], uniform(0, "b", shape, 0)[0], uniform(0, "a", shape, 1)[0]]
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert all((first != other).float().mean() > 0.99 for other in others)


def test_a_tie_elects_plus() -> None:
    deltas = torch.tensor([[[3.0, -1.0, 0.0]], [[-3.0, 1.0, 0.0]]])
    assert merged(Ties(1.0), "layer", torch.ones(2), deltas).tolist() == [[3, 1, 0]]


def test_the_two_meanings_of_ties() -> None:
    deltas = torch.tensor([3.0, -2.0, -2.0]).reshape(3, 1, 1)
    weights = torch.tensor([4.0, 1.0, 1.0])
    assert merged(Ties(1.0), "layer", weights, deltas).item() == 3  # the weights vote, and divide
    assert merged(Ties(1.0, divisor="count"), "layer", weights, deltas).item() == -2  # they only scale


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Ties(density=0),
        lambda: DareLinear(density=1.5),
        lambda: Sce(select=-0.1),
        lambda: Della(density=0.1, epsilon=0.2),
        lambda: Della(density=0.9, epsilon=0.2),
        lambda: Ties(sign="loudest"),  # type: ignore[arg-type]
        lambda: Ties(divisor="none"),  # type: ignore[arg-type]
        lambda: merged(Ties(), "layer", torch.tensor([1.0, -1.0]), torch.ones(2, 1, 1)),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(RecipeError):
        wrong()


def test_every_rule_has_a_name() -> None:
    assert {type(rule) for rule in EVERY} == set(RULES.values())


# --- beside PEFT, and mergekit (`make peers`) --------------------------------------------------------------


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_count_means_ties_as_peft(sign: Sign) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils").ties
    deltas, weights = deltas_of(4, 16, 32, 3, "normal")
    ours = merged(Ties(0.25, sign, "count"), "layer", weights, deltas)
    torch.testing.assert_close(ours, theirs(list(deltas), weights, 0.25, sign))


CASES = [
    (TaskArithmetic(0.7), "task_arithmetic", {"lambda": 0.7}),
    (Ties(0.25), "ties", {"density": 0.25}),
    (Ties(0.25, scale=0.5), "ties", {"density": 0.25, "lambda": 0.5}),
    (DareLinear(0.5), "dare_linear", {"density": 0.5, "rescale": False}),
    (DareTies(0.5), "dare_ties", {"density": 0.5, "rescale": False, "normalize": True}),
    (Della(0.5, 0.25), "della", {"density": 0.5, "epsilon": 0.25, "rescale": False}),
    (Sce(), "sce", {}),
    (Sce(0.25), "sce", {"select_topk": 0.25}),
]


@pytest.mark.parametrize(("rule", "method", "parameters"), CASES, ids=repr)
def test_as_mergekit(rule: Rule, method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With our draws in place of its own, and divided by the probability as the papers do."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    draw = torch.Generator().manual_seed(1)
    base, deltas = torch.zeros(32, 48), torch.randn(4, 32, 48, generator=draw)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]) if method != "sce" else torch.ones(4)
    ours = merged(rule, "layer", weights, deltas)
    drawn = iter(uniform(0, "layer", deltas.shape, 0))
    monkeypatch.setattr(torch, "bernoulli", lambda p: (next(drawn) < p) / p)
    given_weights = {} if method == "sce" else {"weight": weights.tolist()}
    theirs = api.merge_tensors([base, *deltas], method, parameters={**given_weights, **parameters}, base_index=0)
    assert (theirs - (base + ours)).abs().max() <= 1e-5
