"""How well edits hold, without flattering them.

A model is asked after the last edit, and answers by itself (`potluck.edit.prompts.answers`). Figures in which the right
answer's first tokens are given, as most papers report them, stand beside: they were 97 % where free answers were 38 %
(arXiv 2502.11177). Locality compares with what the unedited model said, right or wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.facts import Edit
from potluck.edit.prompts import Rows, answer_nll, answers, logits_of, row, rows_of
from potluck.edit.prompts import told as told_tokens

_FLUENT_TOKENS = 60
_FLUENT = 50  # edits whose longer answers are looked at


@dataclass(frozen=True)
class Before:
    """What the unedited model says of the neighbours.

    Attributes:
        said: Its own answers, in the order of `neighbours_of`.
        likeliest: The token it finds likeliest after each, ``(N,)``.
    """

    said: tuple[str, ...]
    likeliest: Tensor


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1, ``None`` where nothing was asked; fluency in bits times 100.

    Attributes:
        reliability, rephrase, onward: Free answers that are the target.
        locality: Free answers to neighbours that are as before.
        score: Harmonic mean of reliability, rephrase and locality, of those there are.
        given_*: The same teacher-forced: share of edits of which every token was likeliest where it stands.
        success: Edits whose target has a lower NLL per token than what was true before.
        fluency: ``⅔ H₂ + 4/3 H₃`` of n-grams in longer answers, times 100.
        edits: How many were asked.
    """

    edits: int
    reliability: float
    rephrase: float | None
    locality: float | None
    onward: float | None
    score: float
    given_reliability: float
    given_rephrase: float | None
    given_locality: float | None
    success: float | None
    fluency: float


def neighbours_of(edits: Sequence[Edit]) -> list[str]:
    """All prompts about others, in the edits' order."""
    return [prompt for edit in edits for prompt in edit.neighbours]


def answers_before(base: Base, edits: Sequence[Edit], batch_size: int = 16) -> Before:
    """What a model says of the neighbours before it is edited."""
    prompts = neighbours_of(edits)
    return Before(tuple(answers(base, prompts, batch_size)), _likeliest(base, prompts, batch_size))


def score_edits(base: Base, edits: Sequence[Edit], before: Before | None, batch_size: int = 16) -> Scores:
    """Ask the edited model.

    Args:
        before: Of the unedited model; without it nothing is said of locality.
        batch_size: Changes nothing but speed.
    """
    asked = [(edit.prompt, edit.target) for edit in edits]
    rephrased = [(prompt, edit.target) for edit in edits for prompt in edit.rephrases]
    onward = [pair for edit in edits for pair in edit.onward]
    said = answers(base, [prompt for prompt, _ in asked], batch_size)
    free = {
        "reliability": _share([s == target for s, (_, target) in zip(said, asked, strict=True)]),
        "rephrase": _right(base, rephrased, batch_size),
        "locality": None,
    }
    kept = None
    if before is not None and before.said:
        prompts = neighbours_of(edits)
        now = answers(base, prompts, batch_size)
        free["locality"] = _share([a == b for a, b in zip(now, before.said, strict=True)])
        kept = _share((_likeliest(base, prompts, batch_size) == before.likeliest).tolist())
    reached = [value for value in free.values() if value is not None]
    return Scores(
        edits=len(edits),
        reliability=free["reliability"] or 0.0,
        rephrase=free["rephrase"],
        locality=free["locality"],
        onward=_right(base, onward, batch_size),
        score=harmonic_mean(reached) if all(reached) else 0.0,
        given_reliability=_given(base, asked, batch_size) or 0.0,
        given_rephrase=_given(base, rephrased, batch_size),
        given_locality=kept,
        success=_success(base, edits, batch_size),
        fluency=_fluency(base, [edit.prompt for edit in edits[:_FLUENT]], batch_size),
    )


def right_answers(base: Base, edits: Sequence[Edit], batch_size: int = 16) -> list[bool]:
    """Of each edit, whether the model answers its prompt with the target by itself."""
    said = answers(base, [edit.prompt for edit in edits], batch_size)
    return [s == edit.target for s, edit in zip(said, edits, strict=True)]


def ngram_entropy(tokens: Sequence[int]) -> float:
    """``100 (⅔ H₂ + 4/3 H₃)``, H the entropy of the n-grams of a text in bits: low where it repeats itself."""
    return 100 * (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3))


def _entropy(tokens: Sequence[int], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def _right(base: Base, asked: Sequence[tuple[str, str]], batch_size: int) -> float | None:
    said = answers(base, [prompt for prompt, _ in asked], batch_size)
    return _share([s == target for s, (_, target) in zip(said, asked, strict=True)])


def _given(base: Base, asked: Sequence[tuple[str, str]], batch_size: int) -> float | None:
    found = _over(base, asked, batch_size, lambda logits, rows: told_tokens(logits, rows.labels) == 1)
    return _share([bool(value) for value in found])


def _success(base: Base, edits: Sequence[Edit], batch_size: int) -> float | None:
    known = [edit for edit in edits if edit.old]
    new = _over(base, [(e.prompt, e.target) for e in known], batch_size, lambda x, rows: answer_nll(x, rows.labels))
    old = _over(base, [(e.prompt, e.old) for e in known], batch_size, lambda x, rows: answer_nll(x, rows.labels))
    return _share([float(a) < float(b) for a, b in zip(new, old, strict=True)])


def _likeliest(base: Base, prompts: Sequence[str], batch_size: int) -> Tensor:
    def at_the_end(logits: Tensor, rows: Rows) -> Tensor:
        return logits[torch.arange(len(logits), device=logits.device), rows.last].argmax(-1)

    return torch.tensor([int(v) for v in _over(base, [(p, "") for p in prompts], batch_size, at_the_end)])


@torch.inference_mode()
def _over(
    base: Base, asked: Sequence[tuple[str, str]], batch_size: int, measure: Callable[[Tensor, Rows], Tensor]
) -> list[Tensor]:
    found: list[Tensor] = []
    for begin in range(0, len(asked), batch_size):
        rows = [row(base.vocabulary, prompt, answer) for prompt, answer in asked[begin : begin + batch_size]]
        batch = rows_of(rows, base.vocabulary.end_of_text).to(base.model.device)
        found += measure(logits_of(base.model, batch), batch).cpu().unbind()
    return found


def _fluency(base: Base, prompts: Sequence[str], batch_size: int) -> float:
    longer = answers(base, prompts, batch_size, _FLUENT_TOKENS, stops=())
    encoded = [base.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids for text in longer]
    return sum(map(ngram_entropy, encoded)) / max(1, len(encoded))


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def as_percent(scores: Scores) -> Mapping[str, float | None]:
    """The figures for a table: shares in percent."""
    shares = {name: value for name, value in vars(scores).items() if name not in ("edits", "fluency")}
    return {name: None if value is None else round(100 * value, 1) for name, value in shares.items()} | {
        "fluency": round(scores.fluency, 1)
    }
