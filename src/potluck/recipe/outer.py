"""The part of a recipe that says how the shared state steps, and what follows for it from the local steps.

Adaptive rules divide a pseudo-gradient by its usual size, so that their learning rate is the size of a step: it has to
fit that of the pseudo-gradients, as the defaults of FedOpt's tasks do not. H local steps of AdamW at rate r move an
entry by about ``s = r sqrt(H)``: measured, 0.4 s at H = 10 and 0.6 s at H = 50 half way through a cosine, up to 1.6 s
before. With ``tau = s`` and ``eta = 2 tau`` the first step is that of a plain mean times ``1 - beta1``, since v begins
at tau^2, and rounds turn it adaptive. Of SGD no size is known; there tau is 0.005.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from potluck.files import page
from potluck.recipe.local import AdamW, LocalOptimizer, LocalSgd, Muon
from potluck.recipe.table import Table, setting


class OuterSgd(Table):
    """theta <- theta - eta b, b <- mu b + Delta; eta 1 and mu 0 is FedAvg (arXiv 1602.05629)."""

    kind: Literal["sgd"] = setting("sgd", "SGD; with the defaults the plain mean (FedAvg).")
    learning_rate: float = setting(1.0, "Outer learning rate (eta).", gt=0)
    momentum: float = setting(0.0, "Heavy-ball momentum (mu).", unit="per round", ge=0, lt=1)


class OuterNesterov(Table):
    """theta <- theta - eta (Delta + mu b), b <- mu b + Delta: DiLoCo (arXiv 2311.08105)."""

    kind: Literal["nesterov"] = setting("nesterov", "Nesterov momentum (DiLoCo).")
    learning_rate: float = setting(0.7, "Outer learning rate (eta).", gt=0)
    momentum: float = setting(0.9, "Momentum (mu).", unit="per round", ge=0, lt=1)


class OuterAdam(Table):
    """FedAdam (arXiv 2003.00295): theta <- theta - eta m / (sqrt(v) + tau), v_0 = tau^2, without bias correction."""

    kind: Literal["adam"] = setting("adam", "FedAdam.")
    learning_rate: float | None = setting(None, "Outer learning rate (eta); 2 tau if left out.", gt=0)
    beta1: float = setting(0.5, "Decay of the first moment (the paper's is 0.9).", unit="per round", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay of the second moment.", unit="per round", ge=0, lt=1)
    epsilon: float | None = setting(
        None,
        "Bounds the adaptivity (tau in the paper); if left out, the local steps' learning rate times the root of their "
        "number H, with local SGD 0.005.",
        gt=0,
    )


class OuterYogi(Table):
    """FedYogi (arXiv 2003.00295)."""

    kind: Literal["yogi"] = setting("yogi", "FedYogi.")
    learning_rate: float | None = setting(None, "Outer learning rate (eta); 2 tau if left out.", gt=0)
    beta1: float = setting(0.5, "Decay of the first moment (the paper's is 0.9).", unit="per round", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay of the second moment.", unit="per round", ge=0, lt=1)
    epsilon: float | None = setting(
        None,
        "Bounds the adaptivity (tau in the paper); if left out, the local steps' learning rate times the root of their "
        "number H, with local SGD 0.005.",
        gt=0,
    )


class OuterAdagrad(Table):
    """FedAdagrad (arXiv 2003.00295)."""

    kind: Literal["adagrad"] = setting("adagrad", "FedAdagrad.")
    learning_rate: float | None = setting(None, "Outer learning rate (eta); 2 tau if left out.", gt=0)
    beta1: float = setting(0.0, "Decay of the first moment.", unit="per round", ge=0, lt=1)
    epsilon: float | None = setting(
        None,
        "Bounds the adaptivity (tau in the paper); if left out, 3 times what Adam's is.",
        gt=0,
    )


class OuterSign(Table):
    """theta <- theta - eta r sign(Delta), with r the local schedule's factor: signum (DeMo, arXiv 2411.19870)."""

    kind: Literal["sign"] = setting("sign", "Steps of one size along the sign of the pseudo-gradient (DeMo).")
    learning_rate: float = setting(1e-3, "Peak step (eta); it follows `local.schedule`.", gt=0)
    weight_decay: float = setting(0.0, "Decoupled decay: theta <- (1 - eta r decay) theta before each step.", ge=0)


Outer = Annotated[
    OuterSgd | OuterNesterov | OuterAdam | OuterYogi | OuterAdagrad | OuterSign, Field(discriminator="kind")
]

Adaptive = OuterAdam | OuterYogi | OuterAdagrad
_ADAGRAD_TAU = 3  # times s: its v only grows
_SGD_TAU = (
    5e-3  # where it is too large, the rule is nearly a plain mean; where it is too small, steps are bounded by eta
)
_TOO_LARGE = 4  # times s, as a learning rate


def complete(outer: Outer, optimizer: LocalOptimizer, steps: int) -> Outer:
    """An outer rule without a gap.

    Args:
        optimizer: Of the local steps.
        steps: Local steps between two exchanges of the same parameters, H.
    """
    if not isinstance(outer, Adaptive):
        return outer
    scale = step_size(optimizer, steps) or _SGD_TAU
    tau = outer.epsilon or scale * (_ADAGRAD_TAU if isinstance(outer, OuterAdagrad) else 1)
    return outer.model_copy(update={"epsilon": tau, "learning_rate": outer.learning_rate or 2 * tau})


def step_size(optimizer: LocalOptimizer, steps: int) -> float | None:
    """What H local steps move an entry by, about: ``r sqrt(H)``; of SGD, which knows no size, nothing is known."""
    match optimizer:
        case AdamW(learning_rate=rate) | Muon(adamw_learning_rate=rate):
            return rate * math.sqrt(steps)
        case LocalSgd():
            return None


def outer_warnings(outer: Outer, optimizer: LocalOptimizer, steps: int, rounds: int) -> Iterator[str]:
    """What is known to go wrong.

    Args:
        steps: Local steps between two exchanges of the same parameters, H.
        rounds: Outer steps of each parameter.
    """
    if isinstance(outer, OuterNesterov) and outer.momentum >= 0.9 and rounds < 100:
        yield (
            f"outer.momentum {outer.momentum} over {rounds} outer steps: over 6 to 100 it did worse than plain "
            f'averaging, outer.kind = "sgd" (measured on a small model: {page("log.md")})'
        )
    if isinstance(outer, OuterAdam | OuterYogi) and outer.beta1 >= 0.9 and rounds < 100:
        yield f"outer.beta1 {outer.beta1} over {rounds} outer steps: over 6 to 100, 0.5 did better ({page('log.md')})"
    scale, rate = step_size(optimizer, steps), getattr(outer, "learning_rate", None)
    if isinstance(outer, Adaptive) and scale and rate and rate > _TOO_LARGE * scale:
        yield (
            f"outer.learning_rate {rate:g}: {outer.kind} takes steps of this size in every entry, a round's local "
            f"steps one of about {scale:.2g}; above some {_TOO_LARGE} times that it was measured to go wrong: "
            "leave it out"
        )
