"""Memory of a forward and a backward pass, in numbers of fp32, and what bounds it; without torch.

Of a decoder as Llama's a backward pass needs, for each token and layer,
``6 d + 2 q + 2 k + 4 f``: what enters and leaves two norms, the rotated queries and keys, values, what the heads found,
and four times the inner width of the gated MLP. Other decoders come near it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.models.folder import folder_config
from potluck.models.shapes import shape_of
from potluck.recipe.schema import Model, ModelFolder

_TOKENS_AT_ONCE = 8192  # evaluated
_LOGITS_AT_ONCE = 1 << 25  # 128 MiB
_LOSSES_AT_ONCE = 1 << 24
LARGE = 1 << 23  # 32 MiB: glibc gives memory of larger tensors back at once


@dataclass(frozen=True)
class Widths:
    """What of a decoder decides how much memory a pass takes.

    Attributes:
        width, queries, keys, inner: d of the residual stream, q and k of all heads together, f of the MLP.
        normed: Queries and keys are normed, too.
        scores: Heads whose attention is kept for every pair of tokens, for it is thinned by dropout.
        vocabulary: Rows of the output head.
        tied: It is the embedding.
    """

    layers: int
    width: int
    queries: int
    keys: int
    inner: int
    normed: bool
    scores: int
    vocabulary: int
    tied: bool

    def layer(self, length: int) -> int:
        """Numbers that a token of a text of ``length`` leaves in a layer until its backward pass."""
        normed = 2 * (self.queries + self.keys) if self.normed else 0
        return 6 * self.width + 2 * (self.queries + self.keys) + 4 * self.inner + normed + 3 * self.scores * length

    @property
    def embedding(self) -> int:
        """Numbers of the embedding."""
        return self.vocabulary * self.width


def widths_of(model: Model, vocabulary: int) -> Widths | None:
    """Of a recipe's model; ``None`` for a folder whose config does not say.

    Args:
        vocabulary: Tokens of the tokenizer; a model folder may have more rows.

    Raises:
        ModelError: The folder has no config.
    """
    shape = shape_of(model)
    if shape is None:
        assert isinstance(model, ModelFolder)
        return _folder_widths(folder_config(Path(model.path)))
    head = shape.width // shape.heads
    return Widths(
        layers=shape.layers,
        width=shape.width,
        queries=shape.width,
        keys=(shape.kv_heads or shape.heads) * head,
        inner=shape.feedforward,
        normed=shape.qk_norm,
        scores=0,
        vocabulary=vocabulary,
        tied=shape.tied,
    )


@dataclass(frozen=True)
class Passing:
    """What a pass holds beside the weights, in numbers.

    Attributes:
        peak: The most at once.
        stays: Of it what stays with the allocator when it is over: of tensors below `LARGE`.
    """

    peak: int
    stays: int


def step_passing(
    widths: Widths, parameters: int, batch_size: int, length: int, accumulates: bool, recomputes: bool
) -> Passing:
    """Of a local step, gradients included, without the optimizer's moments.

    The peak is at the start of the backward pass, when all activations are there and the logits three times (as
    probabilities, and two gradients of them), or at its end, when all gradients are.

    Args:
        parameters: That learn.
        accumulates: There are gradients before the pass, of other batches.
        recomputes: Layers keep only their input, and are computed again (gradient checkpointing).
    """
    tokens, layer = batch_size * length, widths.layer(length)
    kept = widths.layers * (widths.width if recomputes else layer) + layer + 3 * widths.width  # one layer's gradients
    logits = tokens * widths.vocabulary
    first = tokens * kept + max(3 * logits, logits + widths.embedding)
    last = parameters + (2 * widths.embedding if widths.tied else 0)  # a tied embedding's two gradients are added up
    peak = parameters + first if accumulates else max(first, last)
    return Passing(peak, tokens * kept + 3 * logits * (logits < LARGE))


def evaluation_passing(widths: Widths, length: int, rows: int) -> Passing:
    """Of an evaluation.

    Args:
        rows: Stretches of ``length`` tokens that there are.
    """
    tokens = length * min(rows, evaluated_at_once(widths.vocabulary, length))
    layer = tokens * (2 * widths.width + max(4 * widths.inner, 3 * (widths.queries + widths.keys)))
    logits = tokens * widths.vocabulary
    logits += min(logits, _LOSSES_AT_ONCE)
    return Passing(layer + logits, layer + logits * (tokens * widths.vocabulary < LARGE))


def evaluated_at_once(vocabulary: int, length: int) -> int:
    """Stretches of ``length`` tokens in one pass of an evaluation, so that their logits are at most 128 MiB.

    One at least: it has no more logits than a local step on one sequence.
    """
    return max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary) // length)


def losses_at_once(vocabulary: int) -> int:
    """Tokens whose loss is worked out at once, so that it takes 64 MiB beside the logits."""
    return max(1, _LOSSES_AT_ONCE // vocabulary)


def _folder_widths(config: Mapping[str, Any]) -> Widths | None:
    """By the names that `transformers` gives these figures; our own kinds name their base's."""
    inside = config.get("base") or config.get("text_config")
    if isinstance(inside, dict) and inside:
        return _folder_widths(inside)

    def figure(*names: str) -> int:
        return next((value for name in names if type(value := config.get(name)) is int and value > 0), 0)

    layers = figure("num_hidden_layers", "n_layer", "num_layers")
    width = figure("hidden_size", "n_embd", "d_model")
    heads = figure("num_attention_heads", "n_head", "num_heads")
    vocabulary = figure("vocab_size")
    if not (layers and width and heads and vocabulary):
        return None
    head = figure("head_dim") or width // heads
    inner = figure("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * width
    drops = config.get("attn_pdrop") or config.get("attention_dropout")
    return Widths(
        layers=layers,
        width=width,
        queries=heads * head,
        keys=(figure("num_key_value_heads") or heads) * head,
        inner=inner * (figure("num_experts_per_tok") or 1),
        normed=str(config.get("model_type")).startswith(("qwen3", "olmo2")) or bool(config.get("qk_layernorm")),
        scores=heads if drops else 0,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings")),
    )
