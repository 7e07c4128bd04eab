"""Summed statistics: what everybody's sums give is what everybody's data would give, and who leaves leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from potluck.aggregation.statistics import Statistics, SummedStatistics, summed
from potluck.compose.adapter import Adapter, Factors, load_adapter, save_adapter
from potluck.compose.base import Base
from potluck.compose.lora import Added, merge_into
from potluck.compose.merging.adapters import merge_adapters
from potluck.compose.merging.fisher import Fisher
from potluck.compose.merging.regmean import RegMean
from potluck.compose.merging.summed import merged_from_sums, summands
from potluck.compose.statistics import (
    STATISTICS_FILE,
    fisher_statistics,
    gram_statistics,
    load_statistics,
    save_statistics,
)
from potluck.errors import CorpusError, ModelError, RecipeError

D_OUT, D_IN, RANK = 7, 12, 3


def participant(seed: int, tokens: int = 40) -> tuple[Adapter, Tensor]:
    """An adapter, and the inputs of its one map, float64."""
    draw = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(RANK, D_IN, generator=draw), torch.randn(D_OUT, RANK, generator=draw))
    mixing = torch.randn(D_IN, D_IN, generator=draw)
    inputs = (torch.randn(tokens, D_IN, generator=draw) @ mixing).double()
    return Adapter({"x": Factors(factors.down.double(), factors.up.double())}), inputs


def gram(inputs: Tensor) -> Statistics:
    return Statistics("gram", {"x.gram": inputs.T @ inputs}, len(inputs), "base")


def information(seed: int) -> Statistics:
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.rand(D_OUT, generator=draw) ** 4, torch.rand(D_IN, generator=draw) ** 4
    return Statistics("fisher", {"x.rows": rows.double(), "x.columns": columns.double()}, 5, "base")


def delta(adapter: Adapter) -> Tensor:
    return adapter.modules["x"].up.double() @ adapter.modules["x"].down.double()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- RegMean and Fisher --------------------------------------------------------------------------


def test_regmean_is_the_pooled_least_squares_solution() -> None:
    """Eight participants: merged from their statistics as it would be fitted to all their inputs and outputs."""
    adapters, inputs = zip(*(participant(seed) for seed in range(8)), strict=True)
    outputs = torch.cat([x @ delta(adapter).T for x, adapter in zip(inputs, adapters, strict=True)])
    pooled = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    merged = merge_adapters(adapters, RegMean(ridge=0), rank=8 * RANK, statistics=[gram(x) for x in inputs])
    assert apart(delta(merged), pooled) <= 1e-9


def test_regmean_from_masked_sums() -> None:
    """Nobody's matrices are seen; who leaves is subtracted."""
    adapters, inputs = zip(*(participant(seed) for seed in range(8)), strict=True)
    sent = [summands(a, gram(x), RegMean(ridge=0)) for a, x in zip(adapters, inputs, strict=True)]
    masks = [{name: torch.randn_like(tensor) for name, tensor in sent[0].tensors.items()} for _ in range(8)]
    total = SummedStatistics("regmean sums", "base")
    for i, part in enumerate(sent):
        hidden = {name: tensor + masks[i][name] - masks[i - 1][name] for name, tensor in part.tensors.items()}
        total.accumulate(replace(part, tensors=hidden))
    merged = merged_from_sums(total.finish(), RegMean(ridge=0), rank=8 * RANK)
    directly = merge_adapters(adapters, RegMean(ridge=0), rank=8 * RANK, statistics=[gram(x) for x in inputs])
    assert apart(delta(merged), delta(directly)) <= 1e-6  # the sketch computes in float32
    total.remove(sent[3])
    rest = merged_from_sums(total.finish(), RegMean(ridge=0), rank=8 * RANK)
    others = [i for i in range(8) if i != 3]
    without = merge_adapters(
        [adapters[i] for i in others], RegMean(ridge=0), rank=8 * RANK, statistics=[gram(inputs[i]) for i in others]
    )
    assert apart(delta(rest), delta(without)) <= 1e-6


