"""Who is asked, what is let in, and what a round does without some."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potluck.contribution import Contribution, Reply
from potluck.errors import TooFewContributors, TrainingError
from potluck.hosting import _fitness
from potluck.recipe.sources import Data, Profile
from potluck.rounds.receiving import in_order
from potluck.rounds.sampling import asked_by_round

SIZE = 50
GOALS = {f"p{i}": torch.full((SIZE,), float(i + 1)) for i in range(4)}
COUNTS = {"p0": 100, "p1": 300, "p2": 500, "p3": 700}
FIGURES = {"loss": 1.0, "steps": 1, "skipped_steps": 0, "examples": 2, "cursor": 2, "epoch": 0}


def update(name, task):
    header = {**FIGURES, "tokens": COUNTS[name], "examples": 8 - 2 * int(name[1])}
    return Contribution(kind="train", revision=task.revision, header=header, tensors={"parameters": GOALS[name]})


def world_of(make_recipe, make_world, **rounds):
    large = {"batch_size": 8, "sequence_length": 350}  # what COUNTS say fits in a step of it
    recipe = make_recipe(4, rounds={"count": 1, "local_steps": 1, **rounds}, local=large)
    return make_world(recipe, torch.zeros(SIZE))


def weighted(weights):
    return sum(weights[name] * GOALS[name] for name in weights) / sum(weights.values())


# --- sampling -------------------------------------------------------------------------------------

people = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just([f"p{i}" for i in range(n)]), st.integers(1, n)))
seeds = st.integers(0, 2**32 - 1)


@given(people, seeds, st.sampled_from(["uniform", "without-replacement"]))
def test_each_round_asks_so_many_different_ones_in_order(who, seed, sampling) -> None:
    names, count = who
    rounds = list(islice(asked_by_round(names, count, sampling, seed), 20))
    for asked in rounds:
        assert len(set(asked)) == count
        assert asked == [name for name in names if name in asked]
    assert rounds == list(islice(asked_by_round(names, count, sampling, seed), 20))


@given(people, seeds)
def test_nobody_serves_twice_before_all_have_served(who, seed) -> None:
    names, count = who
    served = Counter(dict.fromkeys(names, 0))
    for asked in islice(asked_by_round(names, count, "without-replacement", seed), 40):
        served.update(asked)
        assert max(served.values()) - min(served.values()) <= 1


@pytest.mark.parametrize("sampling", ["uniform", "without-replacement"])
def test_everybody_is_asked_as_often_and_seeds_differ(sampling) -> None:
    names = [f"p{i}" for i in range(10)]
    rounds = list(islice(asked_by_round(names, 3, sampling, 0), 1000))
    assert rounds != list(islice(asked_by_round(names, 3, sampling, 1), 1000))
    served = Counter(name for asked in rounds for name in asked)
    assert all(abs(served[name] - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7) for name in names)


# --- receiving ------------------------------------------------------------------------------------


class Scripted:
    """The receiving half of an engine whose replies arrive in a given order, from one working memory."""

    def __init__(self, arrivals) -> None:
        self.arrivals, self.memory = list(arrivals), torch.zeros(1)

    def now(self):
        return 0.0

    def receive(self, timeout=None):
        if not self.arrivals:
            return None
        task = self.arrivals.pop(0)
        self.memory.fill_(task)
        done = Contribution(kind="train", revision=0, tensors={"x": self.memory})
        return Reply(task=task, participant=f"p{task}", status="ok", contribution=done)


@given(st.permutations(range(1, 7)))
def test_early_replies_are_held_back_unchanged(arrivals) -> None:
    replies = in_order(Scripted([99, *arrivals]), {task: f"p{task}" for task in range(1, 7)})
    assert [(r.task, int(r.contribution.tensors["x"])) for r in replies] == [(t, t) for t in range(1, 7)]


def test_a_lost_task_is_an_error() -> None:
    with pytest.raises(TrainingError, match="p2: the engine lost a task"):
        list(in_order(Scripted([1, 3]), {1: "p1", 2: "p2", 3: "p3"}))


# --- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("tokens", COUNTS), ("examples", {"p0": 8, "p1": 6, "p2": 4, "p3": 2}), ("uniform", dict.fromkeys(GOALS, 1))],
)
def test_a_contribution_weighs_what_the_recipe_says(make_recipe, make_world, weights, expected) -> None:
    world = world_of(make_recipe, make_world, weights=weights)
    torch.testing.assert_close(world.run(update), weighted(expected))
    assert [event["weight"] for event in world.told("contribution")] == list(expected.values())
    assert world.shared.total_tokens == sum(COUNTS.values())


def test_data_weighs_by_the_text_that_was_held_at_joining(make_recipe, make_world) -> None:
    """FedAvg's n_k: not by the tokens of the local steps, which are alike; who holds none is rejected."""
    world = world_of(make_recipe, make_world, weights="data")
    world.holds = {"p0": 5, "p1": 0, "p2": 90, "p3": 5}
    held = {name: count for name, count in world.holds.items() if count}
    torch.testing.assert_close(world.run(update), weighted(held))
    told = world.told("contribution")
    assert [event.get("weight") for event in told] == [5, None, 90, 5]
    assert (told[1]["status"], "no training text" in told[1]["reason"]) == ("rejected", True)


