"""What `potluck plan` says: times on a link, the choice, and the bandwidth table of the scaling-law paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.measured import MEASURED, RANDOM, TRAINED, judged
from potluck.planning import (
    ENOUGH,
    PERIODS,
    ROUNDS_OF_MOMENTUM,
    Plan,
    megabits,
    milliseconds,
    planned,
    predicted_seconds,
    round_seconds,
)
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe
from potluck.recipe.sources import Profile

Tables = dict[str, Any]
MODEL = {"layers": 4, "width": 32, "heads": 2, "feedforward": 64, "context": 64}
LINK = Profile(steps_per_second=5.0, uplink=2.0, downlink=10.0, latency=50.0)


def recipe_of(tables: Tables, **changes: Any) -> Recipe:
    rounds = {"count": 100, "local_steps": 20, "evaluate_every": 100, **changes.pop("rounds", {})}
    return parse_recipe({**tables, "model": MODEL, "rounds": rounds, **changes})


# --- times ---------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 30), st.floats(0.1, 9.0), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_round_is_what_a_clock_shows(steps: int, overlap: int, rate: float, up_bytes: int, down_bytes: int) -> None:
    """Against a participant followed step by step through a few rounds."""
    overlap = min(overlap, steps)
    link = Profile(steps_per_second=rate, uplink=3.0, downlink=7.0, latency=20.0)
    sent, free, begins = 0.0, 0.0, []
    for _ in range(4):
        begins.append(max(sent + 0.02 + down_bytes * 8 / 7e6, free))
        leaves = begins[-1] + (steps - overlap) / rate
        free = leaves + overlap / rate
        sent = leaves + 0.02 + up_bytes * 8 / 3e6
    expected = round_seconds(steps / rate, up_bytes, down_bytes, link, overlap / rate)
    assert np.diff(begins) == pytest.approx([expected] * 3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"updates": {"links": [{"kind": "quantize"}]}},
        {"updates": {"download": {"kind": "quantized"}}, "rounds": {"participants_per_round": 1}},
        {"rounds": {"streaming": {"kind": "streaming", "fragments": 4, "overlap": 2}}},
        {"rounds": {"streaming": {"kind": "eager"}}},
    ],
    ids=str,
)
def test_a_setting_and_the_virtual_clock_agree(tables: Tables, changes: Tables) -> None:
    recipe = recipe_of(tables, **changes)
    said = planned(recipe, LINK).current.total_seconds
    assert predicted_seconds(recipe, dict.fromkeys(recipe.participant_names, LINK)) == pytest.approx(said, rel=0.02)


# --- settings and the choice ---------------------------------------------------------------------


def test_every_setting_takes_as_many_local_steps(tables: Tables) -> None:
    recipe = recipe_of(tables)
    plan = planned(recipe, LINK)
    assert {s.period for s in plan.settings} == {*PERIODS, 20}
    assert {(s.fragments, s.overlap) for s in plan.settings} == {(1, 0), (4, 1), (4, 5)}
    assert len({s.codec for s in plan.settings}) == 7
    for setting in plan.settings:
        assert setting.local_steps == setting.period // setting.fragments
        assert setting.rounds == -(-2000 // setting.local_steps)
        waits = setting.rounds * (setting.round_seconds - setting.local_steps / 5)
        assert setting.total_seconds == pytest.approx(2000 / 5 + waits, abs=0.3)  # and the first download
        assert setting.utilisation == pytest.approx(setting.local_steps / 5 / setting.round_seconds)
    assert plan.current in plan.settings and plan.current.codec == "fp32"


def test_the_recipes_own_ways_are_among_the_settings(tables: Tables) -> None:
    own = {"links": [{"kind": "sign"}], "download": {"kind": "quantized", "bits": 4}}
    streaming = {"kind": "streaming", "fragments": 2, "overlap": 3}
    plan = planned(recipe_of(tables, updates=own, rounds={"streaming": streaming}), LINK)
    assert {(s.fragments, s.overlap) for s in plan.settings} == {(1, 0), (2, 1), (2, 3), (2, 5)}
    assert {s.codec for s in plan.settings} == {"as in the recipe", "fp32", "int8", "int4", "sparse"}
    assert plan.current in plan.settings and plan.current.codec == "as in the recipe"


def test_everybody_streams_or_nobody(tables: Tables) -> None:
    plan = planned(recipe_of(tables, rounds={"participants_per_round": 2}), LINK)
    assert {setting.fragments for setting in plan.settings} == {1}


@pytest.mark.parametrize("rate", [0.5, 5.0, 500.0])
@pytest.mark.parametrize(("count", "steps"), [(5, 10), (5, 30), (20, 10), (2000, 10)])
def test_nothing_is_recommended_but_what_was_measured_near_full_precision(
    tables: Tables, rate: float, count: int, steps: int
) -> None:
    """Sparse 2-bit updates over 5 outer steps end at 6.3 bits per byte where full precision ends at 4.4."""
    recipe = recipe_of(tables, rounds={"count": count, "local_steps": steps})
    plan = planned(recipe, LINK.model_copy(update={"steps_per_second": rate}))
    assert {setting.near for setting in plan.settings} == {True, False, None}
    if plan.choice is None:
        assert plan.tables == {} and not any(setting.near for setting in plan.settings)
        return
    assert plan.choice.near and plan.choice.measured.startswith("measured from random weights")
    assert not plan.choice.codec.startswith("sparse")
    assert plan.choice.outer_steps >= min(row.outer_steps for row in MEASURED if row.codec == plan.choice.codec)


def test_so_few_local_steps_that_nothing_was_measured(tables: Tables) -> None:
    plan = planned(recipe_of(tables, rounds={"count": 2, "local_steps": 2}), LINK)
    assert (plan.choice, plan.tables) == (None, {}) and "exchange in full precision" in plan.reason
    assert plan.settings and plan.current in plan.settings


@pytest.mark.parametrize(
    ("way", "near"),
    [
        ((RANDOM, "int8", 1, 0, 10, 5), True),
        ((RANDOM, "int8", 1, 0, 10, 4), None),
        ((RANDOM, "int8", 1, 0, 9, 50), None),
        ((RANDOM, "fp32", 1, 0, 1, 50), True),
        ((RANDOM, "fp32", 1, 0, 500, 50), None),
        ((RANDOM, "sparse", 1, 0, 10, 5), False),
        ((RANDOM, "sparse", 1, 0, 30, 3), False),
        ((RANDOM, "sparse", 1, 0, 10, 30), False),
        ((TRAINED, "sparse", 1, 0, 10, 20), False),
        ((RANDOM, "sparse", 4, 1, 10, 5), None),
        ((RANDOM, "as in the recipe", 1, 0, 10, 50), None),
    ],
    ids=str,
)
def test_what_is_known_of_a_way_to_exchange(way: Any, near: bool | None) -> None:
    assert judged(*way).near is near


def test_another_outer_optimizer_or_a_tail_of_momentum_was_not_measured(tables: Tables) -> None:
    assert planned(recipe_of(tables, outer={"kind": "adam"}), LINK).choice is None
    few = recipe_of(tables, outer={"kind": "nesterov"}, rounds={"count": 50, "local_steps": 10})
    assert all(s.near is None or s.outer_steps >= ROUNDS_OF_MOMENTUM for s in planned(few, LINK).settings)


def aggression(plan: Plan) -> Any:
    codecs = list(dict.fromkeys(setting.codec for setting in plan.settings))
    return lambda s: (s.local_steps * s.fragments, codecs.index(s.codec), s.overlap)


@pytest.mark.parametrize("rate", [0.02, 0.5, 5.0, 50.0])
@pytest.mark.parametrize("outer", [{"kind": "sgd"}, {"kind": "nesterov"}], ids=str)
def test_the_choice_is_the_least_aggressive_that_uses_the_time(tables: Tables, rate: float, outer: Tables) -> None:
    plan = planned(recipe_of(tables, outer=outer), LINK.model_copy(update={"steps_per_second": rate}))
    momentum = outer["kind"] == "nesterov"
    counted = [s for s in plan.settings if s.near]
    assert ("outer momentum" in plan.reason) == momentum
    assert plan.choice is not None
    good = [setting for setting in counted if setting.utilisation >= ENOUGH]
    if good:
        assert plan.choice == min(good, key=aggression(plan))
    else:
        assert plan.choice.utilisation == max(setting.utilisation for setting in counted)
        assert "none reaches" in plan.reason
    assert all(s.outer_steps >= ROUNDS_OF_MOMENTUM for s in counted if momentum)
    again = {**tables, "model": MODEL, "outer": outer, **plan.tables}
    chosen = planned(parse_recipe(again), LINK).current
    assert (chosen.local_steps, chosen.fragments, chosen.overlap, chosen.up_bytes) == (
        plan.choice.local_steps, plan.choice.fragments, plan.choice.overlap, plan.choice.up_bytes
    )  # fmt: skip


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20mbit", 20), ("1.5 Gbit", 1500), ("800kbit", 0.8), ("20mbit/s", 20), ("20Mbps", 20), ("20mbitps", 20),
     ("20mb", None), ("20MB/s", None), ("mbit", None), ("-3mbit", None), ("20", None), ("0mbit", None)],
)  # fmt: skip
def test_bandwidths(text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="write it like 20mbit, 800kbit"):
            megabits(text)
    else:
        assert megabits(text) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("50ms", 50), ("0.1s", 100), ("0ms", 0), ("50", None), ("1h", None)])
def test_delays(text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="write it like 50ms"):
            milliseconds(text)
    else:
        assert milliseconds(text) == pytest.approx(expected)


# --- arXiv 2503.09799, table 6 -------------------------------------------------------------------

# Gbit/s for 50, 80, 90, 95 and 99% utilisation: 10B parameters, a step of 0.8 s; by local steps, 1 is data-parallel.
PAPER = {
    1: (104.8, 184.2, 222.3, 222.3, 390.7),
    10: (16.0, 49.4, 86.8, 152.6, 222.3),
    50: (3.0, 11.0, 23.3, 41.0, 126.5),
    100: (1.4, 6.2, 13.3, 23.3, 86.8),
    300: (0.5, 2.0, 4.3, 9.1, 41.0),
}
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
BANDWIDTHS = np.logspace(-1, 3, 50)  # all that the paper's simulator tries: its figures are the first that suffices
STEP, LAYERS = 0.8, 48
EXCHANGE = 115e9 / 8  # bytes; fitted, 11.5 bits a parameter: the paper does not say
BACKWARD = 2 / 3  # of a step; layer by layer, each is sent while those before it are still computed


def sufficient(local_steps: int, share: float) -> int:
    """Place of the first bandwidth with so much of the time in local steps."""
    for place, gigabits in enumerate(BANDWIDTHS):
        link = Profile(steps_per_second=1 / STEP, uplink=1e3 * gigabits, downlink=1e9, latency=0.0)
        hidden = STEP * BACKWARD * (LAYERS - 1) / LAYERS
        seconds = round_seconds(local_steps * STEP, int(EXCHANGE), 0, link, hidden)
        last_layer = local_steps * STEP + EXCHANGE / LAYERS * 8 / (1e9 * gigabits)  # nothing is left to hide it
        if local_steps * STEP / max(seconds, last_layer) >= share:
            return place
    raise AssertionError("no bandwidth suffices")


def test_the_bandwidth_table_of_the_scaling_law_paper() -> None:
    """One fitted figure gives 20 of the 25 cells, and all to one step of the paper's grid, a factor of 1.21.

    No figure gives all: rows ask for 115 to 125 Gbit (H 1), 119 to 123 (10), 99 to 108 (50), 106 to 110 (100) and 108
    to 117 (300), as if the paper simulated a number of steps that is no multiple of H. The 99% of data-parallel
    training asks for a few layers less than the 48 of arXiv 2501.18512.
    """
    off = {}
    for local_steps, row in PAPER.items():
        for share, printed in zip(SHARES, row, strict=True):
            place = int(np.abs(np.round(BANDWIDTHS, 1) - printed).argmin())
            off[local_steps, share] = sufficient(local_steps, share) - place
    assert set(off.values()) == {-1, 0, 1}
    assert {cell for cell, steps in off.items() if steps} == {
        (1, 0.99),
        (10, 0.95),
        (50, 0.95),
        (100, 0.5),
        (100, 0.95),
    }
