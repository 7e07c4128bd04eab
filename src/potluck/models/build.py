"""From the recipe's ``model`` table to a `transformers` causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from potluck.errors import ModelError
from potluck.models.check import check_vocabulary, checked_folder, first_line
from potluck.models.shapes import shape_of
from potluck.recipe.schema import Model, ModelFolder, Shape

logging.disable_progress_bar()


def build_model(model: Model, vocabulary_size: int, end_of_text: int, seed: int) -> PreTrainedModel:
    """A model in fp32 on the CPU: initialised from ``seed``, or loaded from its folder.

    Raises:
        ModelError: The folder cannot be loaded, its vocabulary is too small, or its weights are not finite.
    """
    shape = shape_of(model)
    if shape is not None:
        torch.manual_seed(seed)
        return _new_model(shape, vocabulary_size, end_of_text)
    assert isinstance(model, ModelFolder)
    loaded = load_folder(Path(model.path))
    check_vocabulary(model.path, embeddings(loaded)[0].shape[0], vocabulary_size)
    return loaded


def load_folder(folder: Path) -> PreTrainedModel:
    """Any causal language model saved as safetensors, in fp32, with PyTorch's own attention (SDPA).

    Raises:
        ModelError: It cannot be loaded, as `potluck.models.check.checked_folder` says, or its weights are not finite.
    """
    checked_folder(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many types for a damaged folder
        raise ModelError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    for what, names in (("is missing", report["missing_keys"]), ("has no place", report["unexpected_keys"])):
        if names:  # of weights that are converted while they are loaded: the check before sees no others
            raise ModelError(f"{folder}: the tensor {min(names)} {what}", "the folder does not fit its config.json")
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{folder}: {name} holds NaN or infinite values", "the folder is damaged or diverged")
    return model


def embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """The input embedding and, unless it is the same, the output head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer.weight for layer in layers if layer is not None and isinstance(layer.weight, nn.Parameter)]


def _new_model(shape: Shape, vocabulary_size: int, end_of_text: int) -> PreTrainedModel:
    fields: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.feedforward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "head_dim": shape.width // shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if shape.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**fields))
    return LlamaForCausalLM(LlamaConfig(**fields))