@pytest.mark.parametrize("said", [10**400, 2**53, 900], ids=lambda said: str(said)[:9])
def test_a_host_takes_nobody_who_holds_what_is_no_amount_of_text(tmp_path, said) -> None:
    known, vocabulary = tmp_path / "holdings.json", SimpleNamespace(content_hash="v")
    unfit = _fitness(known, vocabulary, "m", Data(train_bytes=800))
    sizes = {f"{side}_{what}": 7 for side in ("train", "validation") for what in ("tokens", "bytes", "documents")}
    first = {"vocabulary": "v", "model": "m", "holding": {"content_hash": "h", **sizes}}
    assert unfit("ada", {**first, "holding": {**first["holding"], "train_bytes": said}})
    assert unfit("ada", first) == ""
    assert unfit("ada", {**first, "holding": {**first["holding"], "validation_bytes": 6}})  # the first word counts


def with_figures(**figures):
    return lambda done: replace(done, header={**done.header, **figures})


def with_parameters(tensor):
    return lambda done: replace(done, tensors={"parameters": tensor})


UNFIT = {
    "NaN": (with_parameters(torch.full((SIZE,), torch.nan)), "not finite"),
    "one infinity": (with_parameters(torch.eye(SIZE)[0] / 0), "not finite"),
    "too short": (with_parameters(torch.zeros(SIZE - 1)), "not the shared state's"),
    "another shape": (with_parameters(torch.zeros(1, SIZE)), "not the shared state's"),
    "another type": (with_parameters(torch.zeros(SIZE).half()), "not the shared state's"),
    "no parameters": (lambda done: replace(done, tensors={}), "not an update"),
    "no figures": (lambda done: replace(done, header={}), "not an update"),
    "another kind": (lambda done: replace(done, kind="evaluate"), "not an update"),
    "another revision": (lambda done: replace(done, revision=7), "revision 7, expected 0"),
    "no step": (with_figures(steps=0), "no local step"),
    "no tokens": (with_figures(tokens=0), "no local step"),
    "no examples": (with_figures(examples=0), "no local step"),
    "less than nothing": (with_figures(tokens=-5), ""),
    "a figure that is text": (with_figures(steps="many"), ""),
    "a figure that is NaN": (with_figures(loss=math.nan), "cannot be sent"),
    "endless tokens": (with_figures(tokens=math.inf), "cannot be sent"),
}


