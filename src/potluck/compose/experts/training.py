"""An expert trained in isolation: beside the frozen anchor, on one participant's text, nobody else being there.

The layer's output is that of the finished mixture with this one expert in it, ``y = g_0 FFN(x) + g_1 FFN_1(x)`` with a
router of two rows (FlexOlmo, arXiv 2507.07024, section 3); of all parameters only the expert's learn. Experts of low
rank, which FlexMoRE (arXiv 2602.08818) gets by cutting trained ones, are trained as such. FlexOlmo trains the expert's
row of the router too; here it is known beforehand, from counting tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potluck.compose.base import Base
from potluck.compose.effect import affordable
from potluck.compose.experts.parts import Expert, checked_name, stream_hash
from potluck.compose.routing.evidence import token_profile
from potluck.compose.training import Lesson, only_training, placed, settled, train_part
from potluck.models.mixture import Kind, MixtureForCausalLM, feed_forwards

_SEQUENCES_AT_ONCE = 32
_OPERATIONS, _LEAST_STRETCHES = 1e12, 16


def train_expert(
    base: Base,
    own: np.ndarray,
    public: np.ndarray,
    lesson: Lesson,
    name: str,
    rank: int | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Expert:
    """Train a participant's expert.

    Args:
        own: Its token ids, ``(T,)``.
        public: Token ids of public text, the same for every participant.
        name: Whose it is.
        rank: Of a low-rank expert; a full-size one if ``None``.
        on_step: Told the number of each step before it is taken.

    Raises:
        ModelError: The base's feed-forward networks are of another kind, or the rank is larger than they are.
        CorpusError: The text is shorter than one sequence.
    """
    kind: Kind = "full" if rank is None else "low-rank"
    lesson = settled(lesson, base.model, kind)
    shape = {"name": checked_name(name), "kind": kind, "rank": rank or 0}
    evidence = token_profile(own, public, base.model.config.vocab_size)
    embedding = mean_inputs(base.model, own, lesson)
    model = fresh_mixture(base, [shape], {name: evidence}, experts_per_token=1, seed=lesson.seed)
    with only_training(model, model.expert_parameters()):
        report = train_part(model, [own], lesson, on_step)
    lessons = {"steps": report.steps, "batch_size": lesson.batch_size, "sequence_length": lesson.sequence_length}
    about = {
        "text": {"tokens": len(own), "distinct_tokens": len(np.unique(own))},
        "training": {**lessons, "learning_rate": lesson.learning_rate, "seed": lesson.seed, "loss": report.loss},
    }
    weights = expert_weights(model)[0]
    public_hash = stream_hash(public)
    return Expert(name, kind, rank or 0, base.content_hash, public_hash, weights, evidence, embedding, about)


def fresh_mixture(
    base: Base,
    shapes: Sequence[Mapping[str, object]],
    evidence: Mapping[str, Tensor],
    *,
    experts_per_token: int,
    seed: int,
) -> MixtureForCausalLM:
    """A mixture whose experts have not learned anything yet: for training one alone, or all jointly.

    Args:
        shapes: ``name``, ``kind`` and ``rank`` of each expert.
        evidence: `token_profile` of each by name.
        seed: Of what experts of low rank start from.

    Raises:
        ModelError: The base's feed-forward networks are of another kind, or a rank is larger than they are.
    """
    model = MixtureForCausalLM.beside(
        base.model,
        shapes,
        experts_per_token=experts_per_token,
        end_of_text=base.vocabulary.end_of_text,
        seed=seed,
    )
    with torch.no_grad():
        model.router.evidence.copy_(torch.stack([evidence[str(shape["name"])] for shape in shapes], dim=1))
    return model


def expert_weights(model: MixtureForCausalLM) -> list[dict[str, Tensor]]:
    """Each expert's weights, as `Expert` has them."""
    return [
        {
            f"layers.{number}.{name}": tensor.detach().cpu().clone()
            for number, layer in enumerate(model.layers)
            for name, tensor in layer.experts[place].state_dict().items()
        }
        for place in range(len(model.config.names))
    ]


def mean_inputs(model: PreTrainedModel, tokens: np.ndarray, lesson: Lesson) -> Tensor:
    """Mean input of each layer's feed-forward network over a text: its domain embedding, fp32 ``(layers, d)``.

    Of a long text stretches spread evenly over it, so many as the base reads in 1e12 operations, 16 at least.
    """
    sums = torch.zeros(len(feed_forwards(model)), model.config.hidden_size, dtype=torch.float64)

    def add(number: int, inputs: Tensor) -> None:
        sums[number] += inputs.double().sum(0).cpu()

    length = min(lesson.sequence_length, len(tokens))
    most = affordable(model, length, _OPERATIONS, _LEAST_STRETCHES, 1 << 30)
    count = each_input(model, tokens, lesson, add, most)
    return (sums / count).float()


def each_input(
    model: PreTrainedModel,
    tokens: np.ndarray,
    lesson: Lesson,
    take: Callable[[int, Tensor], None],
    most: int | None = None,
) -> int:
    """Show every feed-forward network's inputs over a text, ``(n, d)`` with the layer's number, as they come.

    Args:
        most: Only so many stretches, spread evenly over the text.

    Returns:
        How many inputs each layer had: tokens, less what does not fill a sequence.
    """
    network = placed(model, lesson.device, "fp32")
    length = min(lesson.sequence_length, len(tokens))
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    if most is not None and len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most).round().long()]
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, number=number: take(number, given[0].flatten(0, -2)))
        for number, layer in enumerate(feed_forwards(model).values())
    ]
    try:
        with torch.inference_mode():
            for batch in rows.split(_SEQUENCES_AT_ONCE):
                network.model.eval()(input_ids=batch.to(network.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return rows.numel()
