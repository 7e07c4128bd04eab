"""Answers that come after their round, on the virtual clock: from where they began, counted once, in the checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from potluck.contribution import Contribution, Task
from potluck.embedded import Embedded, Workplace, embedded_run, prepare
from potluck.engine.inprocess import InProcess
from potluck.recipe.load import parse_recipe
from potluck.records.checkpoint import list_checkpoints
from potluck.records.folder import Variant
from potluck.run import Run, history, newest_checkpoint

if TYPE_CHECKING:
    from tests.conftest import Tables

# Two local steps take ada 0.2 s, bob 1 s and eve 1.5 s; a round has 1.1 s, so eve is late, and in time given up.
SPEEDS = {"ada": 10.0, "bob": 2.0, "eve": 1.3}
RESIDUAL = {"links": [{"kind": "error-feedback"}, {"kind": "block-top-k", "k": 8, "block": 64}]}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual and differences": {**RESIDUAL, "download": {"kind": "delta"}},
    "quantized both ways": {
        "links": [{"kind": "error-feedback"}, {"kind": "quantize", "bits": 4}],
        "download": {"kind": "quantized", "bits": 8},
    },
}
Make = Callable[..., Workplace]


class Killed(BaseException):
    """What a kill is to a run in this process."""


@pytest.fixture
def make(tables: Tables) -> Make:
    def workplace(updates: dict[str, Any], **rounds: Any) -> Workplace:
        link = {"uplink": 1e6, "downlink": 1e6, "latency": 0}
        people = [{**p, "profile": {**link, "steps_per_second": SPEEDS[p["name"]]}} for p in tables["participants"]]
        waits = {"count": 10, "local_steps": 2, "deadline": 1.1, "late": "keep", "evaluate_every": 3, **rounds}
        recipe = {**tables, "participants": people, "rounds": waits, "updates": updates}
        recipe["outer"] = {"kind": "nesterov", "learning_rate": 0.5, "momentum": 0.5}
        return prepare(parse_recipe(recipe), lambda _: None)

    return workplace


def go(workplace: Workplace, folder: Path, events: list[dict[str, Any]], dies_after: int | None = None) -> Run:
    """Start a run or go on with it; without ``dies_after`` events, to its end."""
    folder.mkdir(exist_ok=True)
    left = iter(range(dies_after or 0))

    def listen(event: dict[str, Any]) -> None:
        if dies_after is not None and next(left, None) is None:
            raise Killed
        events.append(event)

    variant = Variant("together", workplace.recipe.participant_names)
    found = newest_checkpoint(folder)
    if found is not None:
        del events[len(history(folder, found)) :]
    run = embedded_run(workplace, variant, folder, workplace.recipe, (listen,), found)
    run.finish(lambda: False)
    return run


def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an undisturbed run says, too: a resumed one sends the whole shared state, which takes its time."""
    unlike = ("time", "seconds", "down_bytes", "up_bytes", "transfers")
    return [
        {key: value for key, value in event.items() if key not in unlike}
        for event in events
        if event["event"] != "run_resumed"
    ]


@pytest.mark.parametrize("updates", FORMS.values(), ids=FORMS)
def test_killed_at_ten_moments_the_numbers_are_the_same(make: Make, tmp_path: Path, updates: dict[str, Any]) -> None:
    workplace = make(updates)
    whole: list[dict[str, Any]] = []
    theta = go(workplace, tmp_path / "whole", whole).shared.theta
    late = [event for event in whole if event.get("staleness")]
    assert {event["status"] for event in late} == {"ok"} and 1 < len(late) < 9, "some were to count, and some not"

    draw, events, reached = random.Random(0), list[dict[str, Any]](), set[int]()
    for _ in range(10):
        with pytest.raises(Killed):
            go(workplace, tmp_path / "killed", events, draw.randint(0, 12))
        reached.add(max(list_checkpoints(tmp_path / "killed" / "checkpoints"), default=-1))
    assert len(reached) > 4, reached
    again = go(workplace, tmp_path / "killed", events).shared
    assert torch.equal(again.theta, theta)
    assert told(events) == told(whole)


@pytest.mark.parametrize("links", [(), RESIDUAL["links"]], ids=["plain", "residual"])
def test_however_the_shared_state_comes_the_late_start_from_the_same(make: Make, tmp_path: Path, links: Any) -> None:
    found = []
    for kind in ("full", "delta"):
        events: list[dict[str, Any]] = []
        run = go(make({"links": links, "download": {"kind": kind}}), tmp_path / kind, events)
        assert any(event.get("staleness") for event in events)
        found.append(run.shared.theta)
    assert torch.equal(*found)


def test_a_late_participant_starts_from_the_state_of_its_revision(make: Make, tmp_path: Path) -> None:
    """Though it is performed when the shared state has moved on; and whoever is given up is told so the next time."""
    workplace, states, asked = make(RESIDUAL), dict[int, torch.Tensor](), list[tuple[str, Any, torch.Tensor]]()
    (tmp_path / "run").mkdir()
    variant, events = Variant("together", workplace.recipe.participant_names), list[dict[str, Any]]()
    run = embedded_run(workplace, variant, tmp_path / "run", workplace.recipe, (events.append,))
    side, save = run.side, run.save
    assert isinstance(side, Embedded) and isinstance(run.engine, InProcess)
    perform = run.engine._perform

    def watched(name: str, task: Task) -> Contribution:
        answer, shared = perform(name, task), side.participants[name].state.shared
        assert shared is not None
        asked.append((name, task, shared.clone()))
        return answer

    def saving(score: Any) -> None:
        states[run.shared.revision] = run.shared.theta.clone()
        save(score)

    run.engine._perform, run.save = watched, saving  # type: ignore[method-assign]
    run.finish(lambda: False)
    trained = [(name, task, start) for name, task, start in asked if task.kind == "train"]
    assert len(trained) > 20
    assert all(torch.equal(start, states[task.revision]) for _, task, start in trained)

    said = [e for e in events if e["event"] == "contribution" and e["participant"] == "eve"]
    late = {e["round"] for e in said if e["status"] == "late"}
    given_up = late - {e["round"] - e["staleness"] for e in said if e.get("staleness")} - {9, 10}
    lost = {task.revision for name, task, _ in trained if name == "eve" and task.parameters.get("lost")}
    assert given_up and lost == {number + 1 for number in given_up}
    assert not any(task.parameters.get("lost") for name, task, _ in trained if name != "eve")
