"""Merging adapters: time and error beside PEFT's, and what PEFT gets wrong on cases that have an exact answer.

**Speed.** Eight adapters on all linear maps of a Llama, layer by layer: ours and PEFT's `add_weighted_adapter` with
`svd` in turn, on the same factors in memory, which are random. Both errors are to the exact sum, in float64, over that
of the best matrix of this rank.

**Exactness.** One adapter with weight one is itself, and a sum is the sum. Relative errors: of logits for one adapter,
of the product of a random map's factors for sums. Logits are compared in float64, where a merge adds nothing; in fp32
the network itself rounds, the more the larger the adapter is (rsLoRA's is 5.7 times as large), and two ways to compute
the same differ by what either rounds. So there the change is told in units of that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._measure import Measurement, measured, paired, seconds
from potluck.compose.adapter import Adapter, Factors
from potluck.compose.lora import attached
from potluck.compose.low_rank import canonical, concatenated
from potluck.compose.merging.adapters import ADAPTER_METHODS, Lego, Sum, TruncatedSvd, merge_adapters
from potluck.compose.merging.lego import kmeans

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_TYPES = {
    "linear": {},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "svd": {},
    "ties_svd": {"density": 0.2},
    "dare_ties_svd": {"density": 0.5},
    "cat": {},
}
_WITHOUT_STATISTICS = [name for name in ADAPTER_METHODS if name not in ("regmean", "fisher")]


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """How much is merged.

    Attributes:
        layers: Of the model; each is merged by both.
        adapters: N.
        rank: Of each, and of the result.
        clustered: Layers whose units LEGO clusters.
    """

    layers: int
    width: int
    feedforward: int
    adapters: int
    rank: int
    clustered: int


ADAPTER_SIZES = {
    "short": AdapterSize(layers=1, width=512, feedforward=1408, adapters=4, rank=8, clustered=2),
    "full": AdapterSize(layers=24, width=1024, feedforward=2816, adapters=8, rank=16, clustered=24),
}


def measure_adapters(size: AdapterSize) -> list[Measurement]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # what PEFT 0.21 asks of transformers is deprecated
    return [*_speed(size), *_lego(size), *_identity(), *_sums()]


# --- speed ---------------------------------------------------------------------------------------


def _speed(size: AdapterSize) -> Iterator[Measurement]:
    names = [f"a{i}" for i in range(size.adapters)]
    weights = [1 / size.adapters] * size.adapters
    times, errors, peers_errors = [], [], []
    for layer in range(size.layers):
        model = _peft_model(_llama(size.width, size.feedforward, layers=1), [{"r": size.rank}] * size.adapters, layer)
        adapters = [_adapter(model, name) for name in names]
        theirs = partial(
            model.add_weighted_adapter, names, weights, "merged", combination_type="svd", svd_rank=size.rank
        )
        ours = partial(merge_adapters, adapters, TruncatedSvd(), weights, size.rank)
        times += paired(ours, theirs, 1)
        merged, peers = ours(), _adapter(model, "merged")
        for path in merged.modules:
            whole = concatenated([adapter.modules[path] for adapter in adapters], weights)
            best = _best_error(whole, size.rank)
            errors.append(_distance(merged.modules[path], whole) / best - 1)
            peers_errors.append(_distance(peers.modules[path], whole) / best - 1)
    ours_time, theirs_time = (sum(kind) for kind in zip(*times, strict=True))
    what = f"{size.adapters} adapters of rank {size.rank}, {size.layers} layers of width {size.width}, svd"
    ratios = [theirs / ours for ours, theirs in times]
    yield measured(f"{what}: time", [ours_time], "s", peer=f"PEFT {theirs_time:.4g} s")
    yield measured(f"{what}: speed, layer by layer", ratios, "times PEFT's", at_least=10)
    excess = max(errors)
    worst = f"PEFT {max(peers_errors):.1e}"
    yield measured(f"{what}: error over the best possible", [excess], "relative", at_most=1e-6, peer=worst)
    for name in _WITHOUT_STATISTICS:
        time = seconds(partial(merge_adapters, adapters, ADAPTER_METHODS[name]()))
        yield measured(f"{name}: time of one layer", [time], "s")


def _best_error(factors: Factors, rank: int) -> float:
    """``‖M − M_k‖`` from singular values, by QR in float64: another road than ours."""
    up, down = torch.linalg.qr(factors.up.double()).R, torch.linalg.qr(factors.down.double().T).R
    return float(torch.linalg.svdvals(up @ down.T)[rank:].norm())


def _distance(found: Factors, exact: Factors) -> float:
    return float((found.up.double() @ found.down.double() - exact.up.double() @ exact.down.double()).norm())


def _lego(size: AdapterSize) -> Iterator[Measurement]:
    draw = torch.Generator().manual_seed(0)
    forms = [(size.width, size.width)] * 4 + [(size.width, size.feedforward)] * 2 + [(size.feedforward, size.width)]
    adapters = [
        Adapter({
            f"{layer}.{i}": Factors(
                torch.randn(size.rank, d_in, generator=draw), torch.randn(d_out, size.rank, generator=draw)
            )
            for layer in range(size.clustered)
            for i, (d_in, d_out) in enumerate(forms)
        })
        for _ in range(size.adapters)
    ]  # fmt: skip
    units = size.adapters * size.rank * len(adapters[0].modules)
    grams = [_gram([canonical(adapter.modules[path]) for adapter in adapters]) for path in adapters[0].modules]
    clustering = seconds(lambda: [kmeans(gram, size.rank, draw) for gram in grams])
    yield measured(f"LEGO: k-means over {units} units", [clustering], "s", at_most=5)
    whole = seconds(partial(merge_adapters, adapters, Lego(), None, size.rank))
    yield measured("LEGO: the whole merge, gauge included", [whole], "s")


def _gram(parts: Sequence[Factors]) -> Tensor:
    units = concatenated(parts, [1.0] * len(parts))
    return units.down.double() @ units.down.double().T + units.up.double().T @ units.up.double()


# --- exactness -----------------------------------------------------------------------------------

_TINY = {"width": 64, "feedforward": 96, "layers": 2}
_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "ranks of its own": {"r": 8, "rank_pattern": {"q_proj": 3, "up_proj": 12}},
    "DoRA": {"r": 8, "use_dora": True},
}


def _identity() -> Iterator[Measurement]:
    tokens = torch.arange(40).view(2, 20)
    for case, config in _CASES.items():
        model = _peft_model(_llama(**_TINY), [config], 0)
        exact = _logits(model, tokens)
        peers = []
        for kind in ("linear", "cat", "svd"):
            model.add_weighted_adapter(["a0"], [1.0], kind, combination_type=kind)
            model.set_adapter(kind)
            peers.append(f"{kind} {_apart(_logits(model, tokens), exact):.2g}")
        name, peer = f"one adapter, {case}: change of logits", f"PEFT {', '.join(peers)}"
        if case == "DoRA":
            yield measured(f"{name} (refused)", [], "relative", peer=peer)
            continue
        single = _logits_merged(_adapter(model, "a0"), _llama(**_TINY), tokens)
        model.set_adapter("a0")
        model.double()
        in_double = _logits(model, tokens)
        double = _logits_merged(_adapter(model, "a0"), _llama(**_TINY).double(), tokens)
        yield measured(f"{name}, float64", [_apart(double, in_double)], "relative", at_most=1e-7)
        rounded = _apart(exact, in_double)
        change = _apart(single, exact)
        yield measured(f"{name}, fp32", [change / rounded], f"x rounding, {rounded:.1e}", at_most=3, peer=peer)


def _logits_merged(adapter: Adapter, base: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """What a base says with an adapter that was merged with itself alone."""
    with attached(base, merge_adapters([adapter], TruncatedSvd(energy=1.0), [1.0])):
        return _logits(base, tokens)


def _sums() -> Iterator[Measurement]:
    for ranks in ((8, 8, 8), (4, 8, 16)):
        model = _peft_model(_llama(**_TINY), [{"r": rank} for rank in ranks], 1)
        adapters = [_adapter(model, f"a{i}") for i in range(3)]
        path = "model.layers.1.self_attn.o_proj"
        exact = sum((_delta(adapter, path) for adapter in adapters), torch.zeros(()))
        peers = []
        for kind, settings in PEFT_TYPES.items():
            try:
                model.add_weighted_adapter(["a0", "a1", "a2"], [1.0] * 3, kind, combination_type=kind, **settings)
                peers.append(f"{kind} {_apart(_delta(_adapter(model, kind), path), exact):.2g}")
            except ValueError:
                peers.append(f"{kind} refused")
        what = f"sum of adapters of rank {', '.join(map(str, ranks))}"
        for method, name in ((Sum(), "exact"), (TruncatedSvd(energy=1.0), "svd of full rank")):
            error = _apart(_delta(merge_adapters(adapters, method, [1.0] * 3), path), exact)
            yield measured(f"{what}, {name}", [error], "relative", at_most=1e-6, peer=f"PEFT {', '.join(peers)}")
        double = [Adapter({path: adapter.modules[path].to(torch.float64)}) for adapter in adapters]
        error = _apart(_delta(merge_adapters(double, TruncatedSvd(energy=1.0), [1.0] * 3), path), exact)
        yield measured(f"{what}, svd of full rank in float64", [error], "relative", at_most=1e-6)
        at_rank = merge_adapters(adapters, TruncatedSvd(), [1.0] * 3)
        what += f", svd of rank {max(ranks)}"
        yield measured(what, [_apart(_delta(at_rank, path), exact)], "relative", peer="the best possible")


def _llama(width: int, feedforward: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": feedforward, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=width // 16, **shape)).eval()


def _peft_model(base: LlamaForCausalLM, configs: Sequence[dict[str, Any]], seed: int) -> Any:
    """PEFT's model with adapters ``a0``, ``a1``, … of random factors."""
    made = [peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(MAPS), **config) for config in configs]
    model = peft.get_peft_model(base, made[0], adapter_name="a0")
    for i, config in enumerate(made[1:], 1):
        model.add_adapter(f"a{i}", config)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            size = 1.0 if "lora_A" in name else 0.1
            parameter.data = size * torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5
        elif "lora_magnitude" in name:
            parameter.data = parameter * (1 + 0.3 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def _adapter(model: Any, name: str) -> Adapter:
    """An adapter within PEFT's model, as `load_adapter` would read it."""
    modules = {}
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            modules[path] = Factors(down, module.scaling[name] * up)
    return Adapter(modules)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits
    return logits


def _delta(adapter: Adapter, path: str) -> Tensor:
    return adapter.modules[path].up.double() @ adapter.modules[path].down.double()


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())
