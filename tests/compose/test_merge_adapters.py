"""Merging adapters: exact where it can be, as PEFT computes it, and refused where it would be silently wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import Adapter, Factors, load_adapter, save_adapter
from potluck.compose.lora import attached
from potluck.compose.low_rank import canonical, concatenated, decomposed, truncated
from potluck.compose.merging.adapters import (
    ADAPTER_METHODS,
    MEASURED,
    Lego,
    Sum,
    TruncatedSvd,
    default_weights,
    merge_adapters,
)
from potluck.compose.merging.rules import RULES, DareLinear, Ties, merged
from potluck.compose.merging.sketch import sketched
from potluck.errors import ModelError, RecipeError

# What PEFT 0.21 asks of transformers is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = torch.arange(24).view(2, 12) % 50
LLAMA_MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, bos_token_id=0, eos_token_id=0)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, **shape, bos_token_id=0, eos_token_id=0)).eval()


def trained(folder: Path, seed: int = 0, model: Any = None, **config: Any) -> Path:
    """A PEFT folder of random factors, as a participant would save it."""
    model = model or llama()
    maps = ["c_attn", "c_proj", "c_fc"] if isinstance(model, GPT2LMHeadModel) else LLAMA_MAPS
    table = {"r": 4, "target_modules": maps, "fan_in_fan_out": isinstance(model, GPT2LMHeadModel)} | config
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **table))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1])
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of a Llama: plain, rank-stabilised, and with ranks and scalings of their own."""
    root = tmp_path_factory.mktemp("adapters")
    mixed = {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 7}, "alpha_pattern": {r".*\.1\..*v_proj": 3}}
    return {
        "plain": trained(root / "plain", 1),
        "rslora": trained(root / "rslora", 2, r=8, lora_alpha=16, use_rslora=True),
        "mixed": trained(root / "mixed", 3, r=3, lora_alpha=5, **mixed),
        "few": trained(root / "few", 4, target_modules=["q_proj"]),
    }


@pytest.fixture(scope="module")
def adapters(folders: Mapping[str, Path]) -> dict[str, Adapter]:
    return {name: load_adapter(folder) for name, folder in folders.items()}


def peft_delta(folder: Path, path: str, model: Any = None) -> Tensor:
    """What PEFT itself adds to a linear map, float64."""
    module = peft.PeftModel.from_pretrained(model or llama(), folder).base_model.model.get_submodule(path)
    scaling, up, down = module.scaling["default"], module.lora_B["default"].weight, module.lora_A["default"].weight
    return scaling * up.detach().double() @ down.detach().double()


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def delta(factors: Factors) -> Tensor:
    return factors.up.double() @ factors.down.double()


def logits_with_peft(folder: Path, model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = peft.PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
    return logits


def zero(form: tuple[int, int, int] = (2, 6, 4)) -> Factors:
    return Factors(torch.randn(form[0], form[1]), torch.zeros(form[2], form[0]))


def statistics_of(kind: str, times: float) -> Statistics:
    gram = {"p.gram": times * torch.eye(6).double()}
    rows = {"p.rows": times * torch.ones(4).double(), "p.columns": times * torch.ones(6).double()}
    return Statistics(kind, gram if kind == "gram" else rows, 10, "0" * 64)


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "rslora", "mixed"])
@pytest.mark.parametrize("method", [Sum(), TruncatedSvd(energy=1.0), TruncatedSvd()])
def test_one_adapter_with_weight_one_is_itself(
    folders: Mapping[str, Path], adapters: Mapping[str, Adapter], method: Any, kind: str
) -> None:
    same = merge_adapters([adapters[kind]], method, [1.0])
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"):
        assert apart(delta(same.modules[path]), peft_delta(folders[kind], path)) <= 1e-6


@pytest.mark.parametrize("method", [Sum(), TruncatedSvd(energy=1.0)])
def test_a_sum_is_the_sum(folders: Mapping[str, Path], adapters: Mapping[str, Adapter], method: Any) -> None:
    names, weights = ("plain", "rslora", "mixed", "few"), [0.5, -0.3, 2.0, 1.0]
    total = merge_adapters([adapters[name] for name in names], method, weights)
    for path, count in (("model.layers.0.self_attn.q_proj", 4), ("model.layers.1.mlp.up_proj", 3)):
        pairs = zip(names[:count], weights, strict=False)
        expected = sum((weight * peft_delta(folders[name], path) for name, weight in pairs), torch.zeros(()))
        assert apart(delta(total.modules[path]), expected) <= 1e-6
    assert total.modules["model.layers.1.mlp.up_proj"].rank == 4 + 8 + 7