def test_regmean_of_one_and_of_equals_is_that_one() -> None:
    (adapter, x), (_, other) = participant(1), participant(2)
    for parts, known in (([adapter], [gram(x)]), ([adapter] * 2, [gram(x), gram(other)])):
        assert apart(delta(merge_adapters(parts, RegMean(), statistics=known)), delta(adapter)) <= 1e-6


def test_directions_that_nobody_has_need_a_ridge_and_get_the_mean() -> None:
    adapters, inputs = zip(*(participant(seed, tokens=3) for seed in range(2)), strict=True)
    known = [gram(x) for x in inputs]
    with pytest.raises(ModelError, match="open"):
        merge_adapters(adapters, RegMean(ridge=0), statistics=known)
    merged = merge_adapters(adapters, RegMean(ridge=1e-9), rank=2 * RANK, statistics=known)
    unseen = torch.linalg.svd(torch.cat(inputs)).Vh[6:].T
    traces = torch.tensor([float(k.tensors["x.gram"].trace()) for k in known], dtype=torch.float64)
    mean = sum((share * delta(a) for share, a in zip(traces / traces.sum(), adapters, strict=True)), torch.zeros(()))
    assert apart(delta(merged) @ unseen, mean @ unseen) <= 1e-4


def test_off_the_diagonal() -> None:
    (one, x), (two, y) = participant(1), participant(2)
    merged = merge_adapters([one, two], RegMean(ridge=0, off_diagonal=0), rank=9, statistics=[gram(x), gram(y)])
    squares, others = (x**2).sum(0), (y**2).sum(0)
    assert apart(delta(merged), (delta(one) * squares + delta(two) * others) / (squares + others)) <= 1e-9


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_fisher_is_the_mean_weighted_by_information(weights: list[float] | None) -> None:
    (one, _), (two, _) = participant(1), participant(2)
    known = [information(1), information(2)]
    method = Fisher(floor=0, alike=False)
    merged = merge_adapters([one, two], method, weights, rank=D_OUT, statistics=known)
    f, g = (w * torch.outer(k.tensors["x.rows"], k.tensors["x.columns"])
            for w, k in zip(weights or [1, 1], known, strict=True))  # fmt: skip
    assert apart(delta(merged), (f * delta(one) + g * delta(two)) / (f + g)) <= 1e-5
    sums = summed([summands(adapter, k, method) for adapter, k in zip([one, two], known, strict=True)])
    if weights is None:
        assert apart(delta(merged_from_sums(sums, method, D_OUT)), delta(merged)) <= 1e-5


def test_how_sure_a_model_is_decides_nothing_unless_asked() -> None:
    (one, _), (two, _) = participant(1), participant(2)
    first, second = information(1), information(2)
    surer = Statistics(second.kind, {k: 10 * v for k, v in second.tensors.items()}, second.count, second.base_hash)
    plain, same = (merge_adapters([one, two], Fisher(), statistics=[first, k]) for k in (second, surer))
    assert apart(delta(plain), delta(same)) <= 1e-5
    other = merge_adapters([one, two], Fisher(alike=False), statistics=[first, surer])
    assert apart(delta(plain), delta(other)) > 1e-2


def test_who_does_not_adapt_a_map_has_no_say() -> None:
    adapter, x = participant(1)
    other = Adapter({"y": participant(2)[0].modules["x"]})
    theirs = Statistics("gram", {"y.gram": x.T @ x}, 3, "base")
    merged = merge_adapters([adapter, other], RegMean(), statistics=[gram(x), theirs])
    assert apart(delta(merged), delta(adapter)) <= 1e-6 and merged.modules.keys() == {"x", "y"}


def test_statistics_that_do_not_fit() -> None:
    adapter, x = participant(1)
    for method, known, error, word in (
        (RegMean(), [], RecipeError, "gram"),
        (Fisher(), [gram(x)] * 2, RecipeError, "fisher"),
        (RegMean(), [gram(x), replace(gram(x), base_hash="other")], ModelError, "different bases"),
    ):
        with pytest.raises(error, match=word):
            merge_adapters([adapter, adapter], method, statistics=known)
    with pytest.raises(ValueError, match="regmean"):
        merged_from_sums(gram(x), RegMean(), 2)


# --- sums ----------------------------------------------------------------------------------------


