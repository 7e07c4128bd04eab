"""What a participant's policy refuses, and when: before it costs anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from potluck.asking import Asks, check_kept, refusals
from potluck.corpus.tokenizer import build_vocabulary
from potluck.errors import PolicyError
from potluck.footprint import states_kept
from potluck.joined import Joined
from potluck.joining import _prepare
from potluck.recipe import parse_recipe
from potluck.recipe.part import Policy
from potluck.records.journal import Journal


@pytest.mark.parametrize(
    ("allowed", "asked", "passes"),
    [
        ("s3://team", "s3://team/run", True),
        ("s3://team/potluck/", "s3://team/potluck", True),
        ("s3://team", "s3://team-of-eve/run", False),
        ("s3://team", "s3://team@eve/run", False),
        ("s3://team", "gs://team", False),
        ("s3://team/potluck", "s3://team/potluck-of-eve", False),
        ("s3://team/potluck", "s3://team/potluck/../private", False),
        ("s3://team/potluck", "s3://team/potluck/%2e%2e/private", False),
        ("https://store.example", "https://store.example.eve.net", False),
        ("https://store.example/a", "https://store.example/a?endpoint=eve", False),
    ],
)
def test_a_store_is_that_place_and_what_lies_in_it(allowed: str, asked: str, passes: bool) -> None:
    asks = Asks("r", 1, 1, 1, ("train",), 1, 4, asked)
    assert (refusals(asks, Policy(stores=(allowed,))) == []) is passes


def test_a_model_beyond_the_policy_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """A 2 TB model: nothing is read, sent or built before its size is looked at."""
    shape = {"layers": 1000, "width": 1 << 14, "heads": 8, "feedforward": 1 << 15}
    recipe = parse_recipe(
        {
            "participants": [{"name": "ann", "source": {"path": "nowhere"}}],
            "model": shape,
            "tokenizer": {"kind": "bytes"},
        }
    )
    nowhere: Any = None
    joined = Joined(
        site=nowhere, name="ann", recipe=recipe, policy=Policy(max_parameters=1_000_000), folder=tmp_path,
        journal=cast(Journal, nowhere), sent=nowhere, stop=lambda: False,
    )  # fmt: skip
    with pytest.raises(PolicyError, match="parameters; the policy allows 1,000,000"):
        _prepare(joined, build_vocabulary(recipe))
    small = {"layers": 1, "width": 128, "heads": 2, "feedforward": 128}
    streams = parse_recipe(
        {
            "participants": [{"name": "ann", "source": {"path": "nowhere"}}],
            "model": small,
            "tokenizer": {"kind": "bytes"},
            "local": {"adaptive_batch": {"streams": 64}},
        }
    )
    with pytest.raises(PolicyError, match="64 models side by side"):
        _prepare(replace(joined, recipe=streams), build_vocabulary(streams))


def test_a_coordinator_does_not_decide_how_much_disk_is_taken() -> None:
    """States are kept for as long as the coordinator may go back: two periods of its checkpoints."""
    tables = {"participants": [{"name": "ann", "source": {"path": "x"}}], "engine": {"kind": "nats"}}
    rare = parse_recipe({**tables, "records": {"checkpoint_every": 10**6}})
    often = parse_recipe({**tables, "records": {"checkpoint_every": 2}})
    assert states_kept(often, 1_000_000) == (8, 12_000_000)  # an answer, and two moments of each weight
    check_kept(Policy(max_disk=96_000_000), *states_kept(often, 1_000_000))
    with pytest.raises(PolicyError, match="2000004 states of 12,000,000 bytes"):
        check_kept(Policy(), *states_kept(rare, 1_000_000))