@pytest.mark.parametrize(("build", "rank"), [(llama, 5), (gpt2, 5), (llama, None)])
def test_peft_computes_with_it_what_we_do(tmp_path: Path, build: Callable[[], Any], rank: int | None) -> None:
    parts = [trained(tmp_path / str(i), i, build(), r=2 + i, use_rslora=i == 1) for i in range(3)]
    method = Sum() if rank is None else TruncatedSvd()
    together = merge_adapters([load_adapter(part) for part in parts], method, rank=rank)
    save_adapter(together, tmp_path / "merged")
    model = build()
    assert any(isinstance(module, Conv1D) for module in model.modules()) == (build is gpt2)
    with attached(model, together), torch.inference_mode():
        ours = model(TOKENS).logits
        assert apart(ours, build()(TOKENS).logits) > 0.01
    assert apart(logits_with_peft(tmp_path / "merged", build()), ours) <= 1e-5


def test_what_vllm_asks_of_an_adapter(adapters: Mapping[str, Adapter], tmp_path: Path) -> None:
    """vllm-project/vllm, vllm/lora/peft_helper.py (`PEFTHelper`) and lora_model.py (`from_local_checkpoint`)."""
    save_adapter(merge_adapters([*adapters.values()], TruncatedSvd(), rank=6), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() >= {"r", "lora_alpha", "target_modules"}  # its fields without a default
    assert config["r"] > 0 and config["lora_alpha"] / config["r"] == 1  # it knows no rank or alpha patterns
    assert not {"rank_pattern", "alpha_pattern", "trainable_token_indices"} & config.keys()
    assert config["bias"] == "none" and not config.get("modules_to_save") and not config.get("use_dora")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            path, kind, end = name.removeprefix("base_model.model.").rsplit(".", 2)
            assert name.startswith("base_model.model.") and kind in ("lora_A", "lora_B") and end == "weight"
            assert path.rpartition(".")[2] in LLAMA_MAPS  # the last word alone is looked up
            assert file.get_slice(name).get_shape()[kind == "lora_B"] == config["r"]


# --- low rank ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    k=st.integers(1, 30),
    gauge=st.floats(-6, 6),
    same=st.booleans(),
)
def test_truncation_is_the_best_of_its_rank(
    ranks: list[int], d_out: int, d_in: int, k: int, gauge: float, same: bool
) -> None:
    """Whatever the factors: of any rank, dependent, and scaled against each other."""
    draw = torch.Generator().manual_seed(sum(ranks) + d_out + 7 * d_in)
    parts = [Factors(torch.randn(r, d_in, generator=draw), torch.randn(d_out, r, generator=draw)) for r in ranks]
    if same:
        parts += [Factors(10**gauge * part.down, part.up / 10**gauge) for part in parts]
    whole = concatenated(parts, [1.0] * len(parts))
    expected = torch.linalg.svd(delta(whole)).S
    found = truncated(whole, k)
    error, optimum = (delta(found) - delta(whole)).norm(), expected[k:].norm()
    assert found.rank <= k
    assert error <= optimum * (1 + 1e-6) + 1e-6 * expected.norm()
    if whole.rank:
        u, s, vt = decomposed(whole)
        assert torch.allclose(s.double(), expected[: len(s)], rtol=1e-5, atol=1e-6 * float(expected.max()))
        assert apart(u * s @ vt + 1, delta(whole) + 1) <= 1e-5


def test_energy_chooses_a_rank_for_each_map() -> None:
    def of(s: list[float]) -> Factors:
        q = torch.linalg.qr(torch.randn(12, len(s))).Q
        return Factors(q.T, torch.linalg.qr(torch.randn(9, len(s))).Q * torch.tensor(s))

    adapter = Adapter({"steep": of([10, 1, 1]), "flat": of([1, 1, 1])})
    found = merge_adapters([adapter], TruncatedSvd(energy=0.95)).modules
    assert (found["steep"].rank, found["flat"].rank) == (1, 3)
    assert merge_adapters([adapter], TruncatedSvd(energy=0.95), rank=2).modules["flat"].rank == 2


