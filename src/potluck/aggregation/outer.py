"""The outer step: from the mean of what participants reached to the next shared state.

Every rule sees the shared state ``theta`` and the participants' weighted ``mean``, flat fp32 vectors. The mean is of
parameters, and the pseudo-gradient ``Delta = theta - mean`` is formed here; or, where links have made these of them, of
pseudo-gradients. Positive is descent. A mean of parameters keeps plain averaging exact, which
``theta - (theta - mean)`` would not be. Vectors are walked in cache-sized pieces: one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from potluck.recipe.outer import (
    Adaptive,
    Outer,
    OuterAdagrad,
    OuterAdam,
    OuterNesterov,
    OuterSgd,
    OuterSign,
    OuterYogi,
)

OuterState = dict[str, Tensor]
Mean = Literal["parameters", "pseudo-gradient"]
_PIECE = 1 << 17  # elements: five fp32 pieces of 512 KiB stay in a core's cache


def init_outer(rule: Outer, theta: Tensor) -> OuterState:
    """The state of an outer optimizer before the first step.

    Returns:
        ``momentum`` or ``m`` and ``v``, each like ``theta``; empty for plain averaging.
    """
    if isinstance(rule, OuterNesterov) or (isinstance(rule, OuterSgd) and rule.momentum):
        return {"momentum": torch.zeros_like(theta)}
    if isinstance(rule, Adaptive):
        assert rule.epsilon is not None  # of a complete rule
        return {"m": torch.zeros_like(theta), "v": torch.full_like(theta, rule.epsilon**2)}
    return {}


def outer_step(
    rule: Outer, theta: Tensor, mean: Tensor, state: OuterState, of: Mean = "parameters", rate: float = 1.0
) -> float:
    """Take one outer step in place.

    Args:
        rule: The recipe's ``outer_rule``.
        theta: Shared state, or a fragment of it, fp32 ``(N,)``; becomes the next one.
        mean: Weighted mean of the participants' parameters or pseudo-gradients, fp32 ``(N,)``.
        state: From ``init_outer`` for the same elements; updated in place.
        of: What the mean is of.
        rate: The local schedule's factor, which `OuterSign` follows.

    Returns:
        The norm of the pseudo-gradient.
    """
    squared_norm, scratch = 0.0, torch.empty(_PIECE)
    for piece in _pieces(theta.numel()):
        now, reached, delta = theta[piece], mean[piece], scratch[: mean[piece].numel()]
        if of == "parameters":
            torch.sub(now, reached, out=delta)
        else:
            delta.copy_(reached)
        squared_norm += float(torch.dot(delta, delta))
        if of == "parameters" and isinstance(rule, OuterSgd) and not rule.momentum:
            now.lerp_(reached, rule.learning_rate)  # exact for eta = 1
        else:
            _apply(rule, now, delta, {name: slot[piece] for name, slot in state.items()}, rate)
    return math.sqrt(squared_norm)


def _apply(rule: Outer, theta: Tensor, delta: Tensor, slots: dict[str, Tensor], rate: float) -> None:
    match rule:
        case OuterSgd(learning_rate=eta, momentum=0.0):
            theta.sub_(delta, alpha=eta)
        case OuterSign(learning_rate=eta, weight_decay=decay):
            # theta <- (1 - eta r decay) theta - eta r sign(Delta)
            theta.mul_(1 - eta * rate * decay).sub_(delta.sign_(), alpha=eta * rate)
        case OuterSgd(learning_rate=eta, momentum=mu):
            # b <- mu b + Delta;  theta <- theta - eta b
            b = slots["momentum"].mul_(mu).add_(delta)
            theta.sub_(b, alpha=eta)
        case OuterNesterov(learning_rate=eta, momentum=mu):
            # b <- mu b + Delta;  theta <- theta - eta (Delta + mu b)
            b = slots["momentum"].mul_(mu).add_(delta)
            theta.sub_(delta.add_(b, alpha=mu), alpha=eta)
        case _:
            _adaptive(rule, theta, delta, slots["m"], slots["v"])


def _adaptive(rule: Adaptive, theta: Tensor, delta: Tensor, m: Tensor, v: Tensor) -> None:
    """FedOpt (arXiv 2003.00295, algorithm 2): theta <- theta - eta m / (sqrt(v) + epsilon), v_0 = epsilon^2."""
    assert rule.epsilon is not None and rule.learning_rate is not None  # of a complete rule
    m.mul_(rule.beta1).add_(delta, alpha=1 - rule.beta1)
    match rule:
        case OuterAdam(beta2=beta2):
            v.mul_(beta2).addcmul_(delta, delta, value=1 - beta2)
        case OuterYogi(beta2=beta2):
            # v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)
            square = delta.square_()
            v.sub_(torch.sign(v - square).mul_(square), alpha=1 - beta2)
        case OuterAdagrad():
            v.addcmul_(delta, delta)
    theta.addcdiv_(m, v.sqrt().add_(rule.epsilon), value=-rule.learning_rate)


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))
