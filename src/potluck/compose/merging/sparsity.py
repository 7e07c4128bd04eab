"""Which entries of task vectors stay: the largest, exactly and without sorting, or some drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Blocks = Callable[[], Iterable[Tensor]]  # of one tensor, from the first row to the last, each time it is called


def trim_(block: Tensor, thresholds: Tensor) -> Tensor:
    """Set entries below their model's threshold to zero, in place."""
    below = torch.nextafter(thresholds, torch.tensor(-1.0)).clamp(min=0)
    for task, most in zip(block, below.tolist(), strict=True):
        torch.hardshrink(task, most, out=task)
    return block


def dropped(block: Tensor, keep: Tensor | float, uniform: Tensor) -> Tensor:
    """Entries stay with probability ``keep`` and are divided by it: ``m τ / p``, whose mean is τ."""
    return block * (uniform < keep) / keep


def uniform(seed: int, name: str, shape: torch.Size, first_row: int) -> Tensor:
    """Numbers from [0, 1), ``(N, rows, columns)``, that depend on an entry's place and not on the block it is in.

    Philox counts: a row of ``columns`` entries takes the same counters whoever asks for it. A counter yields eight
    numbers of 32 bits, of which 24 are used.
    """
    count, rows, columns = shape
    counters = -(-columns // 8)  # of a row
    drawn = np.empty((count, rows, 8 * counters), dtype=np.float32)
    for model in range(count):
        key = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()[:16]
        philox = np.random.Philox(key=int.from_bytes(key, "little")).advance(first_row * counters)
        bits = philox.random_raw(4 * rows * counters).view(np.uint32).reshape(rows, -1)
        np.multiply(bits >> 8, np.float32(2**-24), out=drawn[model], casting="unsafe")
    return torch.from_numpy(drawn)[:, :, :columns]


def magnitude_ranks(block: Tensor) -> Tensor:
    """Rank by magnitude within each row, from 0 to 1; a row of one entry has rank one half."""
    columns = block.shape[-1]
    if columns == 1:
        return torch.full_like(block, 0.5)
    order = block.abs().argsort(dim=-1, stable=True)
    ranks = torch.linspace(0, 1, columns).expand_as(block)
    return torch.empty_like(block).scatter_(-1, order, ranks)


def magnitude_thresholds(blocks: Blocks, density: float, nonzero: bool = False) -> Tensor:
    """For each model the k-th largest magnitude of a tensor's entries, ``k = round(density · n)``, at least 1: exact.

    Bits of ``|x|`` in float32 sort as the numbers do. One pass counts entries by their upper 16 bits, a second one
    those that share the k-th's upper bits by their lower 16.

    Args:
        blocks: ``(N, rows, columns)`` each, float32, finite.
        nonzero: n leaves out what is zero (or below 1e-40).

    Returns:
        ``(N,)``, float32; zeros if the density is 1.
    """
    if density >= 1:
        return torch.zeros(next(iter(blocks())).shape[0])
    upper = sum(map(_upper_counts, blocks()), torch.zeros((), dtype=torch.int64))
    totals = upper[:, 1:].sum(1) if nonzero else upper.sum(1)
    kth = [_from_top(counts, max(1, round(density * n))) for counts, n in zip(upper, totals.tolist(), strict=True)]
    lower = torch.zeros(len(kth), 1 << 16, dtype=torch.int32)
    for block in blocks():
        for counts, task, (high, _) in zip(lower, block, kth, strict=True):
            beyond = _magnitude_bits(task).numpy().view(np.uint32) - np.uint32(high << 16)  # what lies below wraps
            near = torch.from_numpy(beyond[beyond < 1 << 16].view(np.int32))
            counts.index_add_(0, near, torch.ones_like(near))
    found = [high << 16 | _from_top(counts, left)[0] for counts, (high, left) in zip(lower, kth, strict=True)]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32)


def _magnitude_bits(task: Tensor) -> Tensor:
    return task.abs().view(torch.int32)


def _upper_counts(block: Tensor) -> Tensor:
    """How often each value of the upper bits occurs, ``(N, 2^15)``."""
    bits = (_magnitude_bits(task).flatten() for task in block)
    return torch.stack([torch.bincount(b >> 16, minlength=1 << 15) for b in bits])


def _from_top(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and which from the top it is within that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    bin_ = len(counts) - 1 - place
    return bin_, k - int(from_top[place] - counts[bin_])
