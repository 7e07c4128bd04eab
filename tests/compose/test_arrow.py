"""Arrow: PEFT's logits where PEFT can, a slow reference where it cannot, and two forms that agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from potluck.compose.adapter import Adapter, Factors, save_adapter
from potluck.compose.lora import attached, linear_maps, sizes
from potluck.compose.routing.arrow import Arrow, ArrowRouted, arrow, mean_shares, prototype, routing_shares
from potluck.compose.routing.bundle import Bundle, by_module
from potluck.errors import ModelError, RecipeError

TOKENS = torch.arange(24).view(2, 12) % 17


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def adapter_of(model: PreTrainedModel, rank: int, seed: int, targets: tuple[str, ...] = ()) -> Adapter:
    """Of singular values far apart, so that power iteration comes to its end."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in linear_maps(model).items():
        d_in, d_out = sizes(module)
        sizes_of_terms = 4.0 ** -torch.arange(rank)
        down = torch.linalg.qr(torch.randn(d_in, rank, generator=draw))[0].T
        up = torch.linalg.qr(torch.randn(d_out, rank, generator=draw))[0] * sizes_of_terms
        if not targets or path.endswith(targets):
            modules[path] = Factors(down.contiguous(), up)
    return Adapter(modules, transposed=isinstance(model, GPT2LMHeadModel))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        yield


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("top_k", "temperature"), [(2, 1.0), (4, 0.5)])
def test_equal_ranks_give_the_logits_of_peft(
    model: PreTrainedModel, tmp_path: Path, top_k: int, temperature: float
) -> None:
    from peft import ArrowConfig, create_arrow_model

    adapters = {f"p{i}": adapter_of(model, 3, seed=i) for i in range(4)}
    for name, adapter in adapters.items():
        save_adapter(adapter, tmp_path / name)
    settings = ArrowConfig(top_k=top_k, router_temperature=temperature)
    theirs = create_arrow_model(copy.deepcopy(model), [str(tmp_path / name) for name in adapters], settings).eval()
    plain = logits(model)
    with arrow(model, adapters, Arrow(top_k=top_k, temperature=temperature)):
        ours = logits(model)
    assert (ours - logits(theirs)).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2
    assert torch.equal(logits(model), plain)


def reference(parts: dict[str, Factors], x: Tensor, settings: Arrow) -> Tensor:
    """Token by token, in float64, with every product formed."""
    deltas = [part.to(torch.float64).delta() for part in parts.values()]
    prototypes = torch.stack([torch.linalg.svd(delta)[2][0] for delta in deltas])
    rows = []
    for token in x.double().flatten(0, -2):
        scores = (prototypes @ token).abs()
        best = scores.topk(min(settings.top_k, len(deltas))).indices
        shares = (scores[best] / settings.temperature).softmax(0)
        rows.append(sum(share * deltas[e] @ token for share, e in zip(shares, best.tolist(), strict=True)))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("shape", [(1, 1, 12), (3, 5, 12), (2, 90, 12)])
def test_ranks_may_differ(count: int, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(count)
    parts = {
        f"p{i}": Factors(torch.randn(1 + i % 4, 12, generator=draw), torch.randn(7, 1 + i % 4, generator=draw))
        for i in range(count)
    }
    x, settings = torch.randn(*shape, generator=draw), Arrow(top_k=2, temperature=0.7)
    found = ArrowRouted(parts, settings)(x)
    assert torch.allclose(found.double(), reference(parts, x, settings), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 0.2)])
def test_both_forms_compute_the_same(tokens: int, half: bool, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(1)
    bundle = Bundle([Factors(torch.randn(r, 8, generator=draw), torch.randn(6, r, generator=draw)) for r in (1, 4, 2)])
    x, chosen = torch.randn(tokens, 8, generator=draw), torch.tensor([[0, 2]] * tokens)
    shares = torch.rand(tokens, 2, generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        every = bundle.every(x, torch.zeros(tokens, 3).scatter(1, chosen, shares))
        assert torch.allclose(bundle.chosen(x, chosen, shares), every, atol=tolerance)


def test_adapters_may_be_on_different_maps() -> None:
    model = model_of("llama")
    adapters = {
        "attention": adapter_of(model, 2, 0, ("q_proj", "v_proj")),
        "all": adapter_of(model, 5, 1),
        "mlp": adapter_of(model, 1, 2, ("down_proj",)),
    }
    with arrow(model, adapters, Arrow(top_k=2)) as routed:
        logits(model)
    assert routed["model.layers.0.self_attn.q_proj"].names == ("attention", "all")
    assert routed["model.layers.1.mlp.gate_proj"].names == ("all",)
    nothing = Factors(torch.zeros(0, 16), torch.zeros(16, 0))
    assert by_module({"none": Adapter({"q": nothing}), "one": adapters["mlp"]}).keys() == adapters["mlp"].modules.keys()
    alone = {"all": adapters["all"]}
    with arrow(model, alone, Arrow(top_k=1)):
        routed_alone = logits(model)
    with attached(model, adapters["all"]):
        assert torch.allclose(logits(model), routed_alone, atol=1e-6)


def test_a_token_goes_where_its_direction_is_enlarged_most() -> None:
    parts = {f"p{i}": Factors(torch.eye(4)[i : i + 1], torch.full((3, 1), float(i))) for i in range(4)}
    layer = ArrowRouted(parts, Arrow(top_k=1))
    x = torch.eye(4)[[2, 2, 3]] * torch.tensor([[5.0], [-5.0], [5.0]])
    assert torch.allclose(layer(x), torch.tensor([[10.0], [-10.0], [15.0]]).expand(3, 3))
    assert routing_shares({"m": layer})["m"] == pytest.approx({"p0": 0, "p1": 0, "p2": 2 / 3, "p3": 1 / 3})
    assert mean_shares({"m": layer, "n": ArrowRouted(parts, Arrow(top_k=1))}) == pytest.approx(
        {"p2": 2 / 3, "p3": 1 / 3, "p0": 0, "p1": 0}
    )


def test_a_prototype_needs_no_gauge() -> None:
    down, up, gauge = torch.randn(3, 9), torch.randn(5, 3), torch.randn(3, 3)
    ours = prototype(Factors(gauge @ down, up @ torch.linalg.inv(gauge)))
    assert torch.allclose(ours.abs(), torch.linalg.svd(up @ down)[2][0].abs(), atol=1e-3)
    assert prototype(Factors(down, torch.zeros(5, 3))).isfinite().all()


def test_a_routed_model_writes_text(model: PreTrainedModel) -> None:
    adapters = {f"p{i}": adapter_of(model, 1 + i, seed=i) for i in range(3)}
    generate: Any = model.generate
    with arrow(model, adapters, Arrow(top_k=2)):
        with_cache, without = (
            generate(TOKENS[:1], attention_mask=torch.ones(1, 12), max_new_tokens=6, do_sample=False, use_cache=cache)
            for cache in (True, False)
        )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("settings", [Arrow(top_k=0), Arrow(top_k=3), Arrow(top_k=1, temperature=0)])
def test_settings_out_of_range_are_refused(settings: Arrow) -> None:
    model = model_of("llama")
    adapters = {f"p{i}": adapter_of(model, 2, seed=i) for i in range(2)}
    with pytest.raises(RecipeError), arrow(model, adapters, settings):
        pass


def test_an_adapter_of_another_shape_is_refused() -> None:
    model = model_of("llama")
    other = Adapter({"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 8), torch.ones(16, 1))})
    with pytest.raises(ModelError, match=r"other: .*q_proj"), arrow(model, {"other": other}, Arrow(top_k=1)):
        pass
