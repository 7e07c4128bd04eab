"""The loop: a rule says who says the next token, until the text ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from potluck.compose.decoding.models import Counts, NextToken
from potluck.errors import ModelError, RecipeError


class Said(NamedTuple):
    """A token, and the name of the model that said it."""

    token: int
    by: str


@dataclass(frozen=True)
class Text:
    """What a rule goes on from.

    Attributes:
        tokens: The prompt and all that was said.
        room: Tokens that may yet be said, 1 or more.
    """

    tokens: list[int]
    room: int


class Sampling:
    """From log-probabilities to a token.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: The same seed draws the same.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._draws = torch.Generator().manual_seed(seed)

    def probabilities(self, scores: Tensor) -> Tensor:
        """The distribution that is drawn from, ``(V,)``: all on the likeliest token at temperature 0.

        Args:
            scores: Log-probabilities up to a constant, ``(V,)``; -inf is never drawn.
        """
        if self.temperature == 0:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        probabilities = (scores / self.temperature).softmax(dim=0)
        if self.top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            probabilities[places[before >= self.top_p]] = 0
        return probabilities / probabilities.sum()

    def pick(self, probabilities: Tensor) -> int:
        """A token from a distribution."""
        return int(torch.multinomial(probabilities, 1, generator=self._draws))

    def draw(self, scores: Tensor) -> int:
        """A token from scores."""
        return self.pick(self.probabilities(scores))

    def uniform(self) -> float:
        """A number from [0, 1)."""
        return float(torch.rand((), generator=self._draws))


class Rule(Protocol):
    """How models share a text: from what was said to what is said next, one token or more."""

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """Hold the models to what the rule needs.

        Raises:
            RecipeError: They are too few or too many, or do not say enough.
        """

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """What is said next; what goes beyond ``text.room`` or the end of the text is dropped."""


@dataclass(frozen=True)
class Decoded:
    """A text that models said together.

    Attributes:
        tokens: After the prompt, without the one that ended it.
        by: Who said each of them.
        counts: What each model was asked, by name.
    """

    tokens: list[int]
    by: list[str]
    counts: dict[str, Counts]

    @property
    def said(self) -> Counter[str]:
        """Tokens that each model said."""
        return Counter(self.by)


def decode(
    base: NextToken,
    assistants: Sequence[NextToken],
    rule: Rule,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stops: Collection[int],
    sampling: Sampling,
) -> Decoded:
    """Go on with a prompt until somebody ends the text or ``max_tokens`` were said.

    Args:
        stops: Tokens that end the text.

    Raises:
        ModelError: The models do not share a vocabulary, or the text outgrows a context.
        RecipeError: They are not those that the rule needs.
        EngineError: One of them does not answer.
    """
    check_together(base, assistants)
    rule.check(base, assistants)
    models = [base, *assistants]
    before = [replace(model.counts) for model in models]
    said: list[Said] = []
    while len(said) < max_tokens and not (said and said[-1].token in stops):
        text = Text([*prompt, *(token for token, _ in said)], max_tokens - len(said))
        for turn in rule(base, assistants, text, sampling)[: text.room]:
            said.append(turn)
            if turn.token in stops:
                break
    if said and said[-1].token in stops:
        said.pop()
    counts = {model.name: model.counts.since(then) for model, then in zip(models, before, strict=True)}
    return Decoded([token for token, _ in said], [name for _, name in said], counts)


def check_together(base: NextToken, assistants: Sequence[NextToken]) -> None:
    """Hold the models to vocabularies of one size, and to names of their own; whoever opens them compares tokenizers.

    Raises:
        ModelError: They have several.
        RecipeError: Two have one name.
    """
    for model in assistants:
        if model.vocabulary != base.vocabulary:
            raise ModelError(
                f"{model.name} has a vocabulary of {model.vocabulary} tokens, {base.name} one of {base.vocabulary}",
                "models that decode together need the same tokenizer",
            )
    names = [base.name, *(model.name for model in assistants)]
    if len(set(names)) < len(names):
        raise RecipeError(f"two models of one name: {', '.join(names)}")
