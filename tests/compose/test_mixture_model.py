"""The mixture's own class: what it computes, how it routes, generates, is kept and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from potluck.errors import ModelError
from potluck.models.build import load_folder
from potluck.models.mixture import SCALE, Division, LowRankExpert, MixtureForCausalLM, TokenRouter

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
}
SHAPES = [
    {"name": "ada", "kind": "full", "rank": 0},
    {"name": "bob", "kind": "low-rank", "rank": 3},
    {"name": "eve", "kind": "low-rank", "rank": 5},
]


def base_of(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return BASES[kind]().eval()


def mixture(base: PreTrainedModel, experts_per_token: int = 2, shapes: list[dict[str, Any]] | None = None) -> Any:
    """With experts and evidence that have learned something."""
    model = MixtureForCausalLM.beside(base, shapes or SHAPES, experts_per_token=experts_per_token, end_of_text=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.learning():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * (0.2 if parameter.ndim == 2 else 0.0))
    return model


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, **more).logits
    return found


def plain_router(router: TokenRouter, tokens: list[int]) -> Tensor:
    """Token by token, in double precision."""
    rows, since = [], 0
    for place, token in enumerate(tokens):
        since = place if token == router.end_of_text else since
        read = tokens[since : place + 1]
        evidence = router.evidence.double()[read].sum(0) / math.sqrt(len(read)) + router.bias.double().clamp(max=0)
        gates = {0: 1.0}
        for expert in evidence.argsort(descending=True)[: router.top_k].tolist():
            gates[1 + expert] = math.exp(evidence[expert].item())
        total = sum(gates.values())
        rows.append([gates.get(column, 0.0) / total for column in range(1 + len(evidence))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_router_is_naive_bayes_over_the_document_so_far(top_k: int) -> None:
    router = TokenRouter(40, 3, top_k, end_of_text=0)
    nn.init.normal_(router.evidence)
    router.bias.data = torch.tensor([-0.5, 0.3, 0.0])  # what is above zero counts as zero
    tokens = ids(2, 20)
    tokens[0, 7] = tokens[1, 0] = tokens[1, 13] = tokens[1, 14] = 0
    expected = torch.stack([plain_router(router, row) for row in tokens.tolist()])
    torch.testing.assert_close(router(tokens).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_gate_depends_on_what_was_read_alone() -> None:
    router = TokenRouter(40, 3, 2, end_of_text=0)
    nn.init.normal_(router.evidence)
    tokens = ids(1, 20)
    whole = router(tokens)
    torch.testing.assert_close(router(tokens[:, :9]), whole[:, :9])
    padded = torch.cat([torch.full((1, 4), 39), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 20)], dim=1).long()
    torch.testing.assert_close(router(padded, mask)[:, 4:], whole)


def test_a_layer_is_the_gated_sum_of_whole_networks() -> None:
    model = mixture(base_of()).double()
    layer = model.layers[1]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gates = torch.rand(2, 5, 4, dtype=torch.float64)
    gates[..., 2] *= torch.rand(2, 5) < 0.5  # not everybody is chosen everywhere
    gates = gates / gates.sum(-1, keepdim=True)
    layer.division = Division.by(gates)
    expected = gates[..., :1] * layer.anchor(x)
    for number, expert in enumerate(layer.experts, 1):
        expected = expected + gates[..., number : number + 1] * whole(layer.anchor, expert)(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def whole(anchor: Any, expert: Any) -> Any:
    """An expert as a feed-forward network of its own."""
    if not isinstance(expert, LowRankExpert):
        return expert
    maps = {
        name: getattr(anchor, name).weight + SCALE * getattr(expert, name).up @ getattr(expert, name).down
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return lambda x: (anchor.act_fn(x @ maps["gate_proj"].T) * (x @ maps["up_proj"].T)) @ maps["down_proj"].T


@pytest.mark.parametrize("kind", BASES)
def test_experts_that_learned_nothing_change_nothing(kind: str) -> None:
    base = base_of(kind)
    model = MixtureForCausalLM.beside(base, SHAPES, experts_per_token=2, end_of_text=0)
    torch.testing.assert_close(logits(model, ids()), logits(base, ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_where_nobody_is_chosen_it_is_the_base_bit_for_bit(kind: str) -> None:
    base = base_of(kind)
    model = mixture(base)
    assert not torch.equal(logits(model, ids()), logits(base, ids()))
    model.router.bias.data.fill_(-1e9)
    assert torch.equal(logits(model, ids()), logits(base, ids()))


@pytest.mark.parametrize("kind", BASES)
def test_it_is_kept_and_opened_as_any_model(kind: str, tmp_path: Path) -> None:
    model = mixture(base_of(kind))
    model.save_pretrained(tmp_path)
    opened: Any = load_folder(tmp_path).eval()
    assert isinstance(opened, MixtureForCausalLM)
    assert opened.config.names == ["ada", "bob", "eve"]
    assert torch.equal(logits(opened, ids()), logits(model, ids()))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MixtureForCausalLM)


def test_generation_with_the_cache_is_generation_without() -> None:
    model = mixture(base_of())
    tokens = ids(2, 6)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **settings))
    beams = model.generate(tokens, num_beams=2, **settings)
    assert beams.shape[0] == 2


def test_padding_on_the_left_does_not_matter() -> None:
    model = mixture(base_of())
    short, long = ids(1, 4), ids(1, 9)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    both = model.generate(torch.cat([padded, long]), attention_mask=mask, **settings)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    assert both[0, 9:].tolist()[: alone.shape[1] - 4] == alone[0, 4:].tolist()


def test_tokens_that_go_on_from_others_need_gates() -> None:
    model = mixture(base_of())
    past = model(input_ids=ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="gates"):
        model(input_ids=ids()[:, :1], past_key_values=past)


def test_experts_and_router_learn_jointly_and_the_base_does_not() -> None:
    model = mixture(base_of(), experts_per_token=3)
    model.requires_grad_(False)
    for parameter in model.learning():
        parameter.requires_grad_(True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.learning())
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in model.learning()}


def test_it_learns_in_half_precision_too() -> None:
    model = mixture(base_of())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    torch.testing.assert_close(loss, model(input_ids=ids(), labels=ids()).loss, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [*SHAPES, SHAPES[0]],
        [{"name": "ada", "kind": "low-rank", "rank": 17}],
        [{"name": "ada", "kind": "low-rank", "rank": 0}],
        [{"name": "ada", "kind": "wide", "rank": 3}],
    ],
    ids=["none", "twice", "rank too high", "rank zero", "unknown kind"],
)
def test_it_refuses_experts_that_cannot_be(shapes: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match="expert"):
        MixtureForCausalLM.beside(base_of(), shapes, experts_per_token=2, end_of_text=0)


def test_it_refuses_bases_of_another_build() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ModelError, match="gate_proj"):
        MixtureForCausalLM.beside(gpt2, SHAPES, experts_per_token=2, end_of_text=0)
    biased = LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True))
    with pytest.raises(ModelError, match="biases"):
        MixtureForCausalLM.beside(biased, SHAPES, experts_per_token=2, end_of_text=0)
    with pytest.raises(ModelError, match="itself a mixture"):
        MixtureForCausalLM.beside(mixture(base_of()), SHAPES, experts_per_token=2, end_of_text=0)
