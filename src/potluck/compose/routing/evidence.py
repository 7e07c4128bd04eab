"""Routing by evidence: what the text so far says about whose text it is.

Arrow asks every token at every linear map. Here the text is asked as a whole: each participant publishes how much more
often each token stands in its own text than in public text, and a token's shares are the posterior over participants
given the tokens up to it (naive Bayes over token counts, in place of the experts' own likelihoods that DEMix weights
its mixtures by; Gururangan et al., arXiv 2108.05036). Nothing is trained, and all linear maps agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.lora import added, check_fits
from potluck.compose.routing.bundle import Bundle, by_module
from potluck.errors import ModelError, RecipeError
from potluck.tensors import load_tensors

PROFILE_FILE = "profile.safetensors"


@dataclass(frozen=True)
class Evidence:
    """How a text is divided.

    Attributes:
        top_k: Adapters of a token; all if ``None``.
        confidence: Times the log-odds. Tokens of a text are not independent, so their evidence counts for less than 1.
    """

    top_k: int | None = None
    confidence: float = 0.25


def token_profile(own: np.ndarray, public: np.ndarray, vocabulary_size: int, strength: float = 2000.0) -> Tensor:
    """A participant's log-odds ``ln p_own(v) − ln p_public(v)`` of each token v, fp32 ``(vocabulary_size,)``.

    It tells how often words stand in a text, nothing of their order; who may not tell that keeps it back.

    Args:
        own, public: Token ids, ``(T,)`` each.
        strength: Tokens of public text that the own text is filled up with, so that rare tokens say little.
    """
    reference = np.bincount(public, minlength=vocabulary_size) + 0.5
    reference = reference / reference.sum()
    counts = np.bincount(own, minlength=vocabulary_size) + strength * reference
    return torch.from_numpy(np.log(counts / counts.sum() / reference)).float()


def profile_bytes(profile: Tensor) -> bytes:
    """A profile in half precision, as it is kept and sent: safetensors."""
    return save({"log_odds": profile.half()})


def read_profile(content: bytes, what: str, vocabulary_size: int) -> Tensor:
    """What `profile_bytes` gave.

    Args:
        what: Where it is from, for the message.

    Raises:
        ModelError: It is damaged, or belongs to another vocabulary.
    """
    try:
        profile = load_tensors(content)["log_odds"].float()
    except (ValueError, KeyError) as error:
        raise ModelError(f"{what}: no usable profile ({error})") from None
    if profile.shape != (vocabulary_size,) or not torch.isfinite(profile).all():
        raise ModelError(f"{what}: not a profile over {vocabulary_size} tokens")
    return profile


class Posterior:
    """Whose text it is, token by token: ``g_t = softmax(c Σ_{s≤t} ℓ(x_s))``.

    The base is one of the choices, with log-odds zero, so that what fits nobody is left to the base.

    Attributes:
        shares: Of the tokens of the newest forward pass, ``(batch, tokens, N)``; what is missing to 1 is the base's.
        totals: Sum of all shares given since it was made, ``(N,)``, and ``tokens``: for attribution.
    """

    def __init__(self, profiles: Tensor, settings: Evidence) -> None:
        self._profiles = profiles
        self._settings = settings
        self._evidence = profiles.new_zeros(1, 1, profiles.shape[1])
        self.shares = self._evidence
        self.totals = profiles.new_zeros(profiles.shape[1], dtype=torch.float64)
        self.tokens = 0

    def read(self, ids: Tensor, mask: Tensor | None, goes_on: bool) -> None:
        """Take in the tokens of a forward pass.

        Args:
            ids: ``(batch, tokens)``.
            mask: 0 where a token is padding, ``(batch, past + tokens)``.
            goes_on: These tokens follow those of the last pass.
        """
        log_odds = self._profiles[ids]
        if mask is not None and mask.ndim == 2:
            log_odds = log_odds * mask[:, -ids.shape[1] :, None]
        before = self._evidence[:, -1:] if goes_on else torch.zeros_like(log_odds[:, :1])
        self._evidence = before + log_odds.cumsum(1)
        logits = self._settings.confidence * self._evidence
        shares = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1).softmax(-1)
        self.shares = shares[..., :-1]
        self.totals += self.shares.double().sum((0, 1))
        self.tokens += ids.numel()

    def mean_shares(self) -> list[float]:
        """Each participant's share of all tokens read."""
        return (self.totals / max(1, self.tokens)).tolist()


class EvidenceRouted(nn.Module):
    """One linear map's addition ``Σ_e g_e B_e A_e x``, with the shares that all maps have in common."""

    def __init__(self, parts: Mapping[int, Factors], posterior: Posterior, top_k: int | None) -> None:
        super().__init__()
        self.present = list(parts)
        self.posterior = posterior
        self.top_k = min(top_k or len(parts), len(parts))
        self.bundle = Bundle(list(parts.values()))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, tokens, d_in)`` to ``(batch, tokens, d_out)``."""
        shares = self.posterior.shares.to(x.dtype)[..., self.present]
        if self.top_k == len(self.present):
            return self.bundle.every(x, shares)
        kept, chosen = shares.flatten(0, -2).topk(self.top_k)
        added_to: Tensor = self.bundle(x.flatten(0, -2), chosen, kept)
        return added_to.view(*x.shape[:-1], added_to.shape[-1])


@contextmanager
def by_evidence(
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter],
    profiles: Mapping[str, Tensor],
    settings: Evidence | None = None,
) -> Iterator[Posterior]:
    """Within, the model gives every token the adapters of whoever its text seems to be from.

    Raises:
        ModelError: An adapter was not trained on a model of this shape, or a profile not with this vocabulary.
        RecipeError: A setting is out of range, or somebody's profile is missing.
    """
    settings = settings or Evidence()
    _check(model, adapters, profiles, settings)
    names = list(adapters)
    stacked = torch.stack([profiles[name].float() for name in names], dim=-1).to(model.device)
    posterior = Posterior(stacked, settings)
    number = {name: place for place, name in enumerate(names)}
    routed = {
        path: EvidenceRouted({number[n]: part for n, part in parts.items()}, posterior, settings.top_k)
        for path, parts in by_module(adapters).items()
    }

    def before_forward(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor = named["input_ids"] if "input_ids" in named else arguments[0]
        past = named.get("past_key_values")
        goes_on = past is not None and past.get_seq_length() > 0
        posterior.read(ids, named.get("attention_mask"), goes_on)

    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        with added(model, routed):
            yield posterior
    finally:
        hook.remove()


def _check(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], profiles: Mapping[str, Tensor], settings: Evidence
) -> None:
    if settings.top_k is not None and not 1 <= settings.top_k <= len(adapters):
        raise RecipeError(f"top_k = {settings.top_k} of {len(adapters)} adapters", "choose at least 1, at most all")
    if not settings.confidence > 0:
        raise RecipeError(f"confidence = {settings.confidence:g} is not above 0")
    for name, adapter in adapters.items():
        check_fits(model, adapter, name)
        if name not in profiles:
            raise RecipeError(f"{name}: its profile is missing", "the participant makes it with token_profile")
        if profiles[name].shape != (model.config.vocab_size,):
            raise ModelError(f"{name}: its profile is not over this model's {model.config.vocab_size} tokens")
