"""Who holds which documents, and which of them are held out.

A document is held out by its own hash: u = SHA-256(text)[:8] / 2^64 < validation_fraction. The same text
therefore falls on the same side at every participant, and no participant's held-out text is another's
training text.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np

from potluck.corpus.sources import Document, documents, fingerprint, place
from potluck.errors import CorpusError
from potluck.recipe import Recipe
from potluck.recipe.sources import Source, Split

Side = Literal["train", "validation"]
SIDES: tuple[Side, Side] = ("train", "validation")
Held = tuple[str, Document]


@dataclass(frozen=True, slots=True)
class Kept:
    """A document as one participant uses it; ``size`` is its length in UTF-8 bytes."""

    participant: str
    side: Side
    document: Document
    sha256: str
    size: int


def held_documents(recipe: Recipe) -> Iterator[Held]:
    """Participant and document, one pass over each source; a document of a split has one holder.

    Raises:
        CorpusError: A source cannot be read or not be divided so.
    """
    return chain.from_iterable(stream for _, stream in _streams(recipe))


def kept_documents(recipe: Recipe, wanted: Collection[str] | None = None) -> Iterator[Kept]:
    """What each participant trains on and holds out, after the caps ``train_bytes`` and ``validation_bytes``.

    A document that would overflow its side's cap is skipped. A source is left as soon as less than 1%
    of every cap of everyone who holds a part of it is free.

    Args:
        recipe: The recipe.
        wanted: Participants to yield; everyone if left out.

    Raises:
        CorpusError: A source cannot be read or not be divided so.
    """
    caps = {"train": recipe.data.train_bytes, "validation": recipe.data.validation_bytes}
    for holders, stream in _streams(recipe):
        if wanted is not None and not set(holders) & set(wanted):
            continue
        free = {(name, side): caps[side] or math.inf for name in holders for side in SIDES}
        filling = set(free)
        for name, document in stream:
            content = document.text.encode()
            digest = hashlib.sha256(content)
            side = side_of(digest.digest(), recipe.data.validation_fraction)
            if len(content) > free[name, side]:
                continue
            free[name, side] -= len(content)
            if wanted is None or name in wanted:
                yield Kept(name, side, document, digest.hexdigest(), len(content))
            if 100 * free[name, side] < (caps[side] or 0):
                filling.discard((name, side))
                if not filling:
                    break


def side_of(text_sha256: bytes, validation_fraction: float) -> Side:
    """Held out if the first 64 bits of the text's hash, as a fraction, lie below ``validation_fraction``."""
    return "validation" if _first64(text_sha256) < validation_fraction * 2**64 else "train"


def text_keys(recipe: Recipe) -> dict[str, str]:
    """For each participant a SHA-256 of all that decides its kept documents and their order.

    Raises:
        CorpusError: A source is missing or unreadable.
    """
    rule = recipe.data.model_dump(include={"validation_fraction", "train_bytes", "validation_bytes"})
    if recipe.data.split is not None and recipe.data.source is not None:
        shared = [rule, fingerprint(recipe.data.source), recipe.data.split.model_dump(), recipe.seed]
        return {name: digest_of([*shared, name]) for name in recipe.participant_names}
    return {p.name: digest_of([rule, fingerprint(p.source)]) for p in recipe.participants if p.source is not None}


def digest_of(content: object) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _streams(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], Iterator[Held]]]:
    """Each source: who holds a part of it, and its documents with their holders."""
    data = recipe.data
    if data.split is not None and data.source is not None:
        yield recipe.participant_names, _divided(data.source, data.split, recipe.participant_names, recipe.seed)
    for participant in recipe.participants:
        if participant.source is not None:
            yield (participant.name,), _all_of(participant.name, participant.source)


def _all_of(name: str, source: Source) -> Iterator[Held]:
    for document in documents(source):
        yield name, document


def _divided(source: Source, split: Split, names: tuple[str, ...], seed: int) -> Iterator[Held]:
    """One source among all; ``contiguous`` and ``groups`` first read it once to measure it."""
    match split.how:
        case "iid":
            holder = _iid(len(names), seed)
        case "contiguous":
            holder = _contiguous(source, len(names))
        case "groups":
            holder = _by_group(source, len(names))
        case "dirichlet":
            holder = _dirichlet(len(names), split.alpha or 1.0, seed)
    for index, document in enumerate(documents(source)):
        yield names[holder(index, document)], document


# A holder is the number of a participant, from a document's index and the document.
Holder = Callable[[int, Document], int]


def _iid(participants: int, seed: int) -> Holder:
    return lambda index, document: _hash64(seed, index) * participants >> 64


def _contiguous(source: Source, participants: int) -> Holder:
    """Equal stretches by bytes: a document belongs to the stretch that its middle falls into."""
    total = sum(_size(document) for document in documents(source))
    before = 0

    def holder(index: int, document: Document) -> int:
        nonlocal before
        middle2, before = 2 * before + _size(document), before + _size(document)
        return middle2 * participants // (2 * total)

    return holder


def _by_group(source: Source, participants: int) -> Holder:
    """Whole groups, the largest first, each to whoever has the fewest bytes so far."""
    sizes: Counter[str] = Counter()
    for document in documents(source):
        sizes[document.group] += _size(document)
    if len(sizes) < participants:
        raise CorpusError(
            f"{place(source)}: {len(sizes)} groups cannot be divided among {participants} participants",
            "choose fewer participants or another split; a JSONL file or dataset needs `group_field`",
        )
    loads = [(0, participant) for participant in range(participants)]
    owner: dict[str, int] = {}
    for group, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, participant = loads[0]
        owner[group] = participant
        heapq.heapreplace(loads, (load + size, participant))
    return lambda index, document: owner[document.group]


def _dirichlet(participants: int, alpha: float, seed: int) -> Holder:
    """Each group is spread by its own draw p ~ Dirichlet(alpha, ..., alpha) (Hsu et al., arXiv 1909.06335)."""

    @lru_cache(maxsize=256)  # drawn again from the seed when forgotten
    def bounds(group: str) -> np.ndarray:
        generator = np.random.default_rng([seed, _hash64("group", group)])
        return np.cumsum(generator.dirichlet(np.full(participants, alpha)))

    def holder(index: int, document: Document) -> int:
        uniform = _hash64(seed, index) / 2**64
        return min(int(np.searchsorted(bounds(document.group), uniform, side="right")), participants - 1)

    return holder


def _size(document: Document) -> int:
    return len(document.text.encode())


def _hash64(*parts: int | str) -> int:
    return _first64(bytes.fromhex(digest_of(parts)))


def _first64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