def test_masked_integers_wrap_around_to_the_exact_sum() -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randint(-100, 100, (5,), generator=draw) for _ in range(3)]
    mask = torch.randint(-(2**62), 2**62, (5,), generator=draw) * 2 + 1
    total = SummedStatistics("k", "b")
    for value, hidden in zip(values, (mask, mask, -2 * mask), strict=True):
        total.accumulate(Statistics("k", {"x": value + hidden}, 1, "b"))
    assert torch.equal(total.finish().tensors["x"], values[0] + values[1] + values[2])
    total.remove(Statistics("k", {"x": values[2] - 2 * mask}, 1, "b"))
    assert (total.participants, total.finish().count) == (2, 2)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (Statistics("other", {"x": torch.ones(2)}, 1, "b"), "other statistics"),
        (Statistics("k", {"x": torch.ones(2)}, 1, "c"), "base c"),
        (Statistics("k", {"y": torch.ones(2)}, 1, "b"), "x: not in all"),
        (Statistics("k", {"x": torch.ones(3)}, 1, "b"), r"not \(2,\)"),
        (Statistics("k", {"x": torch.ones(2, dtype=torch.int64)}, 1, "b"), "int64"),
        (Statistics("k", {"x": torch.tensor([1, math.inf])}, 1, "b"), "NaN or infinite"),
        (Statistics("k", {"x": torch.ones(2)}, 0, "b"), "nothing"),
    ],
)
def test_what_does_not_add_up(other: Statistics, word: str) -> None:
    total = SummedStatistics("k", "b")
    total.accumulate(Statistics("k", {"x": torch.ones(2)}, 1, "b"))
    for take in (total.accumulate, total.remove):
        with pytest.raises(ValueError, match=word):
            take(other)
    assert torch.equal(total.finish().tensors["x"], torch.ones(2, dtype=torch.float64))


def test_sums_of_nobody() -> None:
    total, part = SummedStatistics("k", "b"), Statistics("k", {"x": torch.ones(2)}, 4, "b")
    for fails in (total.finish, lambda: total.remove(part), lambda: summed([])):
        with pytest.raises(ValueError, match=r"no statistics|not added"):
            fails()


# --- measuring -----------------------------------------------------------------------------------


def base_of(kind: str) -> tuple[Base, Adapter]:
    """A base and an adapter on two of its maps, trained on nothing."""
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **shape))
        maps = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.down_proj": (24, 16)}
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        )
        maps = {"transformer.h.0.attn.c_attn": (16, 48), "transformer.h.0.mlp.c_proj": (64, 16)}
    modules = {path: Factors(torch.randn(2, a), torch.randn(b, 2)) for path, (a, b) in maps.items()}
    return Base(model.eval(), None, "base"), Adapter(modules, transposed=kind != "llama")  # type: ignore[arg-type]


STREAM = np.random.default_rng(0).integers(0, 30, 21 * 8 + 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_against_a_model_with_the_adapter_in_its_weights(kind: str) -> None:
    base, adapter = base_of(kind)
    grams, fisher = gram_statistics(base, adapter, STREAM, 8), fisher_statistics(base, adapter, STREAM, 8, seed=3)
    assert grams.count == fisher.count == 21 * 8
    merged, inputs, outputs = base_of(kind)[0].model, {}, {}
    merge_into(merged, adapter)

    def keep(path: str, module: Any, x: Any, y: Tensor) -> None:
        y.retain_grad()
        inputs[path], outputs[path] = x[0].detach().flatten(0, 1).double(), y

    for path in adapter.modules:
        merged.get_submodule(path).register_forward_hook(partial(keep, path))
    logits = merged(torch.from_numpy(STREAM[: 21 * 8]).view(21, 8)).logits.flatten(0, 1)
    draw = torch.Generator().manual_seed(3)
    drawn = torch.cat([torch.multinomial(rows.detach().softmax(-1), 1, generator=draw) for rows in logits.split(64)])
    torch.nn.functional.cross_entropy(logits, drawn.flatten(), reduction="sum").backward()
    for path, x in inputs.items():
        gradients = outputs[path].grad.flatten(0, 1).double()
        assert torch.allclose(grams.tensors[f"{path}.gram"], x.T @ x, rtol=1e-4, atol=1e-4)
        assert torch.allclose(fisher.tensors[f"{path}.columns"], (x**2).sum(0), rtol=1e-4)
        assert torch.allclose(fisher.tensors[f"{path}.rows"], (gradients**2).sum(0), rtol=1e-3)
    assert not any(isinstance(module, Added) for module in base.model.modules())


def test_too_little_text() -> None:
    base, adapter = base_of("llama")
    with pytest.raises(CorpusError, match="shorter than one sequence of 8"):
        gram_statistics(base, adapter, STREAM[:7], 8)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [gram_statistics, fisher_statistics])
