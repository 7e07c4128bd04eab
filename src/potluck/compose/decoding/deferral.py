"""Learned deferral: the base learns, token by token, when an assistant should speak (Co-LLM, arXiv 2403.03870).

With a row w and a bias b for each of K assistants and the base's state s, whose turn it is is latent::

    P(z | x_<t) = softmax([0, w_1·s + b_1, …, w_K·s + b_K])      z = 0 is the base; for K = 1, P(z = 1) = σ(d)
    P(x_t | x_<t) = Σ_z P(z | x_<t) p_z(x_t | x_<t)

In the paper s is the last hidden state; here a fading mean of those before it stands beside it (`Here.look`), for what
kind of text it is shows better in many tokens than in one. All models stay frozen; the rows alone learn, from the
text's own tokens as each model foretells them. Only token ids and these log-probabilities cross to where an assistant
is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from potluck.compose.base import Base, token_stream
from potluck.compose.decoding.decode import Said, Sampling, Text, check_together
from potluck.compose.decoding.gates import Deferral, Gates
from potluck.compose.decoding.models import Here, NextToken, gold_of
from potluck.errors import CorpusError, RecipeError, TrainingError

_WARM_UP = 0.04


@dataclass(frozen=True)
class Foretold:
    """A text as all models foretell it; with them frozen, all that gates learn from.

    Attributes:
        states: The base's before each token, fp32 ``(T, 2 d)``.
        entropy: Of the base's distribution there, nats, ``(T,)``.
        log_p: Each token's log-probability, the base's first, nats, ``(T, K + 1)``.
        right: Whether the token is the model's likeliest, ``(T, K + 1)``.
    """

    states: Tensor
    entropy: Tensor
    log_p: Tensor
    right: Tensor


@dataclass(frozen=True)
class Lesson:
    """How gates are learnt.

    Attributes:
        rate: Share of tokens at which an assistant may be called; it sets the threshold.
        sequence_length: Tokens of a stretch that all models foretell at once.
        epochs: Passes over the text.
        batch: Tokens of a step.
        learning_rate: Peak of AdamW, in both stages; 4% of the steps warm up, then it falls to zero. The paper's 2e-5
            is for a whole model that learns along.
        positive_weight: Of a token that the assistant has right and the base wrong, in the first stage.
        seed: Decides the order of documents and tokens.
    """

    rate: float = 0.3
    sequence_length: int = 256
    epochs: int = 8
    batch: int = 1024
    learning_rate: float = 1e-2
    positive_weight: float = 8.0
    seed: int = 0


def learn_deferral(
    base: Base, here: Here, assistants: Sequence[NextToken], texts: Sequence[str], lesson: Lesson
) -> Deferral:
    """Gates from four stretches of a text in five, their threshold from the fifth, which also says what they came to.

    Args:
        here: The base, to be asked.

    Raises:
        CorpusError: The text is too short.
        ModelError, EngineError: As the models raise them.
        TrainingError: The loss is not finite.
    """
    order = list(texts)
    random.Random(lesson.seed).shuffle(order)
    stretches = stretches_of(token_stream(order, base.vocabulary), lesson.sequence_length)
    if len(stretches) < 5:
        few = f"{len(stretches)} stretches of {lesson.sequence_length} tokens are too few to learn from"
        raise CorpusError(few, "give more text, or shorter stretches")
    learn = foretold(here, assistants, [stretch for at, stretch in enumerate(stretches) if at % 5 != 4])
    rest = foretold(here, assistants, stretches[4::5])
    gates = learn_gates(learn, first_row(base), lesson)
    log_turns = gates.log_turns(rest.states)
    threshold = threshold_for(log_turns, lesson.rate)
    names = [model.name for model in (here, *assistants)]
    nats = dict(zip(names, (-rest.log_p.mean(dim=0)).tolist(), strict=True))
    figures = {
        "tokens": len(rest.log_p),
        "called": float((called(log_turns) > threshold).float().mean()),
        "nats_per_token": {
            **nats,
            "best fixed mixture": fixed_mixture(rest.log_p)[1],
            "deferral": float(losses(log_turns, rest.log_p, threshold).mean()),
        },
    }
    return Deferral(gates, threshold, base.content_hash, tuple(names[1:]), figures)


def first_row(base: Base) -> Tensor:
    """Where an assistant's row begins: at the mean of the output head's, which reads no mean of states, ``(2 d,)``."""
    head: Any = base.model.get_output_embeddings()
    row: Tensor = head.weight.detach().float().mean(dim=0).cpu()
    return pad(row, (0, len(row)))


def stretches_of(stream: np.ndarray, sequence_length: int) -> list[list[int]]:
    """A stream ``(T + 1,)`` in pieces that foretell ``sequence_length`` tokens each, begun with the one before it.

    Raises:
        CorpusError: It is shorter than two tokens.
    """
    if len(stream) < 2:
        raise CorpusError("the text is too short: there is nothing to foretell")
    starts = range(0, len(stream) - 1, sequence_length)
    return [[int(token) for token in stream[start : start + sequence_length + 1]] for start in starts]


def foretold(base: Here, assistants: Sequence[NextToken], stretches: Sequence[Sequence[int]]) -> Foretold:
    """What all models say of a text; the first token of a stretch is only context.

    Raises:
        ModelError, EngineError: As the models raise them.
    """
    check_together(base, assistants)
    states, entropy, log_p, right = [], [], [], []
    for tokens in stretches:
        rows, here = base.look(tokens[:-1], len(tokens) - 1)
        golds = [gold_of(rows, tokens[1:]), *(assistant.gold(tokens) for assistant in assistants)]
        states.append(here)
        entropy.append(torch.special.entr(rows.exp()).sum(dim=1))
        log_p.append(torch.stack([gold.log_p for gold in golds], dim=1))
        right.append(torch.stack([gold.right for gold in golds], dim=1))
    return Foretold(torch.cat(states), torch.cat(entropy), torch.cat(log_p), torch.cat(right))


def learn_gates(text: Foretold, start: Tensor, lesson: Lesson) -> Gates:
    """Gates that make the text likely.

    First one pass of cross-entropy to weak labels, ``assistant right and base wrong``; then the text's own likelihood,
    ``-log Σ_z P(z) p_z(x_t)``.

    Args:
        start: Where each row begins, ``(2 d,)``, or ``(d,)`` for the paper's.

    Raises:
        TrainingError: The loss is not finite.
    """
    assistants = text.log_p.shape[1] - 1
    rows = start.repeat(assistants, 1).requires_grad_(True)
    bias = torch.zeros(assistants, requires_grad=True)
    weak = (text.right[:, 1:] & ~text.right[:, :1]).float()
    weight = torch.tensor(lesson.positive_weight)

    def towards_labels(at: Tensor) -> Tensor:
        logits = Gates(rows, bias).logits(text.states[at])
        return binary_cross_entropy_with_logits(logits, weak[at], pos_weight=weight)

    def likelihood(at: Tensor) -> Tensor:
        return -(Gates(rows, bias).log_turns(text.states[at]) + text.log_p[at]).logsumexp(dim=1).mean()

    for loss_of, epochs in ((towards_labels, 1), (likelihood, lesson.epochs)):
        order = _batches(len(text.log_p), epochs, lesson)
        optimizer = torch.optim.AdamW([rows, bias], lr=lesson.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(len(order)))
        for at in order:
            optimizer.zero_grad()
            loss = loss_of(at)
            loss.backward()
            if not torch.isfinite(loss):
                raise TrainingError("the gates' loss is not finite", "an assistant gives a token of the text no chance")
            optimizer.step()
            schedule.step()
    return Gates(rows.detach(), bias.detach())


def called(log_turns: Tensor) -> Tensor:
    """``1 - P(z = base)``, what a threshold is held against: ``(…, K + 1)`` to ``(…)``."""
    return 1 - log_turns[..., 0].exp()


def threshold_for(log_turns: Tensor, rate: float) -> float:
    """The least threshold that calls an assistant at no more than this share of tokens."""
    ordered = called(log_turns).sort(descending=True).values
    return float(ordered[min(int(rate * len(ordered)), len(ordered) - 1)])


def losses(log_turns: Tensor, log_p: Tensor, threshold: float) -> Tensor:
    """Nats of each token under deferral as `Defer` decodes, ``(T,)``.

    ``P(x) = p_base(x)`` where no assistant is called; where ``called > threshold``, the base's and the likelier
    assistant k's, ``(P(0) p_base(x) + P(k) p_k(x)) / (P(0) + P(k))``.
    """
    best = log_turns[:, 1:].argmax(dim=1, keepdim=True) + 1
    pair = torch.cat([torch.zeros_like(best), best], dim=1)
    turns = log_turns.gather(1, pair).log_softmax(dim=1)
    mixed = (turns + log_p.gather(1, pair)).logsumexp(dim=1)
    return -torch.where(called(log_turns) > threshold, mixed, log_p[:, 0])


def fixed_mixture(log_p: Tensor, rounds: int = 200) -> tuple[Tensor, float]:
    """The best mixture with weights that are the same everywhere, by expectation and maximisation.

    Returns:
        Its weights ``(K + 1,)``, and its nats per token; it asks all models at every token.
    """
    weights = torch.full((log_p.shape[1],), 1 / log_p.shape[1])
    for _ in range(rounds):
        weights = (weights.log() + log_p).softmax(dim=1).mean(dim=0)
    return weights, -float((weights.log() + log_p).logsumexp(dim=1).mean())


@dataclass(frozen=True)
class Defer:
    """The rule: an assistant is called where ``1 - P(z = base) > threshold``, and only there.

    Where it is, the token is drawn from its distribution and the base's, weighted by whose turn it may be.

    Attributes:
        threshold: η; chosen on text that was not learnt from, for a share of calls.
    """

    gates: Gates
    threshold: float = 0.5

    def check(self, base: NextToken, assistants: Sequence[NextToken]) -> None:
        """A base in this process, and the assistants that the gates learnt of, in their order."""
        if not isinstance(base, Here):
            raise RecipeError("deferral reads the base's states: the base must be in this process")
        if len(assistants) != len(self.gates.bias):
            raise RecipeError(f"the gates know {len(self.gates.bias)} assistants, {len(assistants)} are given")

    def __call__(
        self, base: NextToken, assistants: Sequence[NextToken], text: Text, sampling: Sampling
    ) -> Sequence[Said]:
        """One token."""
        assert isinstance(base, Here)
        rows, states = base.look(text.tokens)
        log_turns = self.gates.log_turns(states[-1])
        if called(log_turns) <= self.threshold:
            return [Said(sampling.draw(rows[-1]), base.name)]
        best = int(log_turns[1:].argmax())
        assistant = assistants[best]
        turns = torch.stack([log_turns[0], log_turns[1 + best]]).log_softmax(dim=0)
        both = torch.stack([rows[-1], assistant.log_probs(text.tokens)[-1]])
        return [Said(sampling.draw((turns[:, None] + both).logsumexp(dim=0)), assistant.name)]


def _batches(count: int, epochs: int, lesson: Lesson) -> list[Tensor]:
    draw = torch.Generator().manual_seed(lesson.seed)
    return [part for _ in range(epochs) for part in torch.randperm(count, generator=draw).split(lesson.batch)]


def _rate(steps: int) -> Callable[[int], float]:
    warm = max(1, round(_WARM_UP * steps))
    return lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0)
