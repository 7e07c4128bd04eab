"""Taking out all that a participant gave: its expert, its adapter, or its part of a sum. Nothing is approximated.

What is left is as if the participant had never been there; a sum of floats to rounding, all else bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.aggregation.statistics import Statistics, SummedStatistics
from potluck.compose.base import load_base
from potluck.compose.experts import requests
from potluck.compose.library.entries import Library, open_library, remove_entry
from potluck.errors import EditError


@dataclass(frozen=True)
class Removal:
    """What became of what.

    Attributes:
        kind: ``expert``, ``adapter`` or ``statistics``.
        name: Whose it was.
        before, after: SHA-256 of the model's weights, the library's cards or the sum.
    """

    kind: str
    name: str
    before: str
    after: str


def remove_expert(
    model: Path, name: str, out: Path, public: Path | None = None, *, untuned: bool = False, device: str = "auto"
) -> Removal:
    """Write a mixture as if this expert had never been in it (`potluck.compose.experts.requests.remove`).

    Raises:
        ModelError: There is no such expert, or the folder is no mixture.
        RecipeError: The router was tuned, and neither ``public`` nor ``untuned`` is given.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    before = load_base(model).content_hash
    requests.remove(model, name, out, public, untuned=untuned, device=device)
    return Removal("expert", name, before, load_base(out).content_hash)


def remove_adapter(library: str, name: str, registry: str = "") -> Removal:
    """Take an adapter out of a library, in place.

    Raises:
        StorageError: There is no such entry, or the library cannot be written.
    """
    with closing(open_library(library, registry)) as opened:
        before = _cards_hash(opened)
        remove_entry(opened, name)
        return Removal("adapter", name, before, _cards_hash(opened))


def remove_statistics(total: SummedStatistics, part: Statistics, name: str) -> Removal:
    """Subtract one participant's statistics from a sum, in place; edits and merges are then solved again from it.

    Raises:
        EditError: They were never added, or nobody else's are left.
    """
    if total.participants < 2:
        raise EditError(f"the statistics of {name} cannot be taken out: nobody else's are in the sum")
    try:
        before = statistics_hash(total.finish())
        total.remove(part)
        return Removal("statistics", name, before, statistics_hash(total.finish()))
    except ValueError as error:
        raise EditError(f"the statistics of {name} cannot be taken out: {error}") from None


def statistics_hash(statistics: Statistics) -> str:
    """SHA-256 over kind, base, count and every tensor by name."""
    digest = hashlib.sha256(f"{statistics.kind} {statistics.base_hash} {statistics.count}\n".encode())
    for name, tensor in sorted(statistics.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()


def _cards_hash(library: Library) -> str:
    cards: Sequence[str] = [card.model_dump_json() for card in library.cards()]
    return hashlib.sha256("\n".join(cards).encode()).hexdigest()