@pytest.mark.parametrize(("spoil", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_is_unfit_is_rejected_and_the_others_form_the_mean(make_recipe, make_world, spoil, reason) -> None:
    world = world_of(make_recipe, make_world, weights="examples" if spoil is UNFIT["no examples"][0] else "tokens")
    theta = world.run(lambda name, task: spoil(update(name, task)) if name == "p1" else update(name, task))
    counts = {"p0": 8, "p2": 4, "p3": 2} if world.recipe.rounds.weights == "examples" else COUNTS
    torch.testing.assert_close(theta, weighted({name: counts[name] for name in ("p0", "p2", "p3")}))
    told = world.told("contribution")
    status = "failed" if "cannot be sent" in reason else "rejected"
    assert [event["status"] for event in told] == ["ok", status, "ok", "ok"]
    assert reason in told[1]["reason"] and "weight" not in told[1]
    assert world.told("round")[0]["contributors"] == 3


def test_more_figures_than_asked_for_are_left_aside(make_recipe, make_world) -> None:
    """What a participant adds to its header cannot pass for what the coordinator says."""
    world = world_of(make_recipe, make_world)
    world.run(lambda name, task: with_figures(round=99, reason="mine", weight=1e9)(update(name, task)))
    assert {(event["round"], event["reason"]) for event in world.told("contribution")} == {(1, "")}
    assert [event["weight"] for event in world.told("contribution")] == list(COUNTS.values())


def failing(*names):
    def perform(name, task):
        if name in names:
            raise TrainingError(f"{name} is out of memory")
        return update(name, task)

    return perform


@pytest.mark.parametrize(
    ("least", "failures", "enough"), [(None, 2, True), (None, 3, False), (4, 1, False), (1, 3, True)]
)
def test_a_round_needs_its_contributors(make_recipe, make_world, least, failures, enough) -> None:
    world = world_of(make_recipe, make_world, min_contributors=least)
    perform = failing(*list(GOALS)[:failures])
    if enough:
        world.run(perform)
        assert world.shared.revision == 1
    else:
        with pytest.raises(TooFewContributors, match=f"round 1: {4 - failures} of 4"):
            world.run(perform)
        assert world.shared.revision == 0 and not world.shared.theta.any()
    reasons = [event["reason"] for event in world.told("contribution")]
    assert reasons == [f"p{i} is out of memory" if i < failures else "" for i in range(4)]


def test_a_failure_stops_the_run_by_policy(make_recipe, make_world) -> None:
    world = world_of(make_recipe, make_world, on_failure="stop")
    with pytest.raises(TrainingError, match="round 1: p2 did not contribute: p2 is out of memory"):
        world.run(failing("p2"))
    assert not world.shared.theta.any()


def test_divergence_everywhere_leaves_the_shared_state_alone(make_recipe, make_world) -> None:
    recipe = make_recipe(
        2, rounds={"count": 1, "local_steps": 8},
        local={"optimizer": {"kind": "adamw", "learning_rate": 1e38}, "max_skipped_steps": 2},
    )  # fmt: skip
    world = make_world(recipe)
    before = world.shared.theta.clone()
    with pytest.raises(TooFewContributors, match="0 of 2"):
        world.run()
    assert torch.equal(world.shared.theta, before)
    assert all("not finite" in event["reason"] for event in world.told("contribution"))


def test_a_sample_is_asked_and_only_it_trains(make_recipe, make_world) -> None:
    world = world_of(make_recipe, make_world, count=4, participants_per_round=2)
    world.run(update)
    asked = [(event["round"], event["participant"]) for event in world.told("contribution")]
    assert Counter(number for number, _ in asked) == Counter({1: 2, 2: 2, 3: 2, 4: 2})
    assert Counter(name for _, name in asked) == Counter(dict.fromkeys(GOALS, 2))


def test_speed_changes_times_and_not_numbers(make_recipe, make_world) -> None:
    recipe = make_recipe(3, rounds={"count": 2, "local_steps": 2}, outer={"kind": "nesterov"})
    slow_first = {f"p{i}": Profile(steps_per_second=4.0**i) for i in range(3)}
    worlds = make_world(recipe), make_world(recipe)
    assert torch.equal(worlds[0].run(), worlds[1].run(profiles=slow_first))
    assert worlds[1].told("round")[0]["seconds"] > 2.0
