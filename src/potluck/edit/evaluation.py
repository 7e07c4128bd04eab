"""How well edits hold: what the model says by itself, and how likely it finds the new answer and the old one.

A model is asked after the last edit, and answers freely and greedily (`potluck.edit.prompts.said`): nothing of the
target is given. An answer is right if it **begins with** the target (`potluck.edit.judging`); beside it stands how many
are exactly it. Probabilities are those of CounterFact (ES, PS, NS; arXiv 2202.05262). Figures in which the right
answer's first tokens are given, as many papers report them, stand beside as well: they were 97 % where free answers
were 38 % (arXiv 2502.11177). Locality compares with what the unedited model said, right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

import torch

from potluck.compose.base import Base
from potluck.edit.facts import Edit
from potluck.edit.fluency import fluency
from potluck.edit.judging import begins, exactly, sentence
from potluck.edit.prompts import (
    MARGIN,
    MAX_ANSWER,
    Answer,
    answer_nll,
    answers,
    continuation,
    logits_of,
    row,
    rows_of,
    said,
)
from potluck.edit.prompts import told as told_tokens

Asked = Sequence[tuple[str, str]]  # prompts, each with an answer


@dataclass(frozen=True)
class Before:
    """What the unedited model says of the neighbours.

    Attributes:
        said: Its own answers, in the order of `neighbours_of`.
    """

    said: tuple[Answer, ...]


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1, ``None`` where nothing was asked.

    Attributes:
        edits: How many were asked.
        reliability, rephrase, onward: Free answers that begin with the target.
        locality: Free answers to neighbours that begin as before: with the same tokens, as many as the longer of
            the edit's target and old answer has.
        score: Harmonic mean of reliability, rephrase and locality, of those there are.
        exact_reliability, exact_rephrase: Free answers that are the target and end there.
        exact_locality: Free answers to neighbours that are as before up to a sentence's end, or in 24 tokens.
        es, ps, ns: How often the target is likelier than the old answer, by mean nats a token: on prompts, and on
            rephrases; and how often what is true of a neighbour is likelier than the target.
        s: Harmonic mean of ES, PS and NS.
        em, pm, nm: The same as mean differences of probabilities ``exp(−nats a token)``.
        given_*: Teacher-forced: share of edits of which every token was likeliest where it stands; of neighbours, share
            whose likeliest next token is as before.
        fluency: Mean n-gram entropy of longer answers, times 100 (`potluck.edit.fluency`).
    """

    edits: int
    reliability: float
    rephrase: float | None
    locality: float | None
    onward: float | None
    score: float
    exact_reliability: float
    exact_rephrase: float | None
    exact_locality: float | None
    es: float | None
    ps: float | None
    ns: float | None
    s: float | None
    em: float | None
    pm: float | None
    nm: float | None
    given_reliability: float
    given_rephrase: float | None
    given_locality: float | None
    fluency: float


def neighbours_of(edits: Sequence[Edit]) -> list[str]:
    """All prompts about others, in the edits' order."""
    return [prompt for edit in edits for prompt in edit.neighbours]


def answers_before(base: Base, edits: Sequence[Edit], batch_size: int = 16, tokens: int = MAX_ANSWER) -> Before:
    """What a model says of the neighbours before it is edited, in so many tokens at most."""
    return Before(tuple(said(base, neighbours_of(edits), batch_size, tokens)))


def score_edits(
    base: Base,
    edits: Sequence[Edit],
    before: Before | None,
    batch_size: int = 16,
    fluent: int = 50,
    tokens: int = MAX_ANSWER,
) -> Scores:
    """Ask the edited model.

    Args:
        base: The edited model.
        edits: All of them.
        before: Of the unedited model; without it nothing is said of locality.
        batch_size: Changes nothing but speed.
        fluent: Edits whose longer answers are looked at.
        tokens: Of an answer about a neighbour, as in ``before``.
    """
    asked = [(edit.prompt, edit.target) for edit in edits]
    rephrased = [(prompt, edit.target) for edit in edits for prompt in edit.rephrases]
    told, told_again = answered(base, asked, batch_size), answered(base, rephrased, batch_size)
    kept = None if before is None else unchanged(base, edits, before, answers_before(base, edits, batch_size, tokens))
    given, given_again = _given(base, asked, batch_size), _given(base, rephrased, batch_size)
    begun = [_share(told.begins), _share(told_again.begins), None if kept is None else _share(kept.begins)]
    chances = _chances(base, edits, given, given_again, batch_size)
    published = [chances[name] for name in ("es", "ps", "ns")]
    return Scores(
        edits=len(edits),
        reliability=begun[0] or 0.0,
        rephrase=begun[1],
        locality=begun[2],
        onward=_share(answered(base, [pair for edit in edits for pair in edit.onward], batch_size).begins),
        score=_mean_of(begun) or 0.0,
        exact_reliability=_share(told.exactly) or 0.0,
        exact_rephrase=_share(told_again.exactly),
        exact_locality=None if kept is None else _share(kept.exactly),
        s=_mean_of(published),
        given_reliability=_share(given.likeliest) or 0.0,
        given_rephrase=_share(given_again.likeliest),
        given_locality=None if kept is None else _share(kept.next_token),
        fluency=fluency(base, [edit.prompt for edit in edits[:fluent]], batch_size),
        **chances,
    )


