"""What a model still says of what it should have forgotten, and whether it is as if it had never known.

Figures of TOFU (arXiv 2401.06121), all of whole answers: probability, ROUGE-L recall of what the model says by itself,
truth ratio, forget quality and model utility; and extraction strength and exact memorisation. The probability of an
answer is ``exp(−ℓ)`` with ℓ its mean nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.forgetting.freely import free_answers
from potluck.edit.forgetting.questions import Question
from potluck.edit.judging import begins
from potluck.edit.prompts import Row, answer_nll, logits_of, row, rows_of
from potluck.errors import EditError

_ROWS = 64  # in a batch
_LOGITS = 1 << 26  # in a batch, however wide the vocabulary is
_MAX_CELLS = 4_000_000  # up to which the distribution of Kolmogorov and Smirnov is counted out


@dataclass(frozen=True)
class Told:
    """What a model makes of answers that are put before it (teacher forcing).

    Attributes:
        nats: Mean cross-entropy of each, ``(N,)``, float64.
        hits: Of each, whether each of its tokens was the likeliest.
    """

    nats: Tensor
    hits: tuple[tuple[bool, ...], ...]

    @property
    def probabilities(self) -> Tensor:
        """``exp(−ℓ)``, ``(N,)``."""
        return (-self.nats).exp()

    @property
    def memorised(self) -> list[float]:
        """Exact memorisation of each: share of its tokens that were the likeliest."""
        return [sum(hits) / max(1, len(hits)) for hits in self.hits]

    @property
    def extraction_strengths(self) -> list[float]:
        """``1 − k/n`` of each: k is the shortest beginning after which all further tokens are the likeliest."""
        return [_from_the_end(hits) / max(1, len(hits)) for hits in self.hits]


def told_of(base: Base, asked: Sequence[tuple[str, str]]) -> Told:
    """Put answers before the model.

    Args:
        asked: Prompts and answers.
    """
    return _told(base, [row(base.vocabulary, prompt, answer) for prompt, answer in asked])


@dataclass(frozen=True)
class Known:
    """What a model knows of answers: with each put before it, and by itself.

    Attributes:
        told: With the answers put before it.
        answers: What is expected.
        texts: What it says by itself, as long as the answer (`potluck.edit.forgetting.freely`).
    """

    told: Told
    answers: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def said(self) -> float:
        """Share of answers that the model says by itself word for word: by tokens or by text."""
        whole = [
            all(hits) or begins(text, answer)
            for hits, text, answer in zip(self.told.hits, self.texts, self.answers, strict=True)
        ]
        return sum(whole) / len(whole)

    @property
    def rouge(self) -> float:
        """Mean ROUGE-L recall of what it says by itself."""
        return sum(map(rouge_recall, self.answers, self.texts)) / len(self.answers)


def known_of(base: Base, asked: Sequence[tuple[str, str]]) -> Known:
    """Ask a model, and put the answers before it.

    Args:
        asked: Prompts and answers.
    """
    rows = [row(base.vocabulary, prompt, answer) for prompt, answer in asked]
    told = _told(base, rows)
    return Known(told, tuple(answer for _, answer in asked), tuple(free_answers(base, rows, told.hits)))


@torch.inference_mode()
def _told(base: Base, rows: Sequence[Row]) -> Told:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    nats = torch.zeros(len(rows), dtype=torch.float64)
    hits: list[tuple[bool, ...]] = [()] * len(rows)
    longest = len(rows[order[-1]].ids) if order else 1
    size = max(1, min(_ROWS, _LOGITS // (longest * base.model.config.vocab_size)))
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        batch = rows_of([rows[i] for i in places], base.vocabulary.end_of_text).to(base.model.device)
        logits = logits_of(base.model, batch)
        nats[places] = answer_nll(logits, batch.labels).cpu().double()
        right = (logits.argmax(-1) == batch.labels).cpu()
        for i, row_right, counted in zip(places, right, (batch.labels != -100).cpu(), strict=True):
            hits[i] = tuple(row_right[counted].tolist())
    return Told(nats, tuple(hits))


def truth_ratios(base: Base, questions: Sequence[Question]) -> Tensor:
    """``TR = exp(−mean ℓ(wrong)) / exp(−ℓ(right, paraphrased))``, ``(N,)``: small for who knows it.

    Raises:
        EditError: A question has no wrong answers.
    """
    without = next((q.id for q in questions if not q.perturbed), None)
    if without is not None:
        raise EditError(f"question {without} has no wrong answers", "the truth ratio needs perturbed_answer")
    asked = [pair for q in questions for pair in (q.again, *((q.again[0], wrong) for wrong in q.perturbed))]
    nats, found, begin = told_of(base, asked).nats, [], 0
    for q in questions:
        own = nats[begin : begin + 1 + len(q.perturbed)]
        found.append(own[0] - own[1:].mean())
        begin += len(own)
    return torch.stack(found).exp()


def forget_quality(candidate: Sequence[float] | Tensor, never_knew: Sequence[float] | Tensor) -> float:
    """FQ: the p-value that both are truth ratios of one distribution; ``never_knew`` is of a model without that text.

    Raises:
        EditError: Of one of them there are none.
    """
    return kolmogorov_smirnov([float(x) for x in candidate], [float(x) for x in never_knew])[1]


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The two-sample test: the largest distance of the distribution functions, and its two-sided p-value.

    The p-value is exact (ties apart) up to 4 million pairs: the chance that a walk of n and m steps in random order
    leaves the strip ``|i/n − j/m| < D``. Beyond, Kolmogorov's limit ``2 Σ (−1)^(k−1) exp(−2 k² D² nm/(n+m))``.

    Raises:
        EditError: A sample is empty or not finite.
    """
    n, m = len(first), len(second)
    if not n or not m or not all(map(math.isfinite, (*first, *second))):
        raise EditError("two distributions of finite numbers are needed to be compared")
    distance = 0
    a, b = sorted(first), sorted(second)
    i = j = 0
    while i < n and j < m:
        value = min(a[i], b[j])
        while i < n and a[i] == value:
            i += 1
        while j < m and b[j] == value:
            j += 1
        distance = max(distance, abs(i * m - j * n))
    if not distance:
        return 0.0, 1.0
    d = distance / (n * m)
    if n * m <= _MAX_CELLS:
        return d, _leaves(n, m, distance)
    squared = d * d * n * m / (n + m)
    return d, min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * squared) for k in range(1, 101))))