def test_statistics_lie_beside_their_adapter(tmp_path: Path, measure: Any) -> None:
    base, adapter = base_of("llama")
    known = measure(base, adapter, STREAM, 8)
    save_adapter(adapter, tmp_path)
    save_statistics(known, tmp_path)
    read = load_statistics(tmp_path, adapter)
    assert (read.kind, read.count, read.base_hash) == (known.kind, known.count, base.content_hash)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in known.tensors.items())
    assert not list(tmp_path.glob(".*"))


def test_the_verb_finds_them(potluck: Any, tmp_path: Path) -> None:
    """Beside the adapters, or where ``--statistics`` says."""
    for name, seed in (("a", 1), ("b", 2)):
        adapter, x = participant(seed)
        save_adapter(adapter, tmp_path / name)
        save_statistics(gram(x), tmp_path / name)
        (tmp_path / f"{name}-known").mkdir()
        save_statistics(information(seed), tmp_path / f"{name}-known")
    potluck("merge", "a", "b", "--method", "regmean", "--ridge", "0.01", "--out", "fitted")
    elsewhere = ("--statistics", "a-known", "--statistics", f"b-known/{STATISTICS_FILE}")
    potluck("merge", "a", "b", "--method", "fisher", *elsewhere, "--weights", "2,1", "--out", "weighed")
    assert "gram" in potluck("merge", "a", "b", "--method", "regmean", *elsewhere, "--out", "no", code=3).err
    assert "fisher" in potluck("merge", "a", "b", "--method", "fisher", "--out", "no", code=3).err
    adapters, known = [participant(i)[0] for i in (1, 2)], [information(i) for i in (1, 2)]
    expected = merge_adapters(adapters, Fisher(), [2, 1], statistics=known)
    assert apart(delta(load_adapter(tmp_path / "weighed")), delta(expected)) <= 1e-5


DAMAGE: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "another format": ({}, {"format": "pt"}, "not the statistics"),
    "no count": ({}, {"count": "-3"}, "not the statistics"),
    "another base": ({}, {"base_hash": "other"}, "another base"),
    "another map": ({"y.gram": torch.eye(D_IN)}, {}, "y.gram is not of this adapter"),
    "another shape": ({"x.gram": torch.eye(3)}, {}, "another shape"),
    "not symmetric": ({"x.gram": torch.ones(D_IN, D_IN).triu()}, {}, "symmetric"),
    "negative": ({"x.gram": -torch.eye(D_IN)}, {}, "sum of squares"),
    "NaN": ({"x.gram": torch.full((D_IN, D_IN), math.nan)}, {}, "sum of squares"),
    "integers": ({"x.gram": torch.eye(D_IN).int()}, {}, "sum of squares"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_statistics(tmp_path: Path, name: str) -> None:
    adapter, x = participant(1)
    adapter = replace(adapter, about={"base_hash": "base"})
    tensors, facts, word = DAMAGE[name]
    save_statistics(gram(x), tmp_path)
    written = load_file(tmp_path / STATISTICS_FILE)
    metadata = {"format": "potluck-statistics-1", "kind": "gram", "count": "40", "base_hash": "base"}
    save_file(written | tensors, tmp_path / STATISTICS_FILE, metadata | facts)
    with pytest.raises(ModelError, match=word):
        load_statistics(tmp_path, adapter)


def test_statistics_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_statistics(tmp_path, participant(1)[0])
    (tmp_path / STATISTICS_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        load_statistics(tmp_path, participant(1)[0])
