"""Rows of log-probabilities as tensors that travel: small, bounded, and examined where they arrive."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from potluck.errors import Damaged

_TOO_MUCH = 1.05  # probability of a row in all; halves of floats round


def packed_rows(rows: Tensor, top: int) -> dict[str, Tensor]:
    """Rows as fp16, below each row's largest entry, which travels as fp32.

    Near the largest entry, where decoding decides, fp16 is then finest: the likeliest token stays the likeliest.

    Args:
        rows: Nats, ``(positions, V)``.
        top: Only so many of the likeliest tokens; 0 for all of them.
    """
    peak = rows.max(dim=1).values
    if not 0 < top < rows.shape[1]:
        return {"peak": peak, "below": (rows - peak[:, None]).half()}
    values, places = rows.topk(top, dim=1)
    return {"peak": peak, "below": (values - peak[:, None]).half(), "places": places}


def unpacked_rows(tensors: Mapping[str, Tensor], positions: int, vocabulary: int) -> Tensor:
    """Rows from tensors of unknown origin, nats, fp32 ``(positions, vocabulary)``; -inf for what did not travel.

    Raises:
        Damaged: They are no log-probabilities of so many tokens.
    """
    peak, below, places = tensors.get("peak"), tensors.get("below"), tensors.get("places")
    if peak is None or below is None or peak.dtype != torch.float32 or below.dtype != torch.float16:
        raise Damaged("the answer holds no log-probabilities")
    width = vocabulary if places is None else min(vocabulary, below.shape[-1])
    if peak.shape != (positions,) or below.shape != (positions, width):
        raise Damaged(
            f"log-probabilities of shape {tuple(below.shape)}, expected {(positions, vocabulary)}: "
            "is its vocabulary another?"
        )
    values = below.float() + peak[:, None]
    if not torch.isfinite(peak).all() or torch.isnan(values).any() or bool((below > 0).any()):
        raise Damaged("log-probabilities that are not finite, or above their largest")
    if bool((values.exp().sum(dim=1) > _TOO_MUCH).any()):
        raise Damaged("log-probabilities of more than 1 in all")
    if places is None:
        return values
    if places.dtype != torch.int64 or places.shape != below.shape or not _distinct(places, vocabulary):
        raise Damaged("log-probabilities whose tokens are unknown, or named twice")
    rows = torch.full((positions, vocabulary), -torch.inf)
    return rows.scatter_(1, places, values)


def _distinct(places: Tensor, vocabulary: int) -> bool:
    ordered = places.sort(dim=1).values
    in_range = bool((ordered >= 0).all() and (ordered < vocabulary).all())
    return in_range and not bool((ordered[:, 1:] == ordered[:, :-1]).any())
