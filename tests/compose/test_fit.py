"""Which adapters belong to a base: layers, shapes, weights, names, and what has no effect."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.adapter import Adapter, Factors, save_adapter
from potluck.compose.base import Base, load_base
from potluck.compose.decoding.factory import opened
from potluck.compose.fit import check_adapter
from potluck.compose.lora import attached, merge_into
from potluck.corpus.tokenizer import vocabulary_from_words
from potluck.errors import ModelError

QUERY = "model.layers.0.self_attn.q_proj"
TOKENS = [0, 7, 11, 5]


@pytest.fixture(scope="module")
def base() -> Base:
    """Two layers, width 16, whose output head is the embedding."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=300, num_attention_heads=2, tie_word_embeddings=True, **shape)
    return Base(LlamaForCausalLM(config).eval(), vocabulary_from_words({"a": 1}, 300), "shelf/Tiny-1M")


def adapter(path: str = QUERY, d_in: int = 16, d_out: int = 16, times: float = 1.0, **more: Any) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(2, d_in, generator=draw), times * torch.randn(d_out, 2, generator=draw))
    return Adapter({path: factors}, **more)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (adapter("model.layers.77.mlp.up_proj", 16, 24), "a: the base has no linear map model.layers.77.mlp.up_proj:"),
        (adapter("model.layers.77.mlp.up_proj", 16, 24), "its model.layers are 0 to 1"),
        (adapter("model.embed_tokens"), "no linear map model.embed_tokens"),
        (adapter(d_in=12), "the adapter maps 12 to 16, the base 16 to 16"),
        (adapter(about={"base_hash": "0" * 64}, base="org/other"), "another base than shelf/Tiny-1M"),
    ],
)
def test_an_adapter_of_another_base_is_refused(base: Base, wrong: Adapter, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        check_adapter(base, wrong, "a")


def test_each_module_that_does_not_fit_is_named(base: Base) -> None:
    wrong = Adapter({**adapter("model.layers.8.x").modules, **adapter("model.layers.9.x").modules})
    with pytest.raises(ModelError, match=r"layers\.8\.x.*layers\.9\.x"):
        check_adapter(base, wrong, "a")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (adapter(base="org/Other-7B"), "trained on org/Other-7B, and this base is shelf/Tiny-1M"),
        (adapter(base="org/tiny-1m"), None),
        (adapter(), None),
        (adapter(times=0.0), "no effect"),
    ],
)
def test_what_is_doubtful_is_said(base: Base, given: Adapter, says: str | None) -> None:
    found = check_adapter(base, given, "a")
    assert found == [] if says is None else (len(found) == 1 and says in found[0])


@pytest.mark.parametrize(
    ("said", "place", "same"),
    [
        ("org/Tiny", "hub/models--org--tiny/snapshots/0f", True),
        ("org/Tiny", "hub/models--org--tiny-2/snapshots/0f", False),
        ("run/model", "run", True),
        ("run", "other/model", False),
    ],
)
def test_one_base_has_many_names(
    base: Base, said: str, place: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/model", "other/model"):
        (tmp_path / folder).mkdir(parents=True)
    assert bool(check_adapter(replace(base, place=place), adapter(base=said), "a")) != same


def test_an_adapter_with_the_hash_of_its_base_may_call_it_anything(base: Base) -> None:
    assert check_adapter(base, adapter(base="org/Other-7B", about={"base_hash": base.content_hash}), "a") == []


def test_a_head_that_is_the_embedding_is_changed_alone(base: Base, tmp_path: Path) -> None:
    """Neither the embedding nor the base changes; merging into the one weight of both is refused."""
    head = adapter("lm_head", 16, 300)
    save_adapter(head, tmp_path / "head")
    before = copy.deepcopy(base.model.state_dict())
    with torch.no_grad(), attached(base.model, head):
        expected = base.model(torch.tensor([TOKENS])).logits[0, -1, : base.vocabulary.size].log_softmax(-1)
    found = opened(str(tmp_path / "head"), base, load_base).log_probs(TOKENS)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"lm_head: its weight is also model\.embed_tokens\.weight"):
        merge_into(base.model, head)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())


def test_an_assistants_doubts_reach_whoever_asks(base: Base, tmp_path: Path) -> None:
    save_adapter(adapter(times=0.0, base="org/Other-7B"), tmp_path / "a")
    doubts: list[str] = []
    opened(str(tmp_path / "a"), base, load_base, warn=doubts.append)
    assert len(doubts) == 2
