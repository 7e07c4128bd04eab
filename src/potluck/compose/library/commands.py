"""What ``potluck library`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from potluck.compose.adapter import Adapter, load_adapter, save_adapter
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.compose.effect import Effect, compared, losses, stretch, stretches, warnings_of
from potluck.compose.fit import adds_something, check_adapter
from potluck.compose.library.cards import SPECIFICATION_FILE, card_of
from potluck.compose.library.clustering import cluster_adapters
from potluck.compose.library.entries import (
    Library,
    adapter_of,
    add_entry,
    fetch_entry,
    open_library,
    profile_of,
    remove_entry,
)
from potluck.compose.library.search import closeness, index_of, mixture, nearest, verdict
from potluck.compose.library.specification import POINTS, specification_of
from potluck.compose.lora import attached
from potluck.compose.merging.adapters import ADAPTER_METHODS, merge_adapters
from potluck.compose.merging.request import chosen
from potluck.compose.routing.arrow import Arrow, arrow, mean_shares
from potluck.compose.routing.evidence import Evidence, by_evidence, profile_bytes, token_profile
from potluck.compose.training import loss_on
from potluck.errors import RecipeError, StorageError
from potluck.files import appearing

_SEQUENCE = 128  # tokens predicted at a time where a loss is measured
_TOP_K = 4

Progress = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A library, and its registry if that lies elsewhere."""

    library: str
    registry: str = ""


@dataclass(frozen=True)
class Offer:
    """What is put into a library.

    Attributes:
        adapter: A PEFT folder.
        data: The text it was trained on; only the specification of it leaves this machine.
        points: Of the specification, at most.
        noise: Added to each coordinate of the specification's points.
        public: Public text, the same for everybody: a profile of ``data`` against it goes into the library, too.
        replace: Take the place of another entry of this name.
    """

    adapter: Path
    base: Path
    data: Path
    name: str = ""
    who: str = ""
    licence: str = ""
    points: int = POINTS
    noise: float = 0.0
    public: Path | None = None
    replace: bool = False


def add(place: Place, offer: Offer, progress: Progress) -> Result:
    """Put an adapter into a library, which begins with the first.

    Raises:
        ModelError: The adapter cannot be used, or it or the base does not fit the library.
        CorpusError: The text is too short.
        StorageError: There is another entry of this name, or the library cannot be written.
    """
    adapter = load_adapter(offer.adapter)
    base = load_base(offer.base)
    warnings = check_adapter(base, adapter, str(offer.adapter))  # before slow work
    stream = _stream(base, offer.data)
    progress("opening the library")
    with closing(open_library(place.library, place.registry, begun_with=base, say=progress)) as library:
        progress("reading the text")
        states = library.yardstick.measure(base, stream)
        progress("measuring the text with the adapter and without")
        effect = _effect(base, adapter, stream)
        specification = specification_of(states, library.yardstick, points=offer.points, noise=offer.noise)
        name = offer.name or offer.adapter.resolve().name
        profile = None
        if offer.public is not None:
            public = _stream(base, offer.public)
            profile = profile_bytes(token_profile(stream, public, base.model.config.vocab_size))
        gain = round(-effect.change, 4)
        card, contents = card_of(name, offer.adapter, base, specification, offer.who, offer.licence, profile, gain)
        outcome = add_entry(library, card, contents, offer.replace)
        return {
            "library": library.storage.place,
            "name": name,
            "outcome": outcome,
            "rank": card.rank,
            "parameters": card.parameters,
            "windows": len(states),
            "points": len(specification.weights),
            "noise": specification.noise,
            "specification_bytes": card.files[SPECIFICATION_FILE].bytes,
            "profile_bytes": len(profile or b""),
            "effect": effect.table(),
            "warnings": warnings + warnings_of(str(offer.adapter), effect),
            "damaged": library.damaged,
        }


