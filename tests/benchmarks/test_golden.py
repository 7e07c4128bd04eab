"""What `benchmarks.golden` calls a difference, and that one of its cases runs."""

from __future__ import annotations

from benchmarks._golden_cases import CASES
from benchmarks.golden import ROOT, differences, facts_of

BEFORE = {"models": {"a": "1"}, "events": [{"event": "round", "loss": 1.0}]}


def test_a_difference_is_named_by_its_place() -> None:
    after = {"models": {"a": "1"}, "events": [{"event": "round", "loss": 1.5}]}
    assert list(differences(BEFORE, after)) == ["/events[0]/loss: 1.0 -> 1.5"]
    assert list(differences(BEFORE, {**BEFORE, "events": []})) == ["/events: [{'event': 'round', 'loss': 1.0}] -> []"]
    assert list(differences(BEFORE, {"models": {}, "events": BEFORE["events"]})) == ["/models/a: 1 -> None"]


def test_two_runs_of_a_case_have_the_same_facts() -> None:
    stopped = {"resumed in the middle": CASES["resumed in the middle"]}
    first, second = (facts_of(ROOT, stopped, 1) for _ in range(2))
    found = first["resumed in the middle"]
    assert found["models"] and sum(event["event"] == "round" for event in found["events"]["runs/r"]) == 30
    assert list(differences(first, second)) == []
