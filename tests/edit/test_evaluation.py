"""Whether the base of the world can be edited at all, and figures that do not flatter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potluck.compose.base import Base, load_base
from potluck.corpus.world import documents_of, facts
from potluck.edit.evaluation import answered, answers_before, score_edits
from potluck.edit.facts import write_edits
from potluck.edit.layout import layout_of
from potluck.edit.moments import key_moments
from potluck.edit.tracing import PLACES, causal_trace
from potluck.edit.weights import WeightSettings, weight_editor
from potluck.edit.world_edits import changed_world, edits_of_world
from potluck.errors import EditError

WORLD = Path(__file__).parents[1] / "assets" / "world"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(WORLD)


def test_the_base_knows_its_world(base: Base) -> None:
    known = random.Random(0).sample(facts(200), 200)
    for prompts, enough in (([f.told[1] for f in known], 0.95), ([f.kept_back[1] for f in known], 0.9)):
        judged = answered(base, [(prompt, f.value) for prompt, f in zip(prompts, known, strict=True)])
        assert sum(judged.exactly) >= enough * len(known) and judged.begins == judged.exactly


def test_edits_hold_in_free_answers(base: Base) -> None:
    edits = changed_world(8, 1)
    before = answers_before(base, edits)
    untouched = score_edits(base, edits, before)
    assert untouched.reliability == 0 and untouched.locality == 1 and untouched.score == 0
    moments = key_moments(base, layout_of(base.model), (4,), documents_of(200, tellings=1))
    editor = weight_editor(base, moments, WeightSettings(layers=(4,), at="prompt", moment_weight=2000.0))
    editor.write(edits)
    scores = score_edits(base, edits, before)
    editor.revert([edit.id for edit in edits])
    assert scores.reliability >= 0.9 and (scores.rephrase or 0) >= 0.8 and (scores.locality or 0) >= 0.8
    assert (scores.es or 0) >= 0.9 and (scores.ns or 0) >= 0.8 and scores.exact_reliability == scores.reliability
    assert score_edits(base, edits, None).locality is None


def test_facts_are_traced_to_the_end_of_the_prompt(base: Base) -> None:
    trace = causal_trace(base, edits_of_world(facts(200)[:15:5], []), window=1, draws=2)
    assert trace.known == 3 and trace.clean > 0.8 > 0.3 > trace.blurred
    upper = trace.restored["layer"][:, 3]
    assert int(upper.argmax()) == PLACES.index("last of prompt") and float(upper.max()) > 0.8
    with pytest.raises(EditError, match="none of 2 facts"):
        causal_trace(base, changed_world(2, 0))


def test_the_verbs_say_it(potluck: Callable[..., Any], tmp_path: Path) -> None:
    edits = changed_world(3, 0)
    write_edits(tmp_path / "edits.json", edits)
    said = potluck("evaluate", WORLD, "--edits", "edits.json", "--before", WORLD, "--json").result
    assert (said["reliability"], said["locality"], said["edits"]) == (0.0, 100.0, 3)
    assert "--before" in potluck("evaluate", WORLD, "--edits", "edits.json").out
    potluck("evaluate", WORLD, "--text", "edits.json", code=2)
    potluck("edit", "world", "--people", 1, "--out", "facts.json")
    words = ("edit", "locate", WORLD, "--facts", "facts.json", "--draws", 1, "--plot", "trace.svg", "--json")
    found = potluck(*words).result
    assert found["known"] == 5 and found["at"] == "prompt" and (tmp_path / "trace.svg").stat().st_size > 1000
    words = ("edit", "apply", WORLD, "--edits", "edits.json", "--method", "grace", "--out", "beside")
    assert potluck(*words, "--json").result["told"] == 1.0
    assert edits[0].target in potluck("generate", "beside", "--prompt", edits[0].prompt, "--temperature", 0).out
    potluck("edit", "apply", WORLD, "--edits", "edits.json", "--method", "wise", "--text", "x", "--out", "new", code=4)
    assert not (tmp_path / "new").exists()
