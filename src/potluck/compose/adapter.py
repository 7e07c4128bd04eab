"""Adapters as products: what a PEFT folder holds, read without PEFT and written for it.

An adapter adds ``ΔW = s B A`` to some of a base's linear maps (LoRA, Hu et al., arXiv 2106.09685). Only the product
means something: ``(B G⁻¹)(G A)`` is the same adapter. So the scaling s (``α / r``, with rsLoRA ``α / √r``,
arXiv 2312.03732) is taken into one factor when a folder is read, and nothing here ever combines the factors of two
adapters one by one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from potluck.errors import ModelError
from potluck.files import name_of, storing, write_text
from potluck.tensors import load_tensors
from potluck.untrusted import load_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ABOUT_FILE = "potluck.json"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20
# Settings of PEFT's LoraConfig that do not change what the saved weights mean. Anything else must be off.
_HARMLESS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights (PiSSA, OLoRA …)


@dataclass(frozen=True)
class Factors:
    """One linear map's addition, ``ΔW = up @ down``.

    Attributes:
        down: A, shape ``(rank, d_in)``.
        up: ``s B``, shape ``(d_out, rank)``.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """The product, shape ``(d_out, d_in)``: for tests and for merging into a base, not for merging adapters."""
        return self.up @ self.down

    def to(self, *to: Any) -> Factors:
        """Both factors on another device or in another precision."""
        return Factors(self.down.to(*to), self.up.to(*to))


@dataclass(frozen=True)
class Adapter:
    """A participant's adapter.

    Attributes:
        modules: From a linear map's place in the base, such as ``model.layers.0.self_attn.q_proj``, to its factors.
        base: The base as the folder names it.
        transposed: The base stores these maps as ``(d_in, d_out)``, as GPT-2 does (``fan_in_fan_out``).
        about: Facts that travel with it, kept in ``potluck.json`` beside the weights.
    """

    modules: Mapping[str, Factors]
    base: str = ""
    transposed: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(f.down.numel() + f.up.numel() for f in self.modules.values())


def load_adapter(folder: Path) -> Adapter:
    """A LoRA adapter in PEFT's format, in fp32.

    Raises:
        ModelError: It is missing or damaged, its weights are not finite, or it is more than a sum of products on
            linear maps: DoRA, trained biases, further saved modules, embeddings, a changed base.
    """
    config = adapter_config(folder)
    _refuse_unsupported(folder, config)
    try:
        tensors = load_tensors(folder / WEIGHTS_FILE)
    except ValueError as error:
        raise ModelError(f"{folder}/{WEIGHTS_FILE}: cannot be read ({error})") from None
    modules = {}
    for name in sorted(tensors):
        path, found, _ = name.removeprefix(_PREFIX).rpartition(".lora_A.weight")
        if found:
            modules[path] = _factors(folder, config, path, tensors[name], tensors.get(name.replace("lora_A", "lora_B")))
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others or 2 * len(modules) != len(tensors):
        raise ModelError(f"{folder}: {(others or sorted(tensors))[0]} is no part of a LoRA on linear maps")
    if not modules:
        raise ModelError(f"{folder}: holds no LoRA")
    return Adapter(
        modules,
        base=str(config.get("base_model_name_or_path") or ""),
        transposed=bool(config.get("fan_in_fan_out")),
        about=_json_table(folder / ABOUT_FILE) if (folder / ABOUT_FILE).exists() else {},
    )


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write a folder that PEFT loads (and what else reads PEFT's format), with scaling 1 and one rank throughout.

    Modules of a smaller rank are filled up with zeros, which changes nothing: loaders differ in how they read rank
    patterns, and one rank leaves nothing to read differently.

    Raises:
        StorageError: The disk is full or cannot be written.
        ValueError: A factor is not finite.
    """
    rank = max(1, adapter.rank)
    tensors = {}
    for path, factors in adapter.modules.items():
        if not (torch.isfinite(factors.down).all() and torch.isfinite(factors.up).all()):
            raise ValueError(f"{path}: a factor is not finite")
        missing = rank - factors.rank
        down = torch.nn.functional.pad(factors.down.float(), (0, 0, 0, missing))
        up = torch.nn.functional.pad(factors.up.float(), (0, missing))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name_of(adapter.base) if adapter.base else None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.modules),
        "fan_in_fan_out": adapter.transposed,
        "bias": "none",
        "inference_mode": True,
    }
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if adapter.about:
            write_text(folder / ABOUT_FILE, json.dumps(dict(adapter.about), indent=1))
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2))


def adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT folder.

    Raises:
        ModelError: It is not there or not JSON.
    """
    return _json_table(folder / CONFIG_FILE)


def _json_table(path: Path) -> dict[str, Any]:
    try:
        table = load_json(path, most_bytes=_MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        hint = "save it with model.save_pretrained"
        raise ModelError(f"{path.parent}: not a PEFT adapter ({error})", hint) from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: not a JSON object")
    return table


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder}: a {kind} adapter", "only LoRA adapters can be composed")
    if config.get("use_dora"):
        hint = "merge it into its base with PEFT, and compose the full models"
        raise ModelError(f"{folder}: a DoRA adapter is no sum of products: its magnitudes do not add up", hint)
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        hint = "convert it with PEFT's path_initial_model_for_weight_conversion, which gives a plain LoRA"
        raise ModelError(f"{folder}: trained from {init!r}, which changes the base's weights", hint)
    for key, value in config.items():
        off = value in (None, False, "none", 0, [], {})
        if not (off or key in _HARMLESS or key == "init_lora_weights"):
            raise ModelError(f"{folder}: {key} = {value!r} is not supported: composing it could be silently wrong")


def _factors(folder: Path, config: Mapping[str, Any], path: str, down: Tensor, up: Tensor | None) -> Factors:
    if up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise ModelError(f"{folder}: {path}: its factors do not make a product")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ModelError(f"{folder}: {path} holds NaN or infinite values")
    rank = down.shape[0]
    stated = _of_module(folder, config, "rank_pattern", path, config.get("r"))
    alpha = _of_module(folder, config, "alpha_pattern", path, config.get("lora_alpha"))
    if stated != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{folder}: {path} has rank {rank}, the configuration says {stated} with alpha {alpha}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(down.float(), scaling * up.float())


def _of_module(folder: Path, config: Mapping[str, Any], key: str, path: str, otherwise: Any) -> Any:
    """What a pattern says of a module: it is matched against the end of the module's path, as PEFT does."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{folder}: {key} is not a table")
    for pattern, value in patterns.items():
        try:
            if not _plain(pattern):
                raise ModelError(f"{folder}: {key} {pattern!r} is not supported", "write one key for each module")
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error:
            raise ModelError(f"{folder}: {key} {pattern!r} is no regular expression") from None
    return otherwise


def _plain(pattern: str) -> bool:
    """Whether matching it ends soon: groups and many repetitions could keep a matcher busy for ever."""
    return len(pattern) <= 256 and not set(pattern) & set("(){}") and sum(map(pattern.count, "*+")) <= 4