def rouge_recall(expected: str, said: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words, over the words expected; no stemming."""
    a, b = (re.findall(r"\w+", text.casefold()) for text in (expected, said))
    if not a:
        return 0.0
    line = [0] * (len(b) + 1)
    for word in a:
        before = line[:]
        for j, other in enumerate(b, start=1):
            line[j] = before[j - 1] + 1 if word == other else max(before[j], line[j - 1])
    return line[-1] / len(a)


@dataclass(frozen=True)
class Utility:
    """What of a set of questions is still known, each from 0 to 1.

    Attributes:
        probability: Mean of ``exp(−ℓ)``, or of ``p / (p + Σ p_wrong)`` where wrong answers are options.
        rouge: Mean of ROUGE-L recall of what the model says freely.
        truth: Mean of ``max(0, 1 − TR)``.
    """

    probability: float
    rouge: float
    truth: float

    @property
    def parts(self) -> tuple[float, float, float]:
        """All three."""
        return self.probability, self.rouge, self.truth


def utility_of(
    base: Base, questions: Sequence[Question], *, options: bool = False, known: Known | None = None
) -> Utility:
    """Measure one set.

    Args:
        known: What was measured of these questions already.
        options: Take the probability among the answers that are given, as for real authors and world facts.

    Raises:
        EditError: A question has no wrong answers.
    """
    known = known or known_of(base, [(q.question, q.answer) for q in questions])
    right = known.told.probabilities
    if options:
        asked = [(q.question, wrong) for q in questions for wrong in q.perturbed]
        wrong = told_of(base, asked).probabilities.split([len(q.perturbed) for q in questions])
        right = torch.stack([p / (p + others.sum()) for p, others in zip(right, wrong, strict=True)])
    truth = (1 - truth_ratios(base, questions)).clamp(min=0)
    return Utility(float(right.mean()), known.rouge, float(truth.mean()))


def model_utility(parts: Sequence[Utility]) -> float:
    """MU: harmonic mean of all parts of all sets; one zero makes it zero. Say which sets it is of."""
    values = [value for utility in parts for value in utility.parts]
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def said_rate(base: Base, asked: Sequence[tuple[str, str]]) -> float:
    """How often the whole answer is what the model says by itself, word for word (`Known.said`)."""
    return known_of(base, asked).said


def _leaves(n: int, m: int, distance: int) -> float:
    """The chance that a random walk to (n, m) reaches ``|i m − j n| ≥ distance``; small ones keep their digits."""
    left, line = 0.0, [0.0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            rest = n + m - i - j + 1
            chance = 1.0 if i == j == 0 else 0.0
            if i:
                chance += line[j] * (n - i + 1) / rest
            if j:
                chance += line[j - 1] * (m - j + 1) / rest
            if abs(i * m - j * n) >= distance:
                left, chance = left + chance, 0.0
            line[j] = chance
    return min(1.0, left)


def _from_the_end(hits: Sequence[bool]) -> int:
    return next((i for i, hit in enumerate(reversed(hits)) if not hit), len(hits))
