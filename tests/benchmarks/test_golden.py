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


def test_a_case_is_run_and_gone_on_with() -> None:
    name = "resumed in the middle"
    found = facts_of(ROOT, {name: CASES[name]}, 1)[name]
    assert found["models"] and sum(event["event"] == "round" for event in found["events"]["runs/r"]) == 30
