"""Adaptive outer rules at their defaults, on pseudo-gradients of local steps of AdamW."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from potluck.aggregation.outer import init_outer, outer_step
from potluck.recipe.local import Cosine
from potluck.recipe.outer import outer_warnings
from potluck.recipe.schedules import rate_factor

ADAPTIVE = ("adam", "yogi", "adagrad")
RATE = 2e-3


def distances(rule, steps, rounds):
    """From the mean of two participants' goals, after each round of AdamW steps on noisy gradients; 1 at first."""
    draw = torch.Generator().manual_seed(0)
    goals = 0.05 * torch.randn(2, 300, generator=draw)
    goal, theta = goals.mean(0), torch.zeros(300)
    everybody = [torch.zeros(300, requires_grad=True) for _ in goals]
    optimizers = [torch.optim.AdamW([own], lr=RATE, betas=(0.9, 0.99), weight_decay=0.0) for own in everybody]
    state, found = init_outer(rule, theta), [1.0]
    for first in range(0, steps * rounds, steps):
        for own, optimizer, towards in zip(everybody, optimizers, goals, strict=True):
            own.data.copy_(theta)
            for step in range(first, first + steps):
                optimizer.param_groups[0]["lr"] = RATE * rate_factor(Cosine(), step, steps * rounds)
                own.grad = own.detach() - towards + 0.05 * torch.randn(300, generator=draw)
                optimizer.step()
        outer_step(rule, theta, torch.stack([own.detach() for own in everybody]).mean(0), state)
        found.append(float((theta - goal).norm() / goal.norm()))
    return found


@pytest.mark.parametrize(("steps", "rounds"), [(10, 20), (50, 5)])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_at_its_defaults_a_rule_comes_near_and_never_turns_away(make_recipe, kind, steps, rounds) -> None:
    local = {"optimizer": {"kind": "adamw", "learning_rate": RATE}}
    recipe = make_recipe(2, rounds={"count": rounds, "local_steps": steps}, local=local, outer={"kind": kind})
    found = distances(recipe.outer_rule, steps, rounds)
    assert all(after < before + 0.05 for before, after in pairwise(found))
    assert found[-1] < 0.25  # plain averaging: 0.19 and 0.12; with FedOpt's eta and tau up to 3.4


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_the_first_step_is_that_of_a_plain_mean_times_one_minus_beta1(make_recipe, kind) -> None:
    rule = make_recipe(2, rounds={"local_steps": 16}, outer={"kind": kind}).outer_rule
    tau = 2e-3 * 4 * (3 if kind == "adagrad" else 1)
    assert (rule.epsilon, rule.learning_rate) == pytest.approx((tau, 2 * tau))
    theta, delta = torch.zeros(5), 1e-4 * torch.arange(5.0)
    outer_step(rule, theta, delta, init_outer(rule, theta), of="pseudo-gradient")
    torch.testing.assert_close(theta, -(1 - rule.beta1) * delta, rtol=0.02, atol=0)


def test_what_is_given_stays_and_a_fragment_counts_all_steps_between_its_exchanges(make_recipe) -> None:
    given = {"kind": "adam", "learning_rate": 0.1, "epsilon": 0.2}
    assert make_recipe(2, outer=given).outer_rule == make_recipe(2, outer=given).outer
    rounds = {"count": 4, "local_steps": 8, "streaming": {"kind": "streaming", "fragments": 2}}
    assert make_recipe(2, outer={"kind": "yogi"}, rounds=rounds).outer_rule.epsilon == pytest.approx(2e-3 * 4)


def test_with_local_sgd_a_fixed_tau_bounds_the_steps(make_recipe) -> None:
    rule = make_recipe(2, local={"optimizer": {"kind": "sgd"}}, outer={"kind": "adam"}).outer_rule
    assert (rule.epsilon, rule.learning_rate) == (5e-3, 1e-2)


@pytest.mark.parametrize(
    ("outer", "told"),
    [
        ({"kind": "adam", "learning_rate": 0.1, "epsilon": 1e-3}, "outer.learning_rate 0.1"),  # once the default
        ({"kind": "adam", "beta1": 0.9}, "outer.beta1 0.9 over 30 outer steps"),
        ({"kind": "adam"}, None),
        ({"kind": "adagrad"}, None),
    ],
)
def test_check_warns_of_what_was_measured_to_go_wrong(make_recipe, outer, told) -> None:
    recipe = make_recipe(2, rounds={"local_steps": 10}, outer=outer)
    found = list(outer_warnings(recipe.outer, recipe.local.optimizer, 10, 30))
    assert len(found) == (told is not None)
    assert told is None or found[0].startswith(told)