def search(
    place: Place,
    base_folder: Path,
    data: Path,
    top: int = 5,
    mixed: bool = False,
    progress: Progress = lambda text: None,
) -> Result:
    """The entries that a text is like; the text stays here.

    Args:
        mixed: Which entries the text is mixed of, in place of the nearest.

    Raises:
        ModelError: It is not the library's base.
        CorpusError: The text is too short.
        StorageError: There is no library, or nothing is in it.
    """
    with _stocked(place) as library:
        base = load_base(base_folder)
        progress("reading the text")
        states = library.yardstick.measure(base, _stream(base, data))
        index = index_of(library.specifications(), library.yardstick.gamma)
        best = nearest(index, states, top)
        found = mixture(index, states)[:top] if mixed else best
        cards = {card.name: card.model_dump(include={"rank", "who", "licence"}) for card in library.cards()}
        ratio = closeness(index, best[0])
        return {
            "library": library.storage.place,
            "entries": len(index.names),
            "windows": len(states),
            "mixture": mixed,
            "matches": [asdict(match) | cards[match.name] for match in found],
            "closeness": ratio,
            "fit": verdict(ratio),
            "damaged": library.damaged,
        }


def entries(place: Place) -> Result:
    """All entries and what their cards say.

    Raises:
        StorageError: There is no library, or it cannot be read.
    """
    with closing(open_library(place.library, place.registry)) as library:
        return {
            "library": library.storage.place,
            "base_hash": library.yardstick.base_hash,
            "entries": [card.model_dump(mode="json") for card in library.cards()],
            "damaged": library.damaged,
        }


def get(place: Place, name: str, out: Path) -> Result:
    """Write an entry to a new folder, which PEFT loads.

    Raises:
        StorageError: There is no such entry, or something at ``out``.
        ModelError: The entry is damaged.
    """
    with closing(open_library(place.library, place.registry)) as library:
        card = fetch_entry(library, name, out)
    return {"folder": str(out), **card.model_dump(mode="json", exclude={"files"})}


def remove(place: Place, name: str) -> Result:
    """Take an entry out.

    Raises:
        StorageError: There is no such entry, or the library cannot be written.
    """
    with closing(open_library(place.library, place.registry)) as library:
        remove_entry(library, name)
    return {"library": library.storage.place, "name": name, "outcome": "removed"}


@dataclass(frozen=True)
class Grouping:
    """How a library is clustered, and what becomes of its clusters.

    Attributes:
        merge: Merge each cluster to one adapter by this method, below ``out``.
        rank: Of those, at most.
    """

    k: int
    seed: int = 0
    merge: str | None = None
    rank: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if (self.merge is None) != (self.out is None):
            raise RecipeError("--merge and --out go together: merged adapters need a folder")
        if self.rank is not None and self.merge is None:
            raise RecipeError("--rank has no effect without --merge")


def cluster(place: Place, grouping: Grouping) -> Result:
    """Groups of adapters that do alike (MBC, arXiv 2405.11157), and one adapter of each group if wanted.

    Raises:
        RecipeError: There are fewer adapters than groups, or no such method.
        StorageError: There is no library, or the result cannot be written.
    """
    with _stocked(place) as library:
        everybody = _adapters(library, [card.name for card in library.cards()])
    adapters = {name: adapter for name, adapter in everybody.items() if adds_something(adapter)}
    labels = cluster_adapters(adapters, grouping.k, grouping.seed)
    groups = {f"cluster-{k}": [name for name in adapters if labels[name] == k] for k in range(grouping.k)}
    if grouping.merge is not None and grouping.out is not None:
        method = chosen(ADAPTER_METHODS, grouping.merge, {})
        with appearing(grouping.out) as partial:
            for group, names in groups.items():
                merged = merge_adapters([adapters[name] for name in names], method, rank=grouping.rank)
                save_adapter(merged, partial / group)
    return {
        "library": library.storage.place,
        "clusters": groups,
        "folder": None if grouping.out is None else str(grouping.out),
        "warnings": [f"{name}: left out, since it adds nothing to the base" for name in everybody.keys() - adapters],
        "damaged": library.damaged,
    }


