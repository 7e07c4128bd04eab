"""Batches in a seeded order, with a cursor that makes a resume exact.

The order of an epoch is a keyed permutation that is computed, not stored: a Feistel network on the cells of a nearly
square grid that holds all sequences, repeated for the few that land on a spare cell (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import compress

import numpy as np

from potluck.corpus.shards import Shard

_FEISTEL_ROUNDS = 6
_U64 = np.uint64
_HALF = _U64(32)
_MULTIPLIER = _U64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class Batches:
    """Sequences of one participant's tokens.

    Sequence i holds tokens i L to (i + 1) L, both included: L predictions, and the next sequence starts
    with the last target. The ends of the stream that fill no sequence are never drawn.

    Attributes:
        tokens: 1-D integer array, usually memory-mapped.
        sequence_length: L, predictions in a sequence.
        seed: Decides the order; each epoch has another.
    """

    tokens: np.ndarray
    sequence_length: int
    seed: int

    @property
    def sequences(self) -> int:
        """Sequences in one epoch."""
        return (len(self.tokens) - 1) // self.sequence_length

    def draw(self, cursor: int, count: int) -> np.ndarray:
        """The ``count`` sequences after the first ``cursor``, across epochs where need be.

        Args:
            cursor: Sequences drawn so far, since the start of the run.
            count: Sequences to draw.

        Returns:
            int64 of shape (count, sequence_length + 1).
        """
        starts = self._drawn(cursor, count) * self.sequence_length
        drawn: np.ndarray = self.tokens[starts[:, None] + np.arange(self.sequence_length + 1)]
        return drawn.astype(np.int64)

    def _drawn(self, cursor: int, count: int) -> np.ndarray:
        """Numbers of the sequences at positions cursor to cursor + count - 1, int64."""
        n = self.sequences
        if n < 1:
            raise ValueError(f"{len(self.tokens)} tokens hold no sequence of {self.sequence_length} + 1")
        parts = []
        end = cursor + count
        while cursor < end:
            epoch, first = divmod(cursor, n)
            last = min(first + end - cursor, n)
            parts.append(permuted(np.arange(first, last), n, self.seed, epoch))
            cursor += last - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


@dataclass(frozen=True)
class Seat:
    """One of the places of a round that asks a few of many: whoever sits there draws its own batches in its own order.

    The k-th of the rounds that ask a participant draws what its k-th round of a run together does.

    Attributes:
        everybody: All who may be asked.
        rounds: Who is asked in each round, by place.
        place: Which of them this is.
        per_round: Sequences that each of them draws in a round.
    """

    everybody: Mapping[str, Batches]
    rounds: Sequence[Sequence[str]]
    place: int
    per_round: int

    @property
    def sequences(self) -> int:
        """A place's share of all sequences: those of one epoch."""
        return max(1, sum(batches.sequences for batches in self.everybody.values()) // len(self.rounds[0]))

    @cached_property
    def _served(self) -> list[int]:
        """For each round, in how many before it whoever sits here was asked."""
        count: Counter[str] = Counter()
        served = []
        for names in self.rounds:
            served.append(count[names[self.place]])
            count.update(names)
        return served

    def draw(self, cursor: int, count: int) -> np.ndarray:
        """As `Batches.draw`; after the last round the first comes again.

        Args:
            cursor: Sequences drawn at this place so far.
            count: Sequences to draw.
        """
        parts = []
        while count:
            number, first = divmod(cursor, self.per_round)
            again, number = divmod(number, len(self.rounds))
            name, taken = self.rounds[number][self.place], min(count, self.per_round - first)
            before = self._served[number] + again * sum(name in names for names in self.rounds)
            parts.append(self.everybody[name].draw(before * self.per_round + first, taken))
            cursor, count = cursor + taken, count - taken
        return np.concatenate(parts)


def permuted(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images of ``positions`` (in 0 to n - 1) under a permutation of 0 to n - 1 keyed by (seed, epoch), int64."""
    rows = math.isqrt(n - 1) + 1
    grid = _U64(rows), _U64(-(-n // rows))
    images = _feistel(positions.astype(_U64), grid, _keys(seed, epoch))
    while len(outside := np.flatnonzero(images >= n)):
        images[outside] = _feistel(images[outside], grid, _keys(seed, epoch))
    return images.astype(np.int64)


def documents_drawn(shard: Shard, batches: Batches, cursor: int) -> list[str]:
    """Names of the documents of which at least one token is in the first ``cursor`` sequences.

    Args:
        shard: The tokens that ``batches`` draws from.
        batches: The batches.
        cursor: Sequences drawn so far.
    """
    drawn = batches._drawn(0, min(cursor, batches.sequences))  # after one epoch nothing new comes
    first = drawn * batches.sequence_length
    starts = shard.starts
    change = np.zeros(shard.documents + 1, np.int64)  # +1 where a sequence's documents begin, -1 behind them
    np.add.at(change, np.searchsorted(starts, first, side="right") - 1, 1)
    np.add.at(change, np.searchsorted(starts, first + batches.sequence_length, side="right"), -1)
    touched = np.cumsum(change[:-1]) > 0
    with shard.index.open(encoding="utf-8") as lines:
        return [json.loads(line)["name"] for line in compress(lines, touched)]


def _feistel(values: np.ndarray, grid: tuple[np.uint64, np.uint64], keys: np.ndarray) -> np.ndarray:
    """A bijection of a grid's cells: row and column take turns to be shifted by a hash of the other."""
    cell = list(np.divmod(values, grid[1]))
    for number, key in enumerate(keys):
        side = number % 2
        mixed = (cell[1 - side] + key) * _MULTIPLIER
        mixed = (mixed ^ (mixed >> _HALF)) * _MULTIPLIER
        cell[side] = (cell[side] + (mixed >> _HALF)) % grid[side]
    images: np.ndarray = cell[0] * grid[1] + cell[1]
    return images


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> np.ndarray:
    """One 64-bit key for each Feistel round."""
    return np.random.SeedSequence([seed, epoch]).generate_state(_FEISTEL_ROUNDS, np.uint64)
