"""A matrix that is only ever seen in row blocks, as a product of a given rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from potluck.compose.adapter import Factors
from potluck.compose.low_rank import truncated

_OVERSAMPLE = 8
_POWER = 2
_BLOCK = 1 << 22  # float32 entries of all participants' rows that are formed at once: 16 MiB
_HELD = 1 << 26  # float32 entries of a matrix that is kept, so that it is formed once: 256 MiB


def sketched(blocks: Callable[[], Iterable[Tensor]], form: tuple[int, int], rank: int, seed: int = 0) -> Factors:
    """A nearly best approximation of rank k by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4).

    ``V ← orth(MᵀM V)`` twice from a Gaussian V of k + 8 columns, then the best of rank k within its span,
    ``M ≈ (M V) Vᵀ``. A large M is formed three times and never whole: ``MᵀM V = Σ_b M_bᵀ (M_b V)``.

    Args:
        blocks: Row blocks M_b, ``(rows, columns)`` float32, from the first row to the last, each time it is called.
        form: Rows and columns of M.
    """
    rows, columns = form
    if rows * columns <= _HELD:
        whole = torch.cat(list(blocks()))
        blocks = lambda: (whole,)  # noqa: E731
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, min(rank + _OVERSAMPLE, columns), generator=draw)
    for _ in range(_POWER):
        images = (block.T @ (block @ basis) for block in blocks())
        basis = torch.linalg.qr(sum(images, torch.zeros(()))).Q
    return truncated(Factors(basis.T, torch.cat([block @ basis for block in blocks()])), rank)


def rows_at_once(parts: Sequence[Factors]) -> Iterator[slice]:
    """Which rows of the participants' products are formed together, so that memory is bounded for any shape."""
    rows, columns = parts[0].up.shape[0], parts[0].down.shape[1]
    at_once = max(1, _BLOCK // (len(parts) * columns))
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def products(parts: Sequence[Factors]) -> Iterator[Tensor]:
    """Row blocks of all participants' products, stacked: ``(N, rows, d_in)``."""
    for rows in rows_at_once(parts):
        yield torch.stack([part.up[rows] @ part.down for part in parts])
