"""Which adapters of a library suit a task of which only a few examples are known.

An adapter is judged by what it is for: the loss of the examples with it (open-knowledge expert selection, arXiv
2408.15915, whose model score is the perplexity of K examples). Then one merge of several is built by greedy selection
with replacement (Caruana et al., ICML 2004), without gradients, as LoraHub (arXiv 2307.13269) looks for its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.base import Base
from potluck.compose.lora import added, attached, check_fits
from potluck.compose.routing.bundle import Bundle, by_module
from potluck.compose.training import placed
from potluck.errors import CorpusError, RecipeError
from potluck.models.footprint import evaluated_at_once

_LEFT_OUT = -100


def best_adapters(
    base: Base, adapters: Mapping[str, Adapter], examples: Sequence[np.ndarray], device: str = "auto"
) -> list[tuple[str, float]]:
    """Adapters and the mean loss of the examples with each, in nats per token, best first.

    Args:
        examples: Token ids, ``(T_i,)`` each; a long text counts as one example, and no more than a short one.

    Raises:
        CorpusError: There are no examples, or one is of fewer than two tokens or longer than the base can read.
        ModelError: An adapter does not fit the base.
    """
    losses = {}
    for name, adapter in adapters.items():
        with attached(base.model, adapter):
            losses[name] = float(example_losses(base.model, examples, device).mean())
    return sorted(losses.items(), key=lambda item: item[1])


def merge_weights(
    base: Base, adapters: Mapping[str, Adapter], examples: Sequence[np.ndarray], picks: int = 8, device: str = "auto"
) -> tuple[dict[str, float], float]:
    """Weights of a merge ``Σ w_i ΔW_i`` for a task, and the examples' loss with it.

    Each pick adds the adapter with which the mean of all picks has the lowest loss; an adapter may be picked again. Of
    all the means on the way the best is kept, so the loss is never above that of the best single adapter. That takes
    ``picks · N`` passes over the examples: give it those that `best_adapters` has put first.

    Returns:
        Weights of those picked, of sum 1, largest first; and the loss in nats per token.

    Raises:
        CorpusError: As `best_adapters`.
        ModelError: An adapter does not fit the base.
        RecipeError: There are no adapters or no picks.
    """
    if not adapters or picks < 1:
        raise RecipeError(f"{picks} picks of {len(adapters)} adapters", "give at least one of each")
    for name, adapter in adapters.items():
        check_fits(base.model, adapter, name)
    names, tried = list(adapters), {}
    merges = {path: _Merge(parts, names) for path, parts in by_module(adapters).items()}
    counts = torch.zeros(len(names))
    with added(base.model, merges):
        for _ in range(picks):
            losses = []
            for number in range(len(names)):
                _weigh(merges, (counts + _one(number, len(names))) / (counts.sum() + 1))
                losses.append(float(example_losses(base.model, examples, device).mean()))
            best = int(np.argmin(losses))
            counts[best] += 1
            tried[losses[best]] = counts / counts.sum()
    loss = min(tried)
    weights = dict(zip(names, tried[loss].tolist(), strict=True))
    return {name: w for name, w in sorted(weights.items(), key=lambda item: -item[1]) if w}, loss


def example_losses(
    model: PreTrainedModel,
    examples: Sequence[np.ndarray],
    device: str = "auto",
    precision: Literal["auto", "fp32"] = "auto",
) -> Tensor:
    """Mean loss of each example in nats per token, ``(K,)``, read side by side.

    Short ones are filled up on the right, where nothing that is predicted can see it.

    Args:
        precision: ``auto`` is the fastest that the device has.

    Raises:
        CorpusError: There are no examples, or one is of fewer than two tokens or longer than the model can read.
    """
    most = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    for number, example in enumerate(examples):
        if not 2 <= len(example) <= most + 1:
            hint = "give shorter ones, such as single documents or questions with their answers"
            raise CorpusError(f"example {number + 1} has {len(example)} tokens: 2 to {most + 1} can be read", hint)
    if not examples:
        raise CorpusError("there are no examples to choose adapters by")
    network = placed(model.eval(), device, precision)
    at_once = evaluated_at_once(model.config.vocab_size, max(map(len, examples)))
    losses = []
    with torch.inference_mode(), network.precision():
        for start in range(0, len(examples), at_once):
            rows = [torch.as_tensor(example, dtype=torch.int64) for example in examples[start : start + at_once]]
            inputs, targets = (
                nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=filler).to(network.device)
                for side, filler in (([row[:-1] for row in rows], 0), ([row[1:] for row in rows], _LEFT_OUT))
            )
            logits = model(input_ids=inputs, use_cache=False).logits.float()
            nats = cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=_LEFT_OUT)
            losses.append(nats.sum(1) / (targets != _LEFT_OUT).sum(1))
    return torch.cat(losses).cpu()


class _Merge(nn.Module):
    """``x -> Σ w_i B_i A_i x``, whose weights change without a new sum of factors."""

    def __init__(self, parts: Mapping[str, Factors], names: Sequence[str]) -> None:
        super().__init__()
        self.members = [names.index(name) for name in parts]
        self.bundle = Bundle(list(parts.values()))
        self.register_buffer("weights", torch.zeros(len(parts)), persistent=False)
        self.weights: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.bundle.every(x, self.weights)


def _weigh(merges: Mapping[str, _Merge], weights: Tensor) -> None:
    for merge in merges.values():
        merge.weights.copy_(weights[merge.members])


def _one(number: int, of: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(number), of).float()
