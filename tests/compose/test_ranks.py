"""Rank-wise routing: all ranks are the exact sum, few are what a slow reference says, and routers learn and last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.base import Base
from potluck.compose.lora import LowRank, added, attached, linear_maps, sizes, train_adapter
from potluck.compose.low_rank import concatenated
from potluck.compose.routing.ranks import (
    LearnedRanks,
    Ranks,
    SelfActivatedRanks,
    self_activated,
    train_ranks,
    untrained_ranks,
)
from potluck.compose.routing.router_file import load_router, save_router
from potluck.compose.training import Lesson, loss_on
from potluck.corpus.tokenizer import vocabulary_from_words
from potluck.errors import ModelError, RecipeError, StorageError

LESSON = Lesson(steps=40, batch_size=4, sequence_length=16, learning_rate=3e-2, device="cpu")


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return Base(LlamaForCausalLM(config).eval(), vocabulary_from_words({"a": 2}, 300), "tiny")


@pytest.fixture(scope="module")
def adapters(base: Base) -> dict[str, Adapter]:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, rank in (("ada", 2), ("bob", 3), ("eve", 1)):
        modules = {}
        for path, module in linear_maps(base.model, ("q_proj", "down_proj")).items():
            d_in, d_out = sizes(module)
            modules[path] = Factors(
                torch.randn(rank, d_in, generator=draw) / 4, torch.randn(d_out, rank, generator=draw)
            )
        found[name] = Adapter(modules)
    return found


def ones(factors: Factors, active: int) -> LearnedRanks:
    """A router of zeros, so that every gate is 1."""
    return LearnedRanks(factors, active, torch.zeros_like(factors.down), torch.zeros(factors.rank))


def some(rank: int = 6, seed: int = 0) -> tuple[Factors, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(rank, 9, generator=draw), torch.randn(5, rank, generator=draw))
    return factors, torch.randn(2, 4, 9, generator=draw)


def test_all_ranks_with_gates_of_one_are_the_exact_sum(base: Base, adapters: dict[str, Adapter]) -> None:
    tokens = torch.arange(16)[None]
    paths = next(iter(adapters.values())).modules
    whole = Adapter({path: concatenated([a.modules[path] for a in adapters.values()], [1.0] * 3) for path in paths})
    with attached(base.model, whole):
        wanted = base.model(tokens).logits
    learned = untrained_ranks(adapters, 6)
    for layer in learned.values():
        layer.router.data.zero_()
    for routed in (learned, self_activated(adapters, 6)):
        with added(base.model, routed):
            assert torch.allclose(base.model(tokens).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("active", [1, 4])
def test_the_learned_form_is_that_of_the_paper(active: int) -> None:
    factors, x = some()
    router, bias = torch.randn(6, 9), torch.randn(6)
    found = LearnedRanks(factors, active, router, bias)(x)
    for token, y in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        scores = router @ token
        best = (scores + bias).topk(active).indices.tolist()
        wanted = sum(2 * scores[i].sigmoid() * factors.up[:, i] * (factors.down[i] @ token) for i in best)
        assert torch.allclose(y, torch.as_tensor(wanted), atol=1e-4)


@pytest.mark.parametrize("active", [1, 4])
def test_ranks_that_choose_themselves_are_those_that_add_most(active: int) -> None:
    factors, x = some()
    found = SelfActivatedRanks(factors, active)(x)
    for token, y in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        each = [factors.up[:, i] * (factors.down[i] @ token) for i in range(6)]
        best = sorted(each, key=lambda addition: -float(addition.norm()))[:active]
        assert torch.allclose(y, torch.stack(best).sum(0), atol=1e-4)


def test_the_bias_moves_towards_an_even_load() -> None:
    factors, x = some()
    layer = ones(factors, 2).train()
    layer.router.data = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    x = torch.randn(500, 9, generator=torch.Generator().manual_seed(4)) + 1

    def unevenness() -> float:
        layer.load.zero_()
        layer(x)
        return float(layer.load.std() / layer.load.mean())

    before = unevenness()
    for _ in range(200):
        layer(x)
        layer.rebalance(0.05)
    assert unevenness() < 0.1 < before
    layer.eval()(x)
    assert float(layer.load.sum()) == 2 * len(x)  # only training is counted


def test_training_lowers_the_loss_and_moves_the_router_alone(base: Base) -> None:
    streams = {"ada": np.tile(np.arange(8), 60), "bob": np.tile(np.arange(16, 8, -1), 60)}
    adapters = {name: train_adapter(base, [stream], LESSON, rank=4) for name, stream in streams.items()}
    before = base.content_hash
    fresh = untrained_ranks(adapters, 4)
    routed = train_ranks(base, adapters, list(streams.values()), LESSON, Ranks(active=4))

    def loss(additions: Mapping[str, nn.Module]) -> float:
        with added(base.model, additions):
            return sum(loss_on(base.model, stream, 16, "cpu") for stream in streams.values()) / 2

    alone = [loss({path: LowRank(f) for path, f in adapter.modules.items()}) for adapter in adapters.values()]
    assert loss(routed) < min(*alone, loss(fresh), loss(self_activated(adapters, 8))) - 0.5
    assert replace(base).content_hash == before
    for path, layer in routed.items():
        assert torch.equal(layer.down, fresh[path].down)
        assert not torch.equal(layer.router, fresh[path].router)
        assert layer.bias.any()
        assert not layer.router.requires_grad


@pytest.fixture(scope="module")
def saved(
    adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, LearnedRanks]]:
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    routers = untrained_ranks(adapters, 4, seed=7)
    for layer in routers.values():
        layer.bias.normal_()
    save_router(routers, adapters, path)
    return path, routers


def test_a_router_is_the_same_when_read_again(
    adapters: dict[str, Adapter], saved: tuple[Path, dict[str, LearnedRanks]]
) -> None:
    path, routers = saved
    found = load_router(path, adapters)
    assert found.keys() == routers.keys()
    for place, layer in routers.items():
        x = torch.randn(5, layer.down.shape[1])
        assert torch.equal(found[place](x), layer(x))


def test_a_router_is_for_its_adapters(
    adapters: dict[str, Adapter], saved: tuple[Path, dict[str, LearnedRanks]]
) -> None:
    path, _ = saved
    changed = {path: Factors(f.down, 1.001 * f.up) for path, f in adapters["bob"].modules.items()}
    backwards = dict(reversed(adapters.items()))
    for others in (backwards, {**adapters, "bob": Adapter(changed)}, {"ada": adapters["ada"]}):
        with pytest.raises(ModelError, match="other adapters"):
            load_router(path, others)


def test_what_is_no_router_is_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such router"):
        load_router(tmp_path / "none", adapters)
    (tmp_path / "bad").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="bad"):
        load_router(tmp_path / "bad", adapters)
    routers = untrained_ranks(adapters, 4)
    next(iter(routers.values())).bias.fill_(float("nan"))
    save_router(routers, adapters, tmp_path / "nan")
    with pytest.raises(ModelError, match="NaN"):
        load_router(tmp_path / "nan", adapters)
    part = dict(list(untrained_ranks(adapters, 4).items())[:1])
    save_router(part, adapters, tmp_path / "part")
    with pytest.raises(ModelError, match="missing"):
        load_router(tmp_path / "part", adapters)
    with pytest.raises(StorageError):
        save_router(routers, adapters, tmp_path / "bad" / "router")


@pytest.mark.parametrize("active", [0, 7])
def test_so_many_ranks_cannot_be_active(adapters: dict[str, Adapter], active: int) -> None:
    with pytest.raises(RecipeError):
        self_activated(adapters, active)
    with pytest.raises(RecipeError):
        untrained_ranks(adapters, active)


def test_an_adapter_of_another_shape_is_refused(base: Base) -> None:
    path = "model.layers.0.self_attn.q_proj"
    other = Adapter({path: Factors(torch.ones(1, 8), torch.ones(16, 1))})
    with pytest.raises(ModelError, match="q_proj"):
        train_ranks(base, {"other": other}, [np.arange(99) % 8], LESSON, Ranks(active=1))
