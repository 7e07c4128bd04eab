"""What participants report of themselves: bounded by what was asked, and a reason to refuse them where it is not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from potluck.asking import words_of
from potluck.contribution import Contribution, HeldOutText, ParticipantInfo
from potluck.engine.inprocess import InProcess
from potluck.errors import TrainingError
from potluck.recipe.sources import Profile
from potluck.rounds.evaluation import better, measure_shared
from potluck.rounds.figures import limits_of, wrong_evaluation, wrong_update

HONEST = {"loss": 2.5, "steps": 5, "skipped_steps": 0, "tokens": 160, "examples": 10, "cursor": 10, "epoch": 0}
EVALUATED = {"nats": 100.0, "tokens": 50, "bytes": 60}
NO_NUMBERS: list[Any] = ["abc", "1", True, -1, 10**400, 1 << 53, math.nan, math.inf, None, [], 1.5]


def test_honest_figures_pass(make_recipe) -> None:
    limits = limits_of(make_recipe(rounds={"local_steps": 5}))
    assert wrong_update(HONEST, limits) == ""
    assert wrong_evaluation(EVALUATED, HeldOutText(50, 60), HeldOutText(50, 60)) == ""


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("key", ["steps", "skipped_steps", "tokens", "examples", "cursor", "epoch"])
def test_counts_are_whole_numbers(make_recipe, key, value) -> None:
    assert wrong_update({**HONEST, key: value}, limits_of(make_recipe(rounds={"local_steps": 5})))


@pytest.mark.parametrize(
    "figures",
    [{"tokens": 161}, {"tokens": 10**9}, {"examples": 11}, {"steps": 6}, {"skipped_steps": 6}, {"steps": 4},
     {"loss": -0.1}, {"loss": 1.7e308}, {"loss": "abc"}, {"loss": True}, {"loss": math.nan}, {"steps": 0}],
    ids=str,
)  # fmt: skip
def test_local_steps_come_to_no_more_than_was_asked_for(make_recipe, figures) -> None:
    assert wrong_update({**HONEST, **figures}, limits_of(make_recipe(rounds={"local_steps": 5})))


def test_streams_and_pooled_texts_may_come_to_more(make_recipe) -> None:
    grown = make_recipe(rounds={"local_steps": 1}, local={"adaptive_batch": {"max_batch_size": 8, "streams": 3}})
    figures = {**HONEST, "steps": 1, "examples": 3 * 4 * 8, "tokens": 3 * 4 * 8 * 16}
    assert wrong_update(figures, limits_of(grown)) == ""
    plain = make_recipe(rounds={"local_steps": 5})
    pooled = {**HONEST, "examples": 30, "tokens": 480}
    assert wrong_update(pooled, limits_of(plain)) and wrong_update(pooled, limits_of(plain, texts=3)) == ""


@pytest.mark.parametrize(
    "figures",
    [{"nats": value} for value in ("abc", -1e6, 1.7e308, 10**400, True, math.nan, 100)]
    + [{"tokens": value} for value in ("abc", 51, 0, -1, True, 10**400)]
    + [{"bytes": value} for value in (1, 10**15, -(10**6), 10**400, 60.0)],
    ids=str,
)
def test_an_evaluation_is_of_the_text_that_is_held_out(figures) -> None:
    assert wrong_evaluation({**EVALUATED, **figures}, HeldOutText(50, 60), None)
    assert wrong_evaluation({**EVALUATED, **figures}, None, HeldOutText(50, 60))


def evaluations(make_recipe, make_world, *answers: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One evaluation after the other, of p0 and p1; p1 gives these answers, ``None`` is out of memory."""
    world = make_world(make_recipe(2), torch.zeros(4))
    said = iter(answers)

    def perform(name: str, task: Any) -> Contribution:
        header = EVALUATED if name == "p0" else next(said)
        if header is None:
            raise TrainingError("out of\nmemory\x1b[31m")
        return Contribution(kind="evaluate", revision=task.revision, header=header)

    engine = InProcess([ParticipantInfo(name=f"p{i}") for i in range(2)], perform, lambda _: 0)
    return [measure_shared(engine, world.shared) for _ in answers]


def test_the_union_is_of_those_who_evaluated_and_says_who_they_are(make_recipe, make_world) -> None:
    whole, bad, away = evaluations(make_recipe, make_world, EVALUATED, {**EVALUATED, "nats": -1e6}, None)
    assert whole["union"]["of"] == ["p0", "p1"] and whole["union"]["bytes"] == 120
    for found, why in ((bad, "figures"), (away, "out of memory [31m")):
        assert found["union"]["of"] == ["p0"] and found["union"]["nats"] == 100.0
        assert why in found["missing"]["p1"]


def test_text_that_changes_between_evaluations_is_refused(make_recipe, make_world) -> None:
    _, grown = evaluations(make_recipe, make_world, EVALUATED, {**EVALUATED, "bytes": 10**6})
    assert "60 bytes" in grown["missing"]["p1"]


def test_evaluations_are_compared_on_the_texts_of_both(make_recipe, make_world) -> None:
    """Without a participant of many bits the union's bits fall, though the model is worse."""
    hard, easy = {**EVALUATED, "nats": 300.0}, {**EVALUATED, "nats": 90.0}
    whole, alone, other = evaluations(make_recipe, make_world, hard, None, easy)
    assert alone["union"]["bits_per_byte"] < whole["union"]["bits_per_byte"]
    assert not better(alone, whole)
    assert better(other, whole) and not better(whole, other)


def test_a_rejected_contribution_is_no_part_of_the_quorum(make_recipe, make_world) -> None:
    """p0 is first and sends nonsense; the grace begins when p1 has contributed, and p2 comes within it."""
    rounds = {"count": 1, "local_steps": 1, "grace": 1.5, "min_contributors": 1, "deadline": 100.0}
    recipe = make_recipe(3, rounds=rounds)
    world = make_world(recipe, torch.zeros(4))
    figures = {**HONEST, "steps": 1, "tokens": 32, "examples": 2}

    def perform(name: str, task: Any) -> Contribution:
        header = {**figures, "tokens": 10**12} if name == "p0" else figures
        return Contribution(kind="train", revision=task.revision, header=header, tensors={"parameters": torch.ones(4)})

    speeds = {"p0": 1.0, "p1": 0.25, "p2": 0.2}
    profiles = {name: Profile(steps_per_second=s, uplink=1e9, downlink=1e9, latency=0) for name, s in speeds.items()}
    world.run(perform, profiles)
    assert [event["status"] for event in world.told("contribution")] == ["rejected", "ok", "ok"]


@pytest.mark.parametrize(
    ("words", "counts"), [(["\ud800"], [1]), (["a", "a"], [1, 2]), (["ab"], [1000]), (["a"], [0])], ids=str
)
def test_words_are_text_and_no_more_than_the_recipe_allows(words, counts) -> None:
    import json

    tensors = {
        "words": torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8),
        "counts": torch.tensor(counts, dtype=torch.int64),
    }
    said = Contribution(kind="words", revision=0, header={}, tensors=tensors)
    with pytest.raises(TrainingError):
        words_of(said, most_bytes=1000)
    fine = replace(said, tensors={**tensors, "words": torch.frombuffer(bytearray(b'["b"]'), dtype=torch.uint8)})
    if counts == [1000]:
        assert words_of(fine, most_bytes=1000) == {"b": 1000}
