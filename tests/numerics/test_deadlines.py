"""A round that does not wait for ever: deadline, quorum and grace, and what becomes of those who are late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from potluck.contribution import Contribution
from potluck.errors import RecipeError, TooFewContributors
from potluck.preflight import _waiting_warnings
from potluck.recipe import Recipe, parse_recipe
from potluck.recipe.sources import Profile

SIZE = 20
FIGURES = {"loss": 1.0, "steps": 1, "skipped_steps": 0, "tokens": 10, "examples": 2, "cursor": 2, "epoch": 0}
# A local step takes p0 1 s, p1 2 s, p2 5 s; journeys take no time.
SPEEDS = {"p0": 1.0, "p1": 0.5, "p2": 0.2}
PROFILES = {
    name: Profile(steps_per_second=speed, uplink=1e9, downlink=1e9, latency=0) for name, speed in SPEEDS.items()
}


def recipe_of(**rounds: Any) -> Recipe:
    people = [{"name": n, "source": {"path": "x"}, "profile": p.model_dump()} for n, p in PROFILES.items()]
    settings = {"count": 3, "local_steps": 1, "evaluate_every": 100, "weights": "uniform", **rounds}
    return parse_recipe({"participants": people, "rounds": settings})


def step_of(name: str, task: Any) -> Contribution:
    """From wherever the state is, p0 steps by 1, p1 by 2, p2 by 4."""
    start = task.tensors["parameters"] if task.tensors else torch.zeros(SIZE)
    reached = start + {"p0": 1.0, "p1": 2.0, "p2": 4.0}[name]
    return Contribution(kind="train", revision=task.revision, header=FIGURES, tensors={"parameters": reached})


def run(make_world: Callable[..., Any], **rounds: Any) -> Any:
    world = make_world(recipe_of(**rounds), torch.zeros(SIZE))
    world.run(step_of, PROFILES)
    return world


def table(world: Any) -> list[tuple[int, str, str, int]]:
    return [(e["round"], e["participant"], e["status"], e.get("staleness", 0)) for e in world.told("contribution")]


def test_a_round_ends_at_its_deadline_with_whoever_has_contributed(make_world: Callable[..., Any]) -> None:
    world = run(make_world, deadline=3.0)
    assert table(world)[:3] == [(1, "p0", "ok", 0), (1, "p1", "ok", 0), (1, "p2", "late", 0)]
    assert [event["seconds"] for event in world.told("round")] == pytest.approx([3.0] * 3)
    assert torch.equal(world.shared.theta, torch.full((SIZE,), 4.5))  # three times the mean of 1 and 2
    assert {event["reason"] for event in world.told("contribution")} == {"", "no answer in time"}


def test_after_the_quorum_the_others_have_the_grace(make_world: Callable[..., Any]) -> None:
    world = run(make_world, grace=0.5, min_contributors=1, deadline=100.0)
    assert [event["seconds"] for event in world.told("round")] == pytest.approx([1.5] * 3)
    assert {status for _, name, status, _ in table(world) if name == "p0"} == {"ok"}
    assert {status for _, name, status, _ in table(world) if name == "p2"} == {"late"}


def test_a_late_contribution_is_kept_for_the_next_round(make_world: Callable[..., Any]) -> None:
    """It is the step that it was, from where the state has got to."""
    world = run(make_world, deadline=3.0, late="keep")
    assert table(world)[:7] == [
        (1, "p0", "ok", 0), (1, "p1", "ok", 0), (1, "p2", "late", 0),
        (2, "p0", "ok", 0), (2, "p1", "ok", 0), (2, "p2", "late", 0), (2, "p2", "ok", 1),
    ]  # fmt: skip
    first, second = 1.5, (1 + 2 + 4) / 3
    assert world.told("round")[1]["contributors"] == 3
    assert world.told("contribution")[6]["update_norm"] == pytest.approx(4 * SIZE**0.5)
    assert float(world.shared.theta[0]) >= first + second


def test_too_few_by_the_deadline_fail_the_round(make_world: Callable[..., Any]) -> None:
    with pytest.raises(TooFewContributors, match="round 1: 1 of 3"):
        run(make_world, deadline=1.5)


def test_without_a_deadline_everybody_is_waited_for(make_world: Callable[..., Any]) -> None:
    assert [event["seconds"] for event in run(make_world).told("round")] == pytest.approx([5.0] * 3)


@pytest.mark.parametrize(
    ("rounds", "says"),
    [
        ({"grace": 1.0, "min_contributors": 3, "deadline": 9.0}, "rounds.grace has no effect"),
        ({"late": "keep"}, "rounds.late has no effect"),
        ({"late": "keep", "deadline": 9.0}, ""),
    ],
)
def test_what_has_no_effect_is_said(rounds: dict[str, Any], says: str) -> None:
    warnings = list(_waiting_warnings(recipe_of(**rounds)))
    assert len(warnings) == bool(says) and says in "".join(warnings)
    people = [{"name": name, "source": {"path": "x"}} for name in PROFILES]
    bare = parse_recipe({"participants": people, "rounds": rounds})
    assert "in one process" in "".join(_waiting_warnings(bare))


def test_what_is_late_is_not_kept_of_fragments() -> None:
    with pytest.raises(RecipeError, match=r"rounds\.late and rounds\.streaming"):
        recipe_of(late="keep", local_steps=4, streaming={"kind": "streaming", "fragments": 2})
