"""Rules for decoding together that need no training.

All but `Proxy` take the base for the small model, which is always here, and one assistant for the large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.decoding.decode import Said, Sampling, Text
from potluck.compose.decoding.models import NextToken
from potluck.errors import RecipeError


@dataclass(frozen=True)
class WhenUnsure:
    """The large model says the token where the small one is unsure: ``H(p_small) > threshold``.

    The entropy rule of FS-GEN (arXiv 2406.12295): most tokens do not need the large model, and where the small one
    is unsure is where they do.

    Attributes:
        threshold: Nats.
    """

    threshold: float = 2.0

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """One assistant, and a base that says all of its distribution."""
        _check(self, base, assistants, count=1, whole=(base,))

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """One token."""
        small = base.log_probs(text.tokens)[-1]
        if entropy(small) <= self.threshold:
            return [Said(sampling.draw(small), base.name)]
        (large,) = assistants
        return [Said(sampling.draw(large.log_probs(text.tokens)[-1]), large.name)]


@dataclass(frozen=True)
class Speculative:
    """The small model drafts, the large one verifies all of it in one call; the text is as if it had said all.

    A drafted x is kept with probability ``min(1, p(x) / q(x))``, p of the large model and q of the small one; the
    first that is not is replaced by a draw from ``max(0, p - q)``, normed, and a draft that is kept whole is followed
    by a draw from p (Leviathan et al., arXiv 2211.17192). At temperature 0 both are all on one token, and x is kept
    if and only if it is the large model's likeliest.

    Attributes:
        draft: Tokens drafted at a time.
    """

    draft: int = 4

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """One assistant. One that says only its likeliest tokens is followed as if it had no others."""
        _check(self, base, assistants, count=1)

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """The tokens of the draft that are kept, and one of the large model."""
        (large,) = assistants
        drafted: list[int] = []
        q: list[Tensor] = []
        for _ in range(min(self.draft, text.room - 1)):
            q.append(sampling.probabilities(base.log_probs([*text.tokens, *drafted])[-1]))
            drafted.append(sampling.pick(q[-1]))
        rows = large.log_probs([*text.tokens, *drafted], len(drafted) + 1)
        p = [sampling.probabilities(row) for row in rows]
        kept: list[Said] = []
        for x, p_i, q_i in zip(drafted, p, q, strict=False):
            if sampling.uniform() * q_i[x] >= p_i[x]:
                rest = (p_i - q_i).clamp(min=0)
                return [*kept, Said(sampling.pick(rest if rest.any() else p_i), large.name)]  # p and q equal, rounded
            kept.append(Said(x, base.name))
        return [*kept, Said(sampling.pick(p[-1]), large.name)]


@dataclass(frozen=True)
class Contrastive:
    """What the large model prefers and the small one does not, among what the large one finds plausible.

    ``score(x) = log p_large(x) - strength · log p_small(x)`` where ``p_large(x) >= plausibility · max p_large``, else
    ``-inf`` (Li et al., arXiv 2210.15097, who search for the best text by this score; here tokens are drawn by it).

    Attributes:
        strength: λ; 0 is the large model alone, but for what is not plausible.
        plausibility: α, in (0, 1]; 1 takes the large model's likeliest token.
    """

    strength: float = 0.5
    plausibility: float = 0.1

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """One assistant, and a base that says all of its distribution."""
        _check(self, base, assistants, count=1, whole=(base,))

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """One token."""
        (expert,) = assistants
        large, small = expert.log_probs(text.tokens)[-1], base.log_probs(text.tokens)[-1]
        plausible = large >= large.max() + math.log(self.plausibility)
        scores = torch.where(plausible, large - self.strength * small, -torch.inf)
        return [Said(sampling.draw(scores), expert.name)]


@dataclass(frozen=True)
class Proxy:
    """The base, steered by what tuning changed in a smaller model: ``base + strength · (tuned - untuned)`` in logits.

    Proxy-tuning (Liu et al., arXiv 2401.08565), with strength 1; the assistants are the tuned model and the untuned
    one, in this order. Log-probabilities are logits up to a constant, which does not matter.
    """

    strength: float = 1.0

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """Two assistants, and all say all of their distribution."""
        _check(self, base, assistants, count=2, whole=(base, *assistants))

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """One token."""
        own, tuned, untuned = (model.log_probs(text.tokens)[-1] for model in (base, *assistants))
        return [Said(sampling.draw(own + self.strength * (tuned - untuned)), base.name)]


@dataclass(frozen=True)
class Glimpse:
    """Who says a whole step is decided by its first token: the large model, if the small one is unsure of that.

    ``H(p_small(first token)) > threshold`` gives the step to the large model, from its first token on (GlimpRouter,
    arXiv 2601.05110).

    Attributes:
        ends: Whether these tokens, said since the step began, are a whole step.
        threshold: Nats.
    """

    ends: Callable[[Sequence[int]], bool]
    threshold: float = 2.0

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """One assistant, and a base that says all of its distribution."""
        _check(self, base, assistants, count=1, whole=(base,))

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """A step."""
        first = base.log_probs(text.tokens)[-1]
        (large,) = assistants
        speaker = large if entropy(first) > self.threshold else base
        step = [sampling.draw(first if speaker is base else large.log_probs(text.tokens)[-1])]
        while len(step) < text.room and not self.ends(step):
            step.append(sampling.draw(speaker.log_probs([*text.tokens, *step])[-1]))
        return [Said(token, speaker.name) for token in step]


def entropy(row: Tensor) -> float:
    """``-Σ p log p`` of a row of log-probabilities, nats."""
    return float(torch.special.entr(row.exp()).sum())


def _check(
    rule: object, base: NextToken, assistants: Sequence[NextToken], count: int, whole: Sequence[NextToken] = ()
) -> None:
    name = type(rule).__name__
    if len(assistants) != count:
        raise RecipeError(f"{name} takes {count} assistant{'s' * (count > 1)}, {len(assistants)} are given")
    for model in whole:
        if not model.whole:
            raise RecipeError(f"{model.name} says only its likeliest tokens; {name} needs all of them from it")
