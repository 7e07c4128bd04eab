"""The unlearning losses, each a function of what a model foretells; signs, factors and means as in open-unlearning.

``nats`` are summed over a row's answer, ``(B,)``; ``labels`` are -100 where nothing is asked. The total is
``γ forget + α retain``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

Retain = Literal["none", "nll", "kl"]


@dataclass(frozen=True)
class GradientAscent:
    """``−ℓ_F``. GA has no retain term, GradDiff adds ``ℓ_R``, KL adds ``KL(ref ‖ θ)`` on R."""

    gamma: float = 1.0
    alpha: float = 0.0
    retain: Retain = "none"


@dataclass(frozen=True)
class Npo:
    """Negative preference: ``−(2/β) log σ(β (L_θ(F) − L_ref(F)))`` (arXiv 2404.05868)."""

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"


@dataclass(frozen=True)
class SimNpo:
    """NPO by length and without a reference: ``−(2/β) log σ(β (L_θ(F)/|y| − δ))`` (arXiv 2410.07163)."""

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125
    alpha: float = 1.0
    retain: Retain = "nll"


@dataclass(frozen=True)
class IdkDpo:
    """A refusal preferred to the answer: ``−(2/β) log σ(β (r_refusal − r_F))``, ``r = log(π_θ / π_ref)``."""

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"


@dataclass(frozen=True)
class Rmu:
    """Hidden states of F are drawn to one random direction, ``MSE(h, c u)``; those of R stay, ``MSE(h, h_ref)``.

    Attributes:
        layer: After which; of L layers ``layer L // 16 · 7`` is that of the published setting for 16.
        scale: c.
        seed: Of u.
    """

    layer: int = 7
    scale: float = 2.0
    gamma: float = 1.0
    alpha: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class AsStranger:
    """Not an unlearning loss of the literature: ``KL(ref(x') ‖ θ(x))``, x' asked about somebody who does not exist.

    The model learns to say of the subject what it itself would say of a stranger, wherever in it the fact is kept.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"


Method = GradientAscent | Npo | SimNpo | IdkDpo | Rmu | AsStranger

GA = GradientAscent()
GRAD_DIFF = GradientAscent(alpha=1.0, retain="nll")
KL = GradientAscent(alpha=1.0, retain="kl")


def answer_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row's answer, summed, ``(B,)``."""
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """``ℓ``: mean cross-entropy over all answer tokens of a batch."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def npo(nats: Tensor, before: Tensor, beta: float) -> Tensor:
    """NPO's forget term; ``before`` are the nats of the model before unlearning."""
    return -2 / beta * logsigmoid(beta * (nats - before)).mean()


def sim_npo(nats: Tensor, tokens: Tensor, beta: float, delta: float) -> Tensor:
    """SimNPO's forget term; ``tokens`` of each answer."""
    return -2 / beta * logsigmoid(beta * (nats / tokens - delta)).mean()


def idk_dpo(refusal: Tensor, refusal_before: Tensor, nats: Tensor, before: Tensor, beta: float) -> Tensor:
    """IdkDPO's forget term, of nats of refusals and of answers, now and before."""
    return -2 / beta * logsigmoid(beta * ((refusal_before - refusal) - (before - nats))).mean()


def kl_from(before: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """``KL(ref ‖ θ)``, mean over the tokens of a batch that are no padding; logits ``(B, T, V)``, mask ``(B, T)``."""
    old, new = log_softmax(before, -1), log_softmax(logits, -1)
    counted = mask.bool()
    return (old.exp() * (old - new)).sum(-1)[counted].mean()


def kl_at(before: Tensor, before_labels: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """``KL(ref ‖ θ)``, mean over answer tokens, of two batches with the same answers after different questions."""
    old, new = log_softmax(before[before_labels != -100], -1), log_softmax(logits[labels != -100], -1)
    return (old.exp() * (old - new)).sum(-1).mean()


def rmu_forget(hidden: Tensor, direction: Tensor, scale: float, labels: Tensor) -> Tensor:
    """``MSE(h, c u)``, mean over the tokens from which the answer is foretold; h ``(B, T, d)``, u ``(d,)``."""
    return (hidden - scale * direction).square().mean(-1)[labels != -100].mean()


def rmu_retain(hidden: Tensor, before: Tensor, labels: Tensor) -> Tensor:
    """``MSE(h, h_ref)`` over the same tokens of retained rows."""
    return (hidden - before).square().mean(-1)[labels != -100].mean()


def rmu_direction(width: int, seed: int) -> Tensor:
    """``u``: uniform in [0, 1) in every coordinate, of norm 1."""
    drawn: Tensor = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    direction: Tensor = drawn / drawn.norm()
    return direction
