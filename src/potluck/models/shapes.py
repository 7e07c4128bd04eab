"""Shapes of models and what they cost: without loading torch, unless a model folder must be opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from potluck.errors import ModelError, RecipeError
from potluck.models.folder import folder_config
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


def shape_of(model: Model) -> Shape | None:
    """The shape a recipe describes, or ``None`` for a model folder."""
    match model:
        case Preset(preset=name):
            return PRESETS[name]
        case Shape():
            return model
        case ModelFolder():
            return None


@dataclass(frozen=True)
class Form:
    """A model's parameters.

    Attributes:
        learns: Name and shape of each that learns, tied ones once, in the order of the flat vector.
        frozen: How many do not learn.
        rows: Tokens that its embedding knows.
    """

    learns: Shapes
    frozen: int
    rows: int


def form_of(model: Model, vocabulary_size: int) -> Form:
    """A model's parameters; of a folder `transformers` says them, which takes some seconds to load.

    Raises:
        ModelError: A model folder cannot be opened, as `potluck.models.check.checked_folder` says.
    """
    shape = shape_of(model)
    if shape is None:
        assert isinstance(model, ModelFolder)
        from potluck.models.check import checked_folder

        found = checked_folder(Path(model.path))
        return Form(found.learns, sum(math.prod(form) for _, form in found.frozen), found.rows)
    embeddings, width = (vocabulary_size, shape.width), shape.width
    layers = ((f"model.layers.{i}.{name}", form) for i in range(shape.layers) for name, form in _layer_shapes(shape))
    head = () if shape.tied else (("lm_head.weight", embeddings),)
    learns = (("model.embed_tokens.weight", embeddings), *layers, ("model.norm.weight", (width,)), *head)
    return Form(learns, 0, vocabulary_size)


def parameter_shapes(model: Model, vocabulary_size: int) -> Shapes:
    """Name and shape of every parameter that learns; errors as ``form_of``."""
    return form_of(model, vocabulary_size).learns


def parameter_count(model: Model, vocabulary_size: int) -> int:
    """Parameters of the model that learn, tied ones once; errors as ``form_of``."""
    return sum(math.prod(shape) for _, shape in parameter_shapes(model, vocabulary_size))


def context_length(model: Model) -> int:
    """Longest sequence in tokens that the model is declared for."""
    shape = shape_of(model)
    if shape is not None:
        return shape.context
    assert isinstance(model, ModelFolder)
    config = folder_config(Path(model.path))
    length = config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30
    if not isinstance(length, int):
        raise ModelError(f"{model.path}/config.json: a context of {length!r} tokens")
    return length


def check_context(model: Model, sequence_length: int) -> None:
    """Refuse sequences longer than the model is declared for.

    Raises:
        RecipeError: naming both lengths.
    """
    context = context_length(model)
    if sequence_length > context:
        raise RecipeError(f"local.sequence_length {sequence_length}: the model's context is {context} tokens")


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