def right_answers(base: Base, edits: Sequence[Edit], batch_size: int = 16) -> list[bool]:
    """Of each edit, whether the model's free answer to its prompt begins with the target."""
    return answered(base, [(edit.prompt, edit.target) for edit in edits], batch_size).begins


@dataclass(frozen=True)
class Judged:
    """Of each answer, whether it begins with what was expected, and whether it is exactly that."""

    begins: list[bool]
    exactly: list[bool]


def answered(base: Base, asked: Asked, batch_size: int = 16) -> Judged:
    """Whether free answers to prompts are the expected ones.

    Args:
        base: The model.
        asked: Prompts and expected answers; only how long the longest is bounds what the model may say.
        batch_size: Changes nothing but speed.
    """
    longest = max((len(continuation(base.vocabulary, *pair)) for pair in asked), default=0)
    found = answers(base, [prompt for prompt, _ in asked], batch_size, longest + MARGIN)
    expected = [answer for _, answer in asked]
    return Judged(list(map(begins, found, expected)), list(map(exactly, found, expected)))


@dataclass(frozen=True)
class Unchanged:
    """Of each neighbour's answer, whether it is as before.

    Attributes:
        begins: In its first tokens, as many as the longer of the edit's target and old answer has.
        exactly: Up to its first sentence's end, or as far as it was asked for.
        next_token: In its first token.
    """

    begins: list[bool]
    exactly: list[bool]
    next_token: list[bool]


def unchanged(base: Base, edits: Sequence[Edit], before: Before, after: Before) -> Unchanged:
    """Compare what is said of the neighbours before and after edits."""
    lengths = [n for edit in edits for n in [answer_length(base, edit)] * len(edit.neighbours)]
    pairs = list(zip(before.said, after.said, strict=True))
    return Unchanged(
        [a.tokens[:n] == b.tokens[:n] for n, (a, b) in zip(lengths, pairs, strict=True)],
        [sentence(a.text) == sentence(b.text) for a, b in pairs],
        [a.tokens[:1] == b.tokens[:1] for a, b in pairs],
    )


def answer_length(base: Base, edit: Edit) -> int:
    """Tokens of an edit's answer: of the target or of the old one, whichever is longer."""
    return max(len(continuation(base.vocabulary, edit.prompt, text)) for text in (edit.target, edit.old) if text)


@dataclass(frozen=True)
class _Given:
    """Of each answer that was put before the model: mean nats a token, and whether all its tokens were likeliest."""

    nats: list[float]
    likeliest: list[bool]


@torch.inference_mode()
def _given(base: Base, asked: Asked, batch_size: int) -> _Given:
    nats: list[float] = []
    likeliest: list[bool] = []
    for begin in range(0, len(asked), batch_size):
        rows = [row(base.vocabulary, prompt, answer) for prompt, answer in asked[begin : begin + batch_size]]
        batch = rows_of(rows, base.vocabulary.end_of_text).to(base.model.device)
        logits = logits_of(base.model, batch)
        nats += answer_nll(logits, batch.labels).tolist()
        likeliest += (told_tokens(logits, batch.labels) == 1).tolist()
    return _Given(nats, likeliest)


def _chances(
    base: Base, edits: Sequence[Edit], given: _Given, given_again: _Given, batch_size: int
) -> dict[str, float | None]:
    """ES, PS, NS and EM, PM, NM: the likelihoods of the target and of what is true without the edit."""
    targets = [edit for edit in edits for _ in edit.rephrases]
    olds = [(edit.prompt, edit.old) for edit in edits if edit.old]
    olds_again = [(prompt, edit.old) for edit in edits if edit.old for prompt in edit.rephrases]
    near = [(edit, pair) for edit in edits for pair in zip(edit.neighbours, edit.truths, strict=False)]
    of_target = _given(base, [(prompt, edit.target) for edit, (prompt, _) in near], batch_size)
    compared = {
        "e": (
            [nats for nats, edit in zip(given.nats, edits, strict=True) if edit.old],
            _given(base, olds, batch_size).nats,
        ),
        "p": (
            [nats for nats, edit in zip(given_again.nats, targets, strict=True) if edit.old],
            _given(base, olds_again, batch_size).nats,
        ),
        "n": (_given(base, [pair for _, pair in near], batch_size).nats, of_target.nats),
    }
    found: dict[str, float | None] = {}
    for name, (wanted, other) in compared.items():
        a, b = torch.tensor(wanted, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
        found[f"{name}s"] = _share((a < b).tolist())
        found[f"{name}m"] = float(((-a).exp() - (-b).exp()).mean()) if len(a) else None
    return found


def _mean_of(shares: Sequence[float | None]) -> float | None:
    """Harmonic mean of the shares there are; 0 if one of them is."""
    there = [share for share in shares if share is not None]
    return None if not there else harmonic_mean(there) if all(there) else 0.0


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def as_percent(scores: Scores) -> Mapping[str, float | None]:
    """The figures for a table: shares in percent."""
    shares = {name: value for name, value in vars(scores).items() if name not in ("edits", "fluency")}
    return {name: None if value is None else round(100 * value, 1) for name, value in shares.items()} | {
        "fluency": round(scores.fluency, 1)
    }