@dataclass(frozen=True)
class Routing:
    """How tokens are routed.

    Attributes:
        by: ``evidence`` asks the text so far whose it is; ``arrow`` every token, at every linear map.
        top_k: Adapters of a token; if left out all by evidence, and by Arrow 4, or all if there are fewer.
        temperature: Of Arrow; 1 if left out.
        among: Only so many of the entries, those nearest to the text.
    """

    by: Literal["evidence", "arrow"] = "evidence"
    top_k: int | None = None
    temperature: float | None = None
    among: int | None = None

    def __post_init__(self) -> None:
        if self.by == "evidence" and self.temperature is not None:
            raise RecipeError("--temperature has no effect by evidence", "it is Arrow's: add --by arrow")


def route(
    place: Place, base_folder: Path, data: Path, routing: Routing, progress: Progress = lambda text: None
) -> Result:
    """The loss on a text with every token routed through a library's adapters, beside the base's.

    Raises:
        ModelError: It is not the library's base, or an entry is damaged.
        RecipeError: A token is to go through more adapters than there are.
        StorageError: There is no library, or nothing is in it.
    """
    base = load_base(base_folder)
    stream = _stream(base, data)
    with _stocked(place) as library:
        index = index_of(library.specifications(), library.yardstick.gamma)
        progress("reading the text")
        states = library.yardstick.measure(base, stream)
        matches = nearest(index, states, routing.among or len(index.names))
        adapters = _adapters(library, [match.name for match in matches])
        size = base.model.config.vocab_size
        profiles = {name: profile_of(library, name, size) for name in adapters} if routing.by == "evidence" else {}
    progress(f"measuring {len(stream)} tokens without the adapters")
    alone = loss_on(base.model, stream, stretch(base.model, _SEQUENCE))
    progress(f"measuring {len(stream)} tokens with them")
    loss, shares = _routed(base, adapters, profiles, stream, routing)
    return {
        "library": library.storage.place,
        "tokens": len(stream) - 1,
        "base_nats": alone,
        "routed_nats": loss,
        "by": routing.by,
        "shares": shares,
        "warnings": _of_routing(alone, loss),
        "damaged": library.damaged,
    }


def _routed(
    base: Base, adapters: Mapping[str, Adapter], profiles: Mapping[str, Tensor], stream: np.ndarray, routing: Routing
) -> tuple[float, dict[str, float]]:
    """The loss, and each adapter's share, largest first."""
    if routing.by == "evidence":
        with by_evidence(base.model, adapters, profiles, Evidence(routing.top_k)) as posterior:
            loss = loss_on(base.model, stream, stretch(base.model, _SEQUENCE))
            given = zip(adapters, posterior.mean_shares(), strict=True)
            return loss, dict(sorted(given, key=lambda pair: -pair[1]))
    settings = Arrow(routing.top_k or min(_TOP_K, len(adapters)), routing.temperature or 1.0)
    with arrow(base.model, adapters, settings) as routed:
        return loss_on(base.model, stream, stretch(base.model, _SEQUENCE)), mean_shares(routed)


def _of_routing(alone: float, routed: float) -> list[str]:
    if routed < alone:
        return []
    return [f"the adapters do not help with this text: {alone:.3f} nats per token without, {routed:.3f} with them"]


@contextmanager
def _stocked(place: Place) -> Iterator[Library]:
    """A library that something is in."""
    with closing(open_library(place.library, place.registry)) as library:
        if not library.registry.stamps():
            reason = "".join(f"; {reason}" for reason in library.damaged.values())
            raise StorageError(f"{library.storage.place}: no entries{reason}", "`potluck library add` puts adapters in")
        yield library


def _adapters(library: Library, names: list[str]) -> Mapping[str, Adapter]:
    return {name: adapter_of(library, name) for name in names}


def _effect(base: Base, adapter: Adapter, stream: np.ndarray) -> Effect:
    rows = stretches(base.model, stream, stretch(base.model, _SEQUENCE))
    before = losses(base.model, rows)
    with attached(base.model, adapter):
        return compared(before, losses(base.model, rows), rows, seen=True)


def _stream(base: Base, data: Path) -> np.ndarray:
    return token_stream(texts_of(data), base.vocabulary)
