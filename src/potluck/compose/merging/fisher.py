"""Fisher merging (Matena and Raffel, arXiv 2111.09832): a mean in which each entry counts as much as it matters.

``W = Σ wᵢ Fᵢ ∘ Wᵢ / Σ wᵢ Fᵢ`` with ``F = E[(∂ log p / ∂W)²]``, the diagonal of participant i's Fisher information. Of a
linear map ``y = W x`` with ``g = ∂ log p / ∂y`` it is ``E[g_o² x_j²]``. We keep the diagonal of the K-FAC approximation
(Martens and Grosse, arXiv 1503.05671), ``E[g_o²] E[x_j²]``: a row and a column in place of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.adapter import Factors
from potluck.compose.merging.sketch import rows_at_once
from potluck.errors import RecipeError


@dataclass(frozen=True)
class Fisher:
    """Needs every participant's Fisher information.

    Attributes:
        floor: Share of its mean that is added to every F: where nobody's matters, the result is the mean.
        alike: Every participant's F is scaled to a mean of 1, map by map, so that where its entries lie counts and
            not how large they are: a model that is far from its optimum would have the most say.
    """

    floor: float = 1e-6
    alike: bool = True

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise RecipeError(f"floor {self.floor:g}: must not be negative")


@dataclass(frozen=True)
class Information:
    """One linear map's diagonal Fisher information, ``F ≈ rows columnsᵀ``.

    Attributes:
        rows: ``E[g²]``, ``(d_out,)``.
        columns: ``E[x²]``, ``(d_in,)``.
    """

    rows: Tensor
    columns: Tensor

    def of(self, rows: slice, method: Fisher) -> Tensor:
        """Some rows of F, scaled and with its floor: ``(rows, d_in)``; zero if all of it is."""
        mean = self.rows.mean() * self.columns.mean()
        scale = 1.0 / mean if method.alike and mean > 0 else 1.0
        return scale * (self.rows[rows, None] * self.columns + method.floor * mean)


def fisher_mean(
    parts: Sequence[Factors], information: Sequence[Information], weights: Sequence[float], method: Fisher
) -> Iterator[Tensor]:
    """Row blocks of one linear map's merged addition, float32 ``(rows, d_in)``; the mean if all information is zero."""
    if not any(bool((known.rows.mean() * known.columns.mean()) > 0) for known in information):
        information = [Information(torch.ones_like(k.rows), torch.ones_like(k.columns)) for k in information]
    for rows in rows_at_once(parts):
        weighted = total = torch.zeros((), dtype=torch.float64)
        for part, known, weight in zip(parts, information, weights, strict=True):
            precision = weight * known.of(rows, method)
            weighted = weighted + precision * (part.up[rows] @ part.down)
            total = total + precision
        yield solved(total, weighted).float()


def solved(total: Tensor, weighted: Tensor) -> Tensor:
    """``Σ wᵢ Fᵢ ∘ Wᵢ / Σ wᵢ Fᵢ``, zero where nobody's matters at all."""
    return torch.where(total > 0, weighted / total, 0.0)
