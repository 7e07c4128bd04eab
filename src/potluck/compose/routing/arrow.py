"""Arrow (Ostapenko et al., arXiv 2405.11157): every token chooses, at every linear map, the adapters it goes through.

Nothing is trained and no text is seen: an adapter is asked what direction of inputs it acts on most. That is its
prototype p, the top right singular vector of ``B A``, and a token x is routed by ``|x · p|``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.lora import added, check_fits
from potluck.compose.low_rank import decomposed
from potluck.compose.routing.bundle import Bundle, by_module
from potluck.errors import RecipeError


@dataclass(frozen=True)
class Arrow:
    """How tokens choose.

    Attributes:
        top_k: Adapters of a token; at a linear map that fewer adapters have, all of those.
        temperature: T of the softmax over the chosen; the larger, the more alike their shares.
    """

    top_k: int = 3
    temperature: float = 1.0


class ArrowRouted(nn.Module):
    """One linear map's addition ``Σ_e g_e B_e A_e x`` over the k adapters with the largest ``|x · p_e|``.

    ``g = softmax(|x · p| / T)`` over those k.

    Attributes:
        names: Of the adapters that have this map.
        tokens: How many tokens have chosen each, int64 ``(N,)``; since it was made, prompts and padding included.
    """

    directions: Tensor  # p / T, (N, d_in)
    tokens: Tensor

    def __init__(self, parts: Mapping[str, Factors], settings: Arrow) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.top_k = min(settings.top_k, len(parts))
        self.bundle = Bundle(list(parts.values()))
        prototypes = torch.stack([prototype(factors) for factors in parts.values()])
        self.register_buffer("directions", prototypes / settings.temperature, persistent=False)
        self.register_buffer("tokens", torch.zeros(len(parts), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(…, d_in)`` to ``(…, d_out)``."""
        tokens = x.flatten(0, -2)
        logits, chosen = linear(tokens, self.directions).abs().topk(self.top_k)
        self.tokens.index_add_(0, chosen.flatten(), self.tokens.new_ones(chosen.numel()))
        addition: Tensor = self.bundle(tokens, chosen, logits.softmax(-1))
        return addition.view(*x.shape[:-1], -1)


@contextmanager
def arrow(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], settings: Arrow | None = None
) -> Iterator[dict[str, ArrowRouted]]:
    """Within, the model routes every token through adapters, of whatever ranks and on whatever linear maps.

    Loss, generation and logits are had as of any model. With equal ranks they are those of PEFT's
    ``create_arrow_model``.

    Yields:
        What routes, by the linear map's place: for `routing_shares`.

    Raises:
        ModelError: An adapter was not trained on a model of this shape.
        RecipeError: ``top_k`` is more than there are adapters, or a setting is out of range.
    """
    settings = settings or Arrow()
    if not 1 <= settings.top_k <= len(adapters):
        raise RecipeError(f"top_k = {settings.top_k} of {len(adapters)} adapters", "choose at least 1, at most all")
    if not settings.temperature > 0:
        raise RecipeError(f"temperature = {settings.temperature:g} is not above 0")
    for name, adapter in adapters.items():
        check_fits(model, adapter, name)
    routed = {path: ArrowRouted(parts, settings) for path, parts in by_module(adapters).items()}
    with added(model, routed):
        yield routed


def prototype(factors: Factors) -> Tensor:
    """The direction of inputs that a product enlarges most, ``argmax_{‖v‖=1} ‖B A v‖``, shape ``(d_in,)``.

    All that a router needs to know of an adapter; it may be published without the adapter.
    """
    return decomposed(factors)[2][0]


def routing_shares(routed: Mapping[str, ArrowRouted]) -> dict[str, dict[str, float]]:
    """Of the choices made at each linear map, each adapter's share; a map's shares add up to 1."""
    shares = {}
    for path, layer in routed.items():
        counts = layer.tokens.double().cpu()
        shares[path] = dict(zip(layer.names, (counts / counts.sum().clamp_min(1)).tolist(), strict=True))
    return shares


def mean_shares(routed: Mapping[str, ArrowRouted]) -> dict[str, float]:
    """Each adapter's share of all choices at all linear maps, largest first: whose adapters a text went through."""
    counts: dict[str, int] = {}
    for layer in routed.values():
        for name, count in zip(layer.names, layer.tokens.tolist(), strict=True):
            counts[name] = counts.get(name, 0) + count
    total = max(1, sum(counts.values()))
    return {name: count / total for name, count in sorted(counts.items(), key=lambda item: -item[1])}
