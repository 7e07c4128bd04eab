"""Shapes of models and what they cost, without loading torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from potluck.errors import ModelError, RecipeError
from potluck.recipe.schema import Model, ModelFolder, Preset, Shape

# `35m` has the layers, heads and width of the 35M model of arXiv 2503.09799, `125m` those of Photon's 125M model
# (arXiv 2411.02908). Both use a gated MLP of two thirds the paper's inner size: the same number of parameters.
PRESETS: dict[str, Shape] = {
    "tiny": Shape(layers=4, width=128, heads=4, feedforward=352, context=512),
    "small": Shape(layers=6, width=256, heads=8, feedforward=704, context=1024),
    "35m": Shape(layers=6, width=512, heads=8, feedforward=1376, context=2048, qk_norm=True),
    "125m": Shape(layers=12, width=768, heads=12, feedforward=2048, context=2048, qk_norm=True),
}

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_MAX_HEADER_BYTES = 100 << 20
# Of our own kinds of model that are frozen but for a part: how the names of what learns begin.
_LEARNS = {"potluck_fused": "fusion."}


def shape_of(model: Model) -> Shape | None:
    """The shape a recipe describes, or ``None`` for a model folder."""
    match model:
        case Preset(preset=name):
            return PRESETS[name]
        case Shape():
            return model
        case ModelFolder():
            return None


def parameter_shapes(model: Model, vocabulary_size: int) -> Shapes:
    """Name and shape of every parameter that learns, tied ones once, in the order of the flat vector.

    A model folder's come in the order in which they are stored: sizes are exact, places in the vector
    (`potluck.models.flat`) are not.

    Raises:
        ModelError: A model folder is missing or holds no safetensors.
    """
    shape = shape_of(model)
    if shape is None:
        assert isinstance(model, ModelFolder)
        return _stored_shapes(Path(model.path))[0]
    embeddings, width = (vocabulary_size, shape.width), shape.width
    layers = ((f"model.layers.{i}.{name}", form) for i in range(shape.layers) for name, form in _layer_shapes(shape))
    head = () if shape.tied else (("lm_head.weight", embeddings),)
    return (("model.embed_tokens.weight", embeddings), *layers, ("model.norm.weight", (width,)), *head)


def parameter_count(model: Model, vocabulary_size: int) -> int:
    """Parameters of the model that learn, tied ones once; errors as ``parameter_shapes``."""
    return sum(math.prod(shape) for _, shape in parameter_shapes(model, vocabulary_size))


def frozen_count(model: Model) -> int:
    """Parameters of the model that do not learn; errors as ``parameter_shapes``."""
    if not isinstance(model, ModelFolder):
        return 0
    return sum(math.prod(shape) for _, shape in _stored_shapes(Path(model.path))[1])


def context_length(model: Model) -> int:
    """Longest sequence in tokens that the model is declared for."""
    shape = shape_of(model)
    if shape is not None:
        return shape.context
    assert isinstance(model, ModelFolder)
    config = folder_config(Path(model.path))
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)


def check_context(model: Model, sequence_length: int) -> None:
    """Refuse sequences longer than the model is declared for.

    Raises:
        RecipeError: naming both lengths.
    """
    context = context_length(model)
    if sequence_length > context:
        raise RecipeError(f"local.sequence_length {sequence_length}: the model's context is {context} tokens")


def folder_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: It is not there or not JSON.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a model folder ({error})", "save it with model.save_pretrained") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json: not a JSON object")
    return config


def _layer_shapes(shape: Shape) -> Shapes:
    width, inner, head = shape.width, shape.feedforward, shape.width // shape.heads
    key_value = (shape.kv_heads or shape.heads) * head
    norms: Shapes = (("self_attn.q_norm.weight", (head,)), ("self_attn.k_norm.weight", (head,)))
    return (
        ("self_attn.q_proj.weight", (width, width)),
        ("self_attn.k_proj.weight", (key_value, width)),
        ("self_attn.v_proj.weight", (key_value, width)),
        ("self_attn.o_proj.weight", (width, width)),
        *(norms if shape.qk_norm else ()),
        ("mlp.gate_proj.weight", (inner, width)),
        ("mlp.up_proj.weight", (inner, width)),
        ("mlp.down_proj.weight", (width, inner)),
        ("input_layernorm.weight", (width,)),
        ("post_attention_layernorm.weight", (width,)),
    )


def _stored_shapes(folder: Path) -> tuple[Shapes, Shapes]:
    """What learns and what is frozen, by the headers of the folder's safetensors files.

    A head that is tied to the embedding is left out.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no *.safetensors file", "potluck loads nothing pickled; save with safe_serialization=True"
        )
    stored: dict[str, tuple[int, ...]] = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise ModelError(f"{path}: not a safetensors file, or cut off")
            try:
                header = json.loads(file.read(length))
                stored |= {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{path}: not a safetensors file ({error})") from None
    config = folder_config(folder)
    if config.get("tie_word_embeddings"):
        stored.pop("lm_head.weight", None)
    begins = _LEARNS.get(str(config.get("model_type")), "")
    learns = {name: shape for name, shape in stored.items() if name.startswith(begins)}
    return tuple(learns.items()), tuple((name, shape) for name, shape in stored.items() if name not in learns)
