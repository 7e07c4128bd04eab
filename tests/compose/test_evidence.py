"""Routing by what the text so far says: Bayes' rule, token by token, with and without a cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.lora import attached, linear_maps, sizes
from potluck.compose.routing.evidence import Evidence, by_evidence, profile_bytes, read_profile, token_profile
from potluck.errors import ModelError, PotluckError, RecipeError

VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters(model: LlamaForCausalLM) -> dict[str, Adapter]:
    """Three, of unequal ranks; the last adapts only some of the maps."""
    draw = torch.Generator().manual_seed(1)
    made = {}
    for name, rank, targets in (("ada", 2, None), ("bob", 3, None), ("eve", 1, ("q_proj", "down_proj"))):
        maps = linear_maps(model) if targets is None else linear_maps(model, targets)
        made[name] = Adapter(
            {
                path: Factors(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw))
                for path, (d_in, d_out) in ((path, sizes(module)) for path, module in maps.items())
            }
        )
    return made


@pytest.fixture(scope="module")
def profiles(adapters: dict[str, Adapter]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {name: torch.randn(VOCABULARY, generator=draw) for name in adapters}


def test_a_profile_is_the_log_odds_of_smoothed_frequencies() -> None:
    own, public = np.array([1, 1, 2]), np.array([1, 2, 2, 3])
    found = token_profile(own, public, 4, strength=2.0)
    reference = [(count + 0.5) / 6 for count in (0, 1, 2, 1)]
    expected = [math.log((count + 2 * r) / (3 + 2) / r) for count, r in zip((0, 2, 1, 0), reference, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_shares_are_the_posterior_given_the_tokens_so_far(
    model: LlamaForCausalLM, adapters: dict[str, Adapter], profiles: dict[str, torch.Tensor]
) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with by_evidence(model, adapters, profiles, Evidence(confidence=0.5)) as posterior, torch.no_grad():
        model(input_ids=ids)
    for row in range(2):
        for place in range(9):
            odds = [math.exp(0.5 * float(profiles[n][ids[row, : place + 1]].double().sum())) for n in adapters]
            expected = torch.tensor([o / (1 + sum(odds)) for o in odds])
            torch.testing.assert_close(posterior.shares[row, place], expected, rtol=1e-4, atol=1e-6)
    assert posterior.tokens == 18
    assert sum(posterior.mean_shares()) < 1


def test_a_certain_text_gets_its_participants_adapter(model: LlamaForCausalLM, adapters: dict[str, Adapter]) -> None:
    certain = {name: torch.full((VOCABULARY,), 100.0 if name == "bob" else -100.0) for name in adapters}
    ids = torch.randint(0, VOCABULARY, (1, 6))
    with by_evidence(model, adapters, certain), torch.no_grad():
        routed = model(input_ids=ids).logits
    with attached(model, adapters["bob"]), torch.no_grad():
        torch.testing.assert_close(routed, model(input_ids=ids).logits)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_cache_and_padding_change_nothing(
    model: LlamaForCausalLM, adapters: dict[str, Adapter], profiles: dict[str, torch.Tensor], top_k: int | None
) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 8))
    with by_evidence(model, adapters, profiles, Evidence(top_k)), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        steps = [first.logits]
        cache = first.past_key_values
        for place in range(5, 8):
            steps.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
        padded = model(
            input_ids=torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1),
            attention_mask=torch.tensor([[0] * 3 + [1] * 8]),
            position_ids=torch.tensor([[0] * 3 + list(range(8))]),
        ).logits[:, 3:]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)


def test_taking_all_adapters_by_choice_is_taking_all(
    model: LlamaForCausalLM, adapters: dict[str, Adapter], profiles: dict[str, torch.Tensor]
) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 7))
    found = []
    for top_k in (None, 3):
        with by_evidence(model, adapters, profiles, Evidence(top_k)), torch.no_grad():
            found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*found)


def test_afterwards_the_model_is_what_it_was(
    model: LlamaForCausalLM, adapters: dict[str, Adapter], profiles: dict[str, torch.Tensor]
) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 5))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with by_evidence(model, adapters, profiles):
            assert not torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not model._forward_pre_hooks


def test_a_profile_is_sent_and_checked(profiles: dict[str, torch.Tensor]) -> None:
    sent = profile_bytes(profiles["ada"])
    torch.testing.assert_close(read_profile(sent, "ada", VOCABULARY), profiles["ada"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="ada: not a profile over 41 tokens"):
        read_profile(sent, "ada", VOCABULARY + 1)
    with pytest.raises(ModelError, match="ada: not a profile"):
        read_profile(profile_bytes(profiles["ada"] / 0), "ada", VOCABULARY)
    with pytest.raises(ModelError, match="ada: no usable profile"):
        read_profile(sent[:-9], "ada", VOCABULARY)


@pytest.mark.parametrize(
    ("settings", "missing", "error", "says"),
    [
        (Evidence(top_k=4), "", RecipeError, "top_k = 4 of 3 adapters"),
        (Evidence(confidence=0.0), "", RecipeError, "confidence = 0"),
        (Evidence(), "eve", RecipeError, "eve: its profile is missing"),
    ],
)
def test_bad_settings_are_refused(
    model: LlamaForCausalLM,
    adapters: dict[str, Adapter],
    profiles: dict[str, torch.Tensor],
    settings: Evidence,
    missing: str,
    error: type[PotluckError],
    says: str,
) -> None:
    some = {name: profile for name, profile in profiles.items() if name != missing}
    with pytest.raises(error, match=says), by_evidence(model, adapters, some, settings):
        pass


def test_a_profile_of_another_vocabulary_is_refused(
    model: LlamaForCausalLM, adapters: dict[str, Adapter], profiles: dict[str, torch.Tensor]
) -> None:
    with (
        pytest.raises(ModelError, match="bob: its profile"),
        by_evidence(model, adapters, {**profiles, "bob": torch.zeros(7)}),
    ):
        pass