def test_the_canonical_gauge_forgets_the_gauge() -> None:
    factors, mix = Factors(torch.randn(3, 9), torch.randn(7, 3)), torch.randn(3, 3) + 3 * torch.eye(3)
    other = canonical(Factors(mix @ factors.down, factors.up @ mix.inverse()))
    assert torch.allclose(canonical(factors).down, other.down, atol=1e-4)


@pytest.mark.parametrize("held", [0, 1 << 26])
def test_a_sketch_finds_nearly_the_best(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr("potluck.compose.merging.sketch._HELD", held)
    torch.manual_seed(0)
    matrix = torch.randn(90, 60) @ torch.diag(torch.arange(1.0, 61) ** -0.7)
    found = sketched(lambda: matrix.split(17), (90, 60), rank=8)
    optimum = torch.linalg.svd(matrix.double()).S[8:].norm()
    assert found.rank == 8
    assert (delta(found) - matrix).norm() <= 1.01 * optimum


# --- entry by entry ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 1.5]])
def test_rules_act_on_the_products(
    adapters: Mapping[str, Adapter], monkeypatch: pytest.MonkeyPatch, name: str, weights: list[float] | None
) -> None:
    """In blocks of a few rows, as on the whole product."""
    monkeypatch.setattr("potluck.compose.merging.sketch._BLOCK", 500)
    monkeypatch.setattr("potluck.compose.merging.sketch._HELD", 0)
    parts, rule = [adapters[key] for key in ("plain", "mixed", "few")], RULES[name]()
    found = merge_adapters(parts, rule, weights, rank=32)
    shares = torch.tensor(weights or default_weights(rule, 3))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        zero = torch.zeros_like(delta(parts[0].modules[path]).float())
        whole = torch.stack([part.modules[path].delta() if path in part.modules else zero for part in parts])
        assert apart(delta(found.modules[path]), merged(rule, path, shares, whole)) <= 1e-5


def test_a_rule_at_a_small_rank_is_nearly_the_best(adapters: Mapping[str, Adapter]) -> None:
    parts, path = [adapters["plain"], adapters["rslora"]], "model.layers.0.mlp.gate_proj"
    found = merge_adapters(parts, Ties(), rank=6).modules[path]
    whole = merged(Ties(), path, torch.full((2,), 0.5), torch.stack([p.modules[path].delta() for p in parts]))
    assert (delta(found) - whole).norm() <= 1.01 * torch.linalg.svd(whole.double()).S[6:].norm()


def test_a_seed_decides_what_is_drawn(adapters: Mapping[str, Adapter]) -> None:
    parts, path = [adapters["plain"], adapters["mixed"]], "model.layers.0.self_attn.q_proj"
    one, again, other = (delta(merge_adapters(parts, DareLinear(seed=s)).modules[path]) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other)


# --- what is refused -----------------------------------------------------------------------------

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "all"}, "bias"),
    "LoRA bias": ({"lora_bias": True}, "lora_bias"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_sum_of_products_is_refused(tmp_path: Path, name: str) -> None:
    config, word = UNSUPPORTED[name]
    with pytest.raises(ModelError, match=word):
        load_adapter(trained(tmp_path, **config))


CONFIG_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "LOHA"),
    "a setting of the future": ({"use_something_new": True}, "use_something_new"),
    "another rank": ({"r": 5}, "rank 4"),
    "no number": ({"lora_alpha": math.nan}, "NaN"),
    "no expression": ({"rank_pattern": {"[": 4}}, "regular expression"),
    "an endless expression": ({"rank_pattern": {"(.*)*x": 4}}, "not supported"),
    "no table": ({"alpha_pattern": 3}, "table"),
}


