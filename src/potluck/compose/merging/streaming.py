"""Tensors that pass through a rule from file to file, a few rows at a time, several tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from potluck.compose.merging.rules import Rule
from potluck.compose.merging.shards import FLOATS, StoredTensor
from potluck.errors import ModelError

_BLOCK = 1 << 18  # entries of each model that are worked on at once


@dataclass(frozen=True)
class Stack:
    """One tensor of all models.

    Attributes:
        models: Where it lies, by the model's folder.
        base: Where the base's lies; without one, task vectors are counted from zero.
        merged: Where the result goes.
    """

    name: str
    models: Mapping[Path, StoredTensor]
    base: StoredTensor | None
    merged: StoredTensor

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, the base's rows ``(rows, columns)``, the task vectors' ``(N, rows, columns)``; all in float32.

        They are valid until the next are asked for.
        """
        rows, columns = self.merged.rows, self.merged.columns
        step = max(1, min(rows, _BLOCK // max(1, columns)))
        origin, deltas = torch.zeros(step, columns), torch.empty(len(self.models), step, columns)
        for first in range(0, rows, step):
            if first + step > rows:
                origin, deltas = origin[: rows - first], deltas[:, : rows - first]
            if self.base is not None:
                self.base.read(first, origin)
            for delta, model in zip(deltas, self.models.values(), strict=True):
                model.read(first, delta).sub_(origin)
            yield first, origin, deltas

    def deltas(self) -> Iterator[Tensor]:
        """The task vectors alone."""
        return (deltas for _, _, deltas in self.blocks())


def merge_all(
    stacks: Sequence[Stack], rule: Rule, weights: Tensor, on_tensor: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Merge every tensor, as many at once as torch has threads.

    Raises:
        ModelError: A value is not finite, or does not fit the type it is stored in.
    """
    with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(partial(merge_one, rule=rule, weights=weights), stacks), 1):
            on_tensor(done, len(stacks))


def merge_one(stack: Stack, rule: Rule, weights: Tensor) -> None:
    """Merge one tensor; what is no weight is copied, if it is the same in all models."""
    if stack.merged.dtype not in FLOATS:
        _copy_equal(stack)
        return
    if not stack.merged.nbytes:
        return
    largest = torch.finfo(FLOATS[stack.merged.dtype]).max
    for tensor in (*stack.models.values(), *([] if stack.base is None else [stack.base])):
        tensor.announce()
    combine = rule.fit(stack.name, weights, stack.deltas)
    for first_row, origin, deltas in stack.blocks():
        _check_finite(stack, deltas)
        merged = combine(deltas, first_row).add_(origin)
        if not merged.abs().max() <= largest:
            hint = "give smaller weights, or a base in another type"
            raise ModelError(f"{stack.name}: what it was merged to does not fit {stack.merged.dtype}", hint)
        stack.merged.write(first_row, merged)


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Within, an operation of torch takes one thread, so that as many can run as it would have taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _check_finite(stack: Stack, deltas: Tensor) -> None:
    """A sum is finite only if all its terms are."""
    sums = deltas.sum(dim=(1, 2))
    if sums.isfinite().all() or deltas.isfinite().all():
        return
    all_wrong = not sums.isfinite().any() and stack.base is not None
    wrong = "the base" if all_wrong else [*stack.models][int((~sums.isfinite()).int().argmax())]
    raise ModelError(f"{wrong}: {stack.name} holds NaN or infinite values", "the folder is damaged or diverged")


def _copy_equal(stack: Stack) -> None:
    begin = 0
    for chunks in zip(*(model.chunks() for model in stack.models.values()), strict=True):
        for folder, chunk in zip(stack.models, chunks, strict=True):
            if not torch.equal(chunk, chunks[0]):
                raise ModelError(f"{folder}: {stack.name} is no weight that could be merged, and differs")
        stack.merged.write_bytes(begin, chunks[0])
        begin += chunks[0].numel()
