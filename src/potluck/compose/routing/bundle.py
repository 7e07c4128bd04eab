"""Several adapters on one linear map, each token with shares of its own: ``y = Σ_e g_e B_e A_e x``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from potluck.compose.adapter import Adapter, Factors

_MANY_TOKENS = 128  # from here on, and with this many adapters for each chosen one, sorting tokens is faster
_FEW_CHOSEN = 8
_LARGE = 1 << 18  # numbers


class Bundle(nn.Module):
    """The factors of N adapters, of whatever ranks, side by side: ``[A_1; …; A_N]`` and ``[B_1 … B_N]``.

    Two forms compute the same. `every` takes all adapters in two products, with shares of zero. `chosen` takes the k
    chosen ones alone, one after the other: N / k times less arithmetic, in many small steps.
    """

    down: Tensor  # (Σ r_e, d_in)
    up: Tensor  # (Σ r_e, d_out): an adapter's rows lie together
    owner: Tensor  # (Σ r_e,): whose each rank is

    def __init__(self, parts: Sequence[Factors]) -> None:
        super().__init__()
        ends = list(accumulate(part.rank for part in parts))
        self.rows = [slice(end - part.rank, end) for part, end in zip(parts, ends, strict=True)]
        owner = torch.cat([torch.full((part.rank,), number) for number, part in enumerate(parts)])
        self.register_buffer("down", torch.cat([part.down for part in parts]), persistent=False)
        self.register_buffer("up", torch.cat([part.up.T for part in parts]), persistent=False)
        self.register_buffer("owner", owner, persistent=False)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Shape ``(t, d_in)`` to ``(t, d_out)``, in the form that is the faster one.

        Measured on CPU cores, d 256 to 4096, N 16 and 64, k 4: for one token `chosen` is faster where the factors are
        more than 1 MiB; for several, moving them about costs more than it saves, until there are about 128 tokens and
        8 adapters for each chosen one. On a GPU `chosen` would wait until the choice is known on the CPU, so few
        tokens are better taken with every adapter.

        Args:
            chosen: Numbers of the adapters, ``(t, k)``.
            shares: g, ``(t, k)``.
        """
        tokens, k = chosen.shape
        one = tokens == 1 and x.device.type == "cpu" and self.down.numel() + self.up.numel() > _LARGE
        many = tokens >= _MANY_TOKENS and len(self.rows) >= _FEW_CHOSEN * k
        if one or many:
            return self.chosen(x, chosen, shares)
        return self.every(x, shares.new_zeros(tokens, len(self.rows)).scatter(1, chosen, shares))

    def every(self, x: Tensor, shares: Tensor) -> Tensor:
        """All adapters.

        Args:
            x: Shape ``(…, d_in)``.
            shares: ``(…, N)``, zero for those not chosen.
        """
        return (linear(x, self.down) * shares.index_select(-1, self.owner)) @ self.up

    def chosen(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Each adapter with the tokens that chose it."""
        if len(x) == 1:
            total = x.new_zeros(1, self.up.shape[1])
            for e, share in zip(chosen[0].tolist(), shares[0].tolist(), strict=True):
                total = torch.addmm(total, linear(x, self.down[self.rows[e]]), self.up[self.rows[e]], alpha=share)
            return total
        order = chosen.flatten().argsort()
        counts = chosen.flatten().bincount(minlength=len(self.rows)).tolist()
        token = order // chosen.shape[1]
        taken = (shares.flatten()[order, None] * x[token]).split(counts)
        parts = [linear(mine, self.down[rows]) @ self.up[rows] for mine, rows in zip(taken, self.rows, strict=True)]
        found = torch.cat(parts)
        return found.new_zeros(len(x), found.shape[1]).index_add_(0, token, found)


def by_module(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Factors]]:
    """From a linear map's place to the factors of those adapters that add something there, by name."""
    found: dict[str, dict[str, Factors]] = {}
    for name, adapter in adapters.items():
        for path, factors in adapter.modules.items():
            if factors.rank:
                found.setdefault(path, {})[name] = factors
    return found