@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_a_configuration_that_says_something_else(folders: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    changes, word = CONFIG_CHANGES[name]
    save_file(load_file(folders["plain"] / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((folders["plain"] / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=word):
        load_adapter(tmp_path)


TENSOR_CHANGES: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "NaN": lambda tensors, name: tensors | {name: torch.full_like(tensors[name], math.nan)},
    "half a pair": lambda tensors, name: {key: tensor for key, tensor in tensors.items() if key != name},
    "another rank": lambda tensors, name: tensors | {name: tensors[name][:-1].contiguous()},
    "another tensor": lambda tensors, name: tensors | {"base_model.model.lm_head.weight": torch.ones(2)},
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_damaged_weights(folders: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text((folders["plain"] / "adapter_config.json").read_text())
    tensors = load_file(folders["plain"] / "adapter_model.safetensors")
    changed = TENSOR_CHANGES[name](tensors, next(iter(tensors)))
    save_file(changed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        load_adapter(tmp_path)


def simple(d_in: int = 6, **more: Any) -> Adapter:
    return Adapter({"x": Factors(torch.ones(2, d_in), torch.ones(5, 2))}, **more)


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ([simple(d_in=7)], "one adapter adds 5 x 7"),
        ([simple(base="b"), simple(base="a")], "different bases: a, b"),
        ([simple(base="a", about={"base_hash": "1"}), simple(base="a", about={"base_hash": "2"})], "different bases"),
        ([simple(transposed=True)], "transposed"),
    ],
)
def test_parts_that_do_not_belong_together(others: list[Adapter], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        merge_adapters([simple(), *others], Sum())


@pytest.mark.parametrize(
    ("method", "more", "word"),
    [
        (Sum(), {"rank": 3}, "sum keeps every rank"),
        (Sum(), {"weights": [1.0]}, "2 adapters"),
        (Sum(), {"weights": [1.0, math.nan]}, "finite"),
        (Lego(), {"weights": [1.0, 1.0]}, "LEGO"),
        (ADAPTER_METHODS["regmean"](), {}, "gram"),
        (Ties(), {"weights": [1.0, -1.0]}, "negative"),
    ],
)
def test_settings_that_cannot_be(method: Any, more: Mapping[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        merge_adapters([simple(), simple()], method, **more)


# --- the verb ------------------------------------------------------------------------------------


def test_merge_writes_an_adapter(potluck: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    names = ("plain", "rslora", "mixed")
    parts = [folders[name] for name in names]
    done = potluck(
        "merge", *parts, "--method", "svd", "--rank", 6, "--weights", "0.5,0.3,0.2", "--out", "new", "--json"
    ).result
    assert (done["method"], done["rank"], done["weights"]) == ("svd", 6, [0.5, 0.3, 0.2])
    assert len(done["sources"][0]["sha256"]) == 64
    ours = merge_adapters([load_adapter(part) for part in parts], TruncatedSvd(), [0.5, 0.3, 0.2], 6)
    read = load_adapter(tmp_path / "new")
    assert read.about["sources"] == done["sources"]
    for path, factors in read.modules.items():
        assert apart(factors.delta(), ours.modules[path].delta()) <= 1e-6


@pytest.mark.parametrize("name", [name for name in ADAPTER_METHODS if name not in ("regmean", "fisher")])
def test_every_method_has_a_name(potluck: Any, folders: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    potluck("merge", folders["plain"], folders["mixed"], "--method", name, "--out", "new")
    read = load_adapter(tmp_path / "new")
    assert read.about["method"] == name and read.rank <= 11


@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_adapters_that_add_nothing_are_merged_to_nothing(name: str) -> None:
    method = ADAPTER_METHODS[name]()
    known = [statistics_of(MEASURED[type(method)], 1.0)] * 2 if type(method) in MEASURED else []
    found = merge_adapters([Adapter({"p": zero()}), Adapter({"p": zero()})], method, statistics=known)
    assert apart(delta(found.modules["p"]) + 1, torch.ones(4, 6)) <= 1e-6


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_where_no_text_ever_came_the_merge_is_the_mean(name: str) -> None:
    parts = [Factors(torch.randn(2, 6), torch.randn(4, 2)) for _ in range(2)]
    method = ADAPTER_METHODS[name]()
    known = [statistics_of(MEASURED[type(method)], 0.0)] * 2
    found = merge_adapters([Adapter({"p": part}) for part in parts], method, rank=4, statistics=known)
    assert apart(delta(found.modules["p"]), sum(map(delta, parts), torch.zeros(())) / 2) <= 1e-5


@pytest.mark.parametrize("build", [llama, gpt2])
def test_merge_into_a_base_writes_a_model(potluck: Any, tmp_path: Path, build: Callable[[], Any]) -> None:
    base, part = tmp_path / "base", trained(tmp_path / "part", 3, build(), use_rslora=True)
    build().save_pretrained(base)
    write_tokenizer(base)
    done = potluck("merge", part, "--method", "sum", "--into-base", base, "--out", "full", "--json").result
    model = AutoModelForCausalLM.from_pretrained(done["model"])
    assert apart(model(TOKENS).logits.detach(), logits_with_peft(part, build())) <= 1e-5
    assert (tmp_path / "full" / "tokenizer.json").exists() and (tmp_path / "full" / "potluck.json").exists()


def test_a_base_that_the_adapter_is_not_for(potluck: Any, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    factors = {"transformer.h.0.attn.c_attn": (32, 96), "lm_head": (32, 50)}
    for path, about, word in (
        ("transformer.h.0.attn.c_attn", {"base_hash": "another"}, "part: was trained on another base than base"),
        ("lm_head", {}, "its weight is also transformer.wte.weight"),
        (
            "transformer.h.77.attn.c_attn",
            {},
            "no linear map transformer.h.77.attn.c_attn: its transformer.h are 0 to 1",
        ),
    ):
        d_in, d_out = factors.get(path, (32, 96))
        save_adapter(
            Adapter({path: Factors(torch.ones(1, d_in), torch.ones(d_out, 1))}, about=about), tmp_path / "part"
        )
        said = potluck("merge", "part", "--method", "sum", "--into-base", "base", "--out", "full", code=5).err
        assert word in " ".join(said.split()) and not (tmp_path / "full").exists()
        (tmp_path / "part" / "potluck.json").unlink(missing_ok=True)


def test_a_merge_that_does_harm_or_nothing_says_so(potluck: Any, tmp_path: Path) -> None:
    """On standard error, in the JSON and in the folder's record; a base of another name is doubted."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    path = "model.layers.0.mlp.down_proj"
    for name, size in (("wild", 30.0), ("nothing", 0.0)):
        save_adapter(
            Adapter({path: Factors(torch.ones(1, 48), size * torch.randn(32, 1))}, "hub/other"), tmp_path / name
        )
    (tmp_path / "text.txt").write_text("!" * 600)
    words = ("--method", "sum", "--base", "base", "--data", "text.txt", "--out", "out", "--json")
    done = potluck("merge", "wild", "nothing", *words)
    said = done.result["warnings"]
    for word in (
        "wild: says that it was trained on hub/other",
        "nothing: all its products are zero",
        "out: worse than",
    ):
        assert any(word in warning for warning in said) and word in " ".join(done.err.split())
    effect = json.loads((tmp_path / "out" / "potluck.json").read_text())["effect"]
    assert effect["after"] > effect["before"] and effect["tokens"] == done.result["effect"]["tokens"]


def test_a_merge_that_changes_nothing_says_so(potluck: Any, tmp_path: Path) -> None:
    """Of full models, with a context that is shorter than what is measured at once; the figures are in the JSON."""
    for name in ("base", "a", "b"):
        gpt2().save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_text("!" * 300)
    words = ("--method", "ties", "--base", "base", "--data", "text.txt", "--out", "out", "--json")
    done = potluck("merge", "a", "b", *words)
    assert "out: no different from the base on this text" in done.err and done.result["effect"]["error"] == 0
    assert done.result["warnings"] and done.result["method"] == "ties"


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:49]]  # as many as the model has rows
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--method", "average"], 3, "no method average"),
        (["--method", "svd", "--density", "0.5"], 3, "--density has no effect on svd"),
        (["--method", "sum", "--lambda", "2"], 3, "--lambda has no effect on sum"),
        (["--method", "svd", "--base", "x", "--into-base", "x"], 3, "name the base twice"),
        (["--method", "svd", "--data", "x"], 3, "--data compares with the base"),
        (["--method", "svd", "--weights", "1,x"], 2, "numbers with commas"),
        (["--method", "ties", "--density", "0"], 3, "density"),
        (["--method", "svd", "--statistics", "x"], 3, "1 files of statistics for 2 adapters"),
        (["--method", "regmean"], 5, "statistics"),
    ],
)
def test_mistakes_leave_nothing(
    potluck: Any, folders: Mapping[str, Path], tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    ended = potluck("merge", folders["plain"], folders["mixed"], *words, "--out", tmp_path / "new", code=code)
    assert said in " ".join(ended.err.split())
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_folders_of_two_kinds(potluck: Any, folders: Mapping[str, Path], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    said = potluck("merge", folders["plain"], "model", "--method", "ties", "--out", "new", code=5).err
    assert "some of these folders are adapters" in said
    assert "neither an adapter nor" in potluck("merge", tmp_path / "said", "--method", "sum", "--out", "x", code=5).err
