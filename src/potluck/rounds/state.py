"""What all participants share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from potluck.aggregation.outer import OuterState


@dataclass
class SharedState:
    """The shared parameters and the outer optimizer behind them.

    Attributes:
        theta: Flat fp32 parameters, shape ``(N,)``, in the coordinator's memory.
        outer: The outer optimizer's vectors.
        revision: Outer steps taken.
        total_tokens: Tokens of all contributions so far.
    """

    theta: Tensor
    outer: OuterState
    revision: int = 0
    total_tokens: int = 0
