"""Who holds which documents, and which of them are held out.

A document is held out by its own hash: u = SHA-256(text)[:8] / 2^64 < validation_fraction. The same text
therefore falls on the same side at every participant, and no participant's held-out text is another's
training text.

Of few documents, or documents longer than a cap, that may leave a side empty. Of such a participant's text the end of
each document is held out, the share validation_fraction of its bytes, and each part is cut to what its cap leaves.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Literal

import numpy as np

from potluck.corpus.reading import LeftOut
from potluck.corpus.sources import Document, documents, fingerprint, place
from potluck.errors import CorpusError
from potluck.recipe import Recipe
from potluck.recipe.sources import Data, Source, Split

Side = Literal["train", "validation"]
SIDES: tuple[Side, Side] = ("train", "validation")
Held = tuple[str, Document]
Stream = Callable[[LeftOut], Iterator[Held]]
_READING = 2  # a number for how files are read and documents held out
_RULE = {"validation_fraction", "train_bytes", "validation_bytes"}


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
    return chain.from_iterable(stream(LeftOut()) for _, _, stream in _streams(recipe))


def kept_documents(
    recipe: Recipe, wanted: Collection[str] | None = None, notes: dict[str, list[str]] | None = None
) -> Iterator[Kept]:
    """What each participant trains on and holds out, after the caps ``train_bytes`` and ``validation_bytes``.

    A whole document that would overflow its side's cap is skipped. A source is left as soon as less than 1%
    of every cap of everyone who holds a part of it is free.

    Args:
        recipe: The recipe.
        wanted: Participants to yield; everyone if left out.
        notes: Takes for each participant what it should be told of its text: sentences.

    Raises:
        CorpusError: A source cannot be read or not be divided so.
    """
    cut = _cut(recipe, wanted)
    for source, holders, stream in _streams(recipe):
        if wanted is not None and not set(holders) & set(wanted):
            continue
        left_out, counts = LeftOut(), Counter[str]()
        for kept in _kept(recipe.data, holders, stream(left_out), cut):
            counts[kept.participant] += kept.side == "train"
            if wanted is None or kept.participant in wanted:
                yield kept
        if notes is not None:
            notes |= {name: _notes(name, source, left_out, counts[name] if name in cut else 0) for name in holders}


def _notes(name: str, source: Source, left_out: LeftOut, cut: int) -> list[str]:
    """What a participant should know; ``cut`` is how many of its documents were held out by their ends."""
    found = [f"{place(source)}: {sentence}" for sentence in left_out.sentences()]
    if cut:
        these = "its one document" if cut == 1 else f"its {cut:,} documents"
        found.append(
            f"{name}: by whole documents, {these} would leave nothing to train on or to hold out: the end of each "
            "is held out"
        )
    return found


def _cut(recipe: Recipe, wanted: Collection[str] | None) -> frozenset[str]:
    """Whose documents are held out by their ends: of whole ones a side would be empty."""
    lacking: set[tuple[str, Side]] = set()
    for _, holders, stream in _streams(recipe):
        if not recipe.data.validation_fraction or (wanted is not None and not set(holders) & set(wanted)):
            continue
        missing = {(name, side) for name in holders for side in SIDES if wanted is None or name in wanted}
        for kept in _kept(recipe.data, holders, stream(LeftOut()), frozenset()):
            missing.discard((kept.participant, kept.side))
            if not missing:
                break
        lacking |= missing
    return frozenset(name for name, _ in lacking)


def _kept(data: Data, holders: tuple[str, ...], stream: Iterator[Held], cut: Collection[str]) -> Iterator[Kept]:
    """One source's documents, whole or in two parts, as far as they fit the caps."""
    caps = {"train": data.train_bytes, "validation": data.validation_bytes}
    free = {(name, side): caps[side] or math.inf for name in holders for side in SIDES}
    filling = set(free)
    for name, document in stream:
        left = {side: free[name, side] for side in SIDES}
        parts = _both_sides if name in cut else _one_side
        for kept in parts(name, document, data.validation_fraction, left):
            free[name, kept.side] -= kept.size
            yield kept
        filling -= {(name, side) for side in SIDES if 100 * free[name, side] < (caps[side] or 0)}
        if not filling:
            break


def _one_side(name: str, document: Document, fraction: float, free: Mapping[Side, float]) -> Iterator[Kept]:
    """A whole document on the side of its hash, if it fits."""
    content = document.text.encode()
    digest = hashlib.sha256(content)
    side = side_of(digest.digest(), fraction)
    if len(content) <= free[side]:
        yield Kept(name, side, document, digest.hexdigest(), len(content))


def _both_sides(name: str, document: Document, fraction: float, free: Mapping[Side, float]) -> Iterator[Kept]:
    """The beginning of a document, and its end held out; each as much as fits, and nothing that is blank."""
    content = document.text.encode()
    at = len(content) - max(1, round(fraction * len(content)))
    while at < len(content) and content[at] & 0xC0 == 0x80:  # within a character
        at += 1
    ranges: tuple[tuple[Side, int, int], ...] = (("train", 0, at), ("validation", at, len(content)))
    for side, begin, end in ranges:
        part = content[begin : min(end, begin + int(min(free[side], end)))].decode(errors="ignore")
        if part and not part.isspace():
            whole = part.encode()
            yield Kept(name, side, replace(document, text=part), hashlib.sha256(whole).hexdigest(), len(whole))


def side_of(text_sha256: bytes, validation_fraction: float) -> Side:
    """Held out if the first 64 bits of the text's hash, as a fraction, lie below ``validation_fraction``."""
    return "validation" if _first64(text_sha256) < validation_fraction * 2**64 else "train"


def text_keys(recipe: Recipe) -> dict[str, str]:
    """For each participant a SHA-256 of all that decides its kept documents and their order.

    Raises:
        CorpusError: A source is missing or unreadable.
    """
    rule = {"reading": _READING, **recipe.data.model_dump(include=_RULE)}
    if recipe.data.split is not None and recipe.data.source is not None:
        shared = [rule, fingerprint(recipe.data.source), recipe.data.split.model_dump(), recipe.seed]
        return {name: digest_of([*shared, name]) for name in recipe.participant_names}
    keys = {}
    for participant in recipe.participants:
        if participant.source is not None:
            with _named(participant.name):
                keys[participant.name] = digest_of([rule, fingerprint(participant.source)])
    return keys


def digest_of(content: object) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _streams(recipe: Recipe) -> Iterator[tuple[Source, tuple[str, ...], Stream]]:
    """Each source, who holds a part of it, and what reads its documents with their holders."""
    data, names = recipe.data, recipe.participant_names
    if data.split is not None and data.source is not None:
        yield data.source, names, partial(_divided, data.source, data.split, names, recipe.seed)
    for participant in recipe.participants:
        if participant.source is not None:
            yield participant.source, (participant.name,), partial(_all_of, participant.name, participant.source)


def _all_of(name: str, source: Source, left_out: LeftOut) -> Iterator[Held]:
    with _named(name):
        for document in documents(source, left_out):
            yield name, document


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say whose text it is that cannot be read."""
    try:
        yield
    except CorpusError as error:
        raise CorpusError(f"participant {name}: {error}", error.hint) from None


def _divided(source: Source, split: Split, names: tuple[str, ...], seed: int, left_out: LeftOut) -> Iterator[Held]:
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
    for index, document in enumerate(documents(source, left_out)):
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
