"""Sums of what participants measured: one object from which many merges and edits are solved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Named tensors that mean something when they are added up, and what they were measured on.

    Attributes:
        kind: What they are, such as ``gram``.
        tensors: From a name to a tensor; those of one kind and base have the same names and shapes everywhere.
        count: Observations in them, such as tokens.
        base_hash: The weights that they were measured with, `potluck.compose.base.Base.content_hash`.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    count: int
    base_hash: str


class SummedStatistics:
    """``name → Σᵢ tensorᵢ`` over participants, streaming; the caller keeps a fixed order, so that runs repeat.

    Floats are summed in float64. int64 stays int64 and wraps around at 2⁶⁴, as masked fixed-point numbers do: what
    comes may be masked, since nothing but a sum is taken. Who leaves is subtracted again.

    Args:
        kind: Of all that is summed.
        base_hash: Of all that is summed: statistics of other weights do not add up to anything.
    """

    def __init__(self, kind: str, base_hash: str) -> None:
        self._kind, self._base_hash = kind, base_hash
        self._totals: dict[str, Tensor] = {}
        self._count = 0
        self.participants = 0

    def accumulate(self, part: Statistics) -> None:
        """Take in one participant's.

        Raises:
            ValueError: Another kind or base, other names, shapes or types than before, or a number is not finite.
        """
        self._check(part)
        if not self._totals:
            self._totals = {name: torch.zeros_like(_summand(tensor)) for name, tensor in part.tensors.items()}
        self._apply(part, 1)

    def remove(self, part: Statistics) -> None:
        """Take out what was added, to rounding (exactly if int64).

        Raises:
            ValueError: As `accumulate`, or nobody is left to be removed.
        """
        self._check(part)
        if not self.participants or part.count > self._count:
            raise ValueError("these statistics were not added")
        self._apply(part, -1)

    def finish(self) -> Statistics:
        """The sums so far; they change with what is added later.

        Raises:
            ValueError: Nobody's statistics are there.
        """
        if not self.participants:
            raise ValueError("the sum of no statistics")
        return Statistics(self._kind, self._totals, self._count, self._base_hash)

    def _apply(self, part: Statistics, sign: int) -> None:
        for name, total in self._totals.items():
            total.add_(_summand(part.tensors[name]), alpha=sign)
        self._count += sign * part.count
        self.participants += sign

    def _check(self, part: Statistics) -> None:
        if (part.kind, part.base_hash) != (self._kind, self._base_hash):
            raise ValueError(
                f"{part.kind} statistics of base {part.base_hash[:12]}, not {self._kind} of {self._base_hash[:12]}"
            )
        if not part.tensors or part.count < 1:
            raise ValueError("statistics of nothing")
        if self._totals and part.tensors.keys() != self._totals.keys():
            name = min(part.tensors.keys() ^ self._totals.keys())
            raise ValueError(f"{name}: not in all statistics")
        for name, tensor in part.tensors.items():
            total = self._totals.get(name)
            if total is not None and (tensor.shape, _summand(tensor).dtype) != (total.shape, total.dtype):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {tuple(total.shape)} as before")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinite values")


def summed(parts: list[Statistics]) -> Statistics:
    """The sum of all, in this order.

    Raises:
        ValueError: They do not belong together, or there are none.
    """
    if not parts:
        raise ValueError("the sum of no statistics")
    total = SummedStatistics(parts[0].kind, parts[0].base_hash)
    for part in parts:
        total.accumulate(part)
    return total.finish()


def _summand(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.int64 else tensor.double()
