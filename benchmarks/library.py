"""Search in a library of adapters: whether the right one is found, in what proportion, and how fast.

**Setting.** Ten participants' documentation (`_silos`), two adapters each. Only specifications are searched, so no
adapter is trained: what the base has not seen of a participant's text is cut into passages of 2,000 characters, which
are dealt out: two fifths are the text of its first adapter, two fifths of its second, and queries are drawn from the
rest, so many windows of 128 tokens each. Mixtures are of two or three participants; their weights are judged by the L1
distance of each participant's share (of both its adapters) from the truth.

**Whole files.** The same with queries from files that no adapter's text is of, as the other benchmarks hold out. Files
of one project differ, some more than projects do, and some participants have a handful: these rows have no target.

**Peers.** The settings of learnware markets (`learnware` 0.4: RKME with γ = 0.1 and K = 100, points moved three times
by a gradient step of 0.1, simplex QP over all) on mean last hidden states as they are; and our points with shares by
that QP in place of likelihood.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks._measure import Measurement, main, measured, paired, seconds
from benchmarks._silos import ROOT, BaseSize, stage, texts
from potluck.compose.base import Base, token_stream
from potluck.compose.library.search import CANDIDATES, Index, Match, closeness, index_of, mixture, nearest, verdict
from potluck.compose.library.simplex import nearest_mixture
from potluck.compose.library.specification import MAX_BYTES, Specification, kernel, kmeans, specification_of
from potluck.compose.library.yardstick import MAX_WINDOW, Yardstick, yardstick_of

_SHARED = ROOT.parent / "shared" / "data"
_PASSAGE = 2_000  # characters
_LEARNWARE_GAMMA, _LEARNWARE_POINTS, _LEARNWARE_STEP = 0.1, 100, 0.1
_NOISE = 0.05
_SEARCHED = 62  # windows of a query whose search is timed
States = Mapping[str, Tensor]  # of each participant
Shares = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        windows: Of 128 tokens in a query; the last decides about the target for mixtures.
        queries: Of each participant.
        mixtures: In all.
        entries: Of the library whose search is timed.
        runs: Timed queries of each participant.
        l1: Target for mixtures; the base of the short form has hardly learned anything.
    """

    seeds: tuple[int, ...]
    base: BaseSize
    windows: tuple[int, ...]
    queries: int
    mixtures: int
    entries: int
    runs: int
    l1: float


SIZES = {
    "short": Size(
        seeds=(0,),
        base=BaseSize(vocabulary=1024, layers=2, width=64, heads=2, feedforward=176, steps=40),
        windows=(16, 62),
        queries=10,
        mixtures=30,
        entries=1000,
        runs=1,
        l1=0.25,
    ),
    "full": Size(
        seeds=(0, 1, 2),
        base=BaseSize(vocabulary=4096, layers=4, width=192, heads=6, feedforward=512, steps=600, batch_size=8),
        windows=(16, 31, 62),
        queries=20,
        mixtures=60,
        entries=1000,
        runs=2,
        l1=0.15,
    ),
}


@dataclass(frozen=True)
class Market:
    """Entries, and what queries are drawn from."""

    entries: Mapping[str, Tensor]
    queries: States


@dataclass(frozen=True)
class Way:
    """A way to search: what is nearest, and shares in a mixture."""

    index: Index
    shares: Callable[[Tensor], Shares]


Found = dict[tuple[str, str], list[float]]  # of each figure and each way, one of every seed


def measure(size: Size) -> list[Measurement]:
    found: Found = {}
    taken: list[float] = []
    for seed in size.seeds:
        base = stage(seed, size.base).base
        yardstick = yardstick_of(base, "benchmark", "cpu")
        for kind, cut in (("passages", _passages), ("whole files", _files)):
            tokens = {name: [token_stream(t, base.vocabulary) for t in three] for name, three in cut(size).items()}
            market = _market(tokens, partial(yardstick.measure, base, device="cpu"))
            specifications = _taken(market, yardstick, taken)
            index = index_of(specifications, yardstick.gamma)
            noisy = {n: specification_of(s, yardstick, noise=_NOISE) for n, s in market.entries.items()}
            ways = {
                "ours": _by_likelihood(index),
                f"with noise {_NOISE}": _by_likelihood(index_of(noisy, yardstick.gamma)),
                "mean embeddings": _by_embedding(index),
            }
            _judge(found, kind, ways, market, size, seed)
            if kind == "passages":
                _tell_who_fits(found, specifications, yardstick, market, size, seed)
                _tell_strangers(found, index, _strangers(base, yardstick), size, seed)
            peer = _market(tokens, partial(_last_hidden, base))
            theirs = index_of({n: _learnware(s) for n, s in peer.entries.items()}, _LEARNWARE_GAMMA)
            _judge(found, kind, {"learnware's settings": _by_embedding(theirs)}, peer, size, seed)
    sizes = [len(specification.to_bytes()) for specification in specifications.values()]
    return [
        measured("the largest specification", [max(sizes)], "bytes", at_most=MAX_BYTES),
        measured("taking one from a text's states", taken, "s"),
        *_reported(found, size),
        *_speed(size, index, market.queries),
    ]


def _taken(market: Market, yardstick: Yardstick, times: list[float]) -> dict[str, Specification]:
    specifications = {}
    for name, states in market.entries.items():
        began = time.perf_counter()
        specifications[name] = specification_of(states, yardstick)
        times.append(time.perf_counter() - began)
    return specifications


def _reported(found: Mapping[tuple[str, str], Sequence[float]], size: Size) -> Iterator[Measurement]:
    """Ours with targets, each with its peers beside it; spread is over seeds."""
    for (what, way), values in found.items():
        if way != "ours":
            continue
        others = [f"{name} {np.median(v):.3f}" for (same, name), v in found.items() if same == what and name != "ours"]
        at_least = 0.95 if what.startswith("passages: right") else None
        at_most = size.l1 if what.startswith(f"passages: L1 of weights, {_tokens(size.windows[-1])}") else None
        unit = "L1" if "L1" in what else "share"
        yield measured(what, values, unit, at_least=at_least, at_most=at_most, peer="; ".join(others) or None)


# --- texts and states ----------------------------------------------------------------------------


def _passages(size: Size) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Of every participant: passages for the first adapter, for the second, and for queries."""
    dealt = {}
    for name, mine in texts(size.base.parties).items():
        whole = [text[i : i + _PASSAGE] for text in mine.own + mine.held_out for i in range(0, len(text), _PASSAGE)]
        random.Random(name).shuffle(whole)
        first, second = 2 * len(whole) // 5, 4 * len(whole) // 5
        dealt[name] = (whole[:first], whole[first:second], whole[second:])
    return dealt


def _files(size: Size) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """The same by whole files: every other one for an adapter, and those held out."""
    return {name: (t.own[::2], t.own[1::2] or t.own, t.held_out) for name, t in texts(size.base.parties).items()}


def _market(tokens: Mapping[str, Sequence[np.ndarray]], states_of: Callable[[np.ndarray], Tensor]) -> Market:
    entries = {f"{name}/{place}": states_of(three[place]) for name, three in tokens.items() for place in (0, 1)}
    return Market(entries, {name: states_of(three[2]) for name, three in tokens.items()})


def _last_hidden(base: Base, stream: np.ndarray) -> Tensor:
    """Mean last hidden state of each window, as it is."""
    windows = torch.from_numpy(stream[: len(stream) // MAX_WINDOW * MAX_WINDOW].reshape(-1, MAX_WINDOW))
    with torch.no_grad():
        return torch.cat([base.model.base_model(input_ids=w).last_hidden_state.mean(1) for w in windows.split(64)])


def _learnware(states: Tensor) -> Specification:
    """RKME as `learnware` takes it: k-means, then β, then three times a step of z and β again."""
    z = kmeans(states, min(_LEARNWARE_POINTS, 2 * len(states) // 3), 0)

    def weighed(z: Tensor) -> Tensor:
        gram, overlap = kernel(z, z, _LEARNWARE_GAMMA), kernel(z, states, _LEARNWARE_GAMMA).mean(1)
        return nearest_mixture(gram, overlap).float()

    weights = weighed(z)
    for _ in range(3):
        z = z.clone().requires_grad_()
        own = weights @ torch.exp(-_LEARNWARE_GAMMA * torch.cdist(z, z.detach()).square()) @ weights
        cross = weights @ torch.exp(-_LEARNWARE_GAMMA * torch.cdist(z, states).square()).mean(1)
        (slope,) = torch.autograd.grad(2 * own - 2 * cross, z)  # the second z is held, so twice
        z = (z - _LEARNWARE_STEP * slope).detach()
        weights = weighed(z)
    return Specification(z, weights, "learnware")


# --- what is found -------------------------------------------------------------------------------


def _judge(found: Found, kind: str, ways: Mapping[str, Way], market: Market, size: Size, seed: int) -> None:
    for windows in size.windows:
        for name, way in ways.items():
            draw = np.random.default_rng(seed)
            right = [
                _owner(nearest(way.index, _some(states, windows, draw), 1, None)[0]) == owner
                for owner, states in market.queries.items()
                for _ in range(size.queries)
            ]
            wrong = [_l1(way, market, windows, draw) for _ in range(size.mixtures)]
            found.setdefault((f"{kind}: right first, {_tokens(windows)}", name), []).append(float(np.mean(right)))
            found.setdefault((f"{kind}: L1 of weights, {_tokens(windows)}", name), []).append(float(np.mean(wrong)))


def _l1(way: Way, market: Market, windows: int, draw: np.random.Generator) -> float:
    """How far the shares of a mixture of two or three participants are from the truth."""
    names = draw.choice(sorted(market.queries), min(int(draw.integers(2, 4)), len(market.queries)), replace=False)
    counts = np.maximum(1, np.round(draw.dirichlet(np.full(len(names), 3.0)) * windows)).astype(int)
    parts = {name: _some(market.queries[name], count, draw) for name, count in zip(names, counts, strict=True)}
    states = torch.cat(list(parts.values()))
    truth = {name: len(part) / len(states) for name, part in parts.items()}
    shares = way.shares(states)
    return sum(abs(shares.get(name, 0.0) - truth.get(name, 0.0)) for name in market.queries)


def _tell_who_fits(
    found: Found,
    specifications: Mapping[str, Specification],
    yardstick: Yardstick,
    market: Market,
    size: Size,
    seed: int,
) -> None:
    """What is said of queries, and of those whose owner's adapters are taken out."""
    whole = index_of(specifications, yardstick.gamma)
    for windows in size.windows:
        draw, there, gone = np.random.default_rng(seed), [], []
        for owner, states in market.queries.items():
            others = {n: s for n, s in specifications.items() if not n.startswith(f"{owner}/")}
            without = index_of(others, yardstick.gamma)
            for _ in range(size.queries):
                query = _some(states, windows, draw)
                there.append(_said(whole, query))
                gone.append(_said(without, query))
        for what, values in (("", there), (", its owner taken out", gone)):
            share = float(np.mean([value == "alike" for value in values]))
            found.setdefault((f"passages: said to be alike{what}, {_tokens(windows)}", "ours"), []).append(share)


def _tell_strangers(found: Found, index: Index, strangers: States, size: Size, seed: int) -> None:
    """What is said of text of another world."""
    draw = np.random.default_rng(seed)
    for name, states in strangers.items():
        for windows in size.windows:
            said = [_said(index, _some(states, windows, draw)) == "unlike" for _ in range(size.queries)]
            found.setdefault((f"{name}: said to be unlike, {_tokens(windows)}", "ours"), []).append(
                float(np.mean(said))
            )


def _strangers(base: Base, yardstick: Yardstick) -> dict[str, Tensor]:
    """Text that no participant has, where it is there."""
    files = {"Shakespeare": "text/tinyshakespeare.txt", "school sums": "gsm8k/train.jsonl"}
    there = {name: _SHARED / path for name, path in files.items() if (_SHARED / path).is_file()}
    texts = {name: path.read_text(encoding="utf-8")[:200_000] for name, path in there.items()}
    return {name: yardstick.measure(base, token_stream([text], base.vocabulary), "cpu") for name, text in texts.items()}


def _said(index: Index, states: Tensor) -> str | None:
    return verdict(closeness(index, nearest(index, states, 1)[0]))


def _by_likelihood(index: Index) -> Way:
    return Way(index, lambda states: _summed({match.name: match.share for match in mixture(index, states)}))


def _by_embedding(index: Index) -> Way:
    """Shares as ``argmin ‖Σ w_i μ_i − μ‖`` over all."""
    points, weights = index.points.flatten(0, 1), index.weights
    blocks = [kernel(z, points, index.gamma).view(len(z), *weights.shape) for z in index.points]
    gram = torch.stack([torch.einsum("k,kjl,jl->j", w, b, weights) for w, b in zip(weights, blocks, strict=True)])

    def shares(states: Tensor) -> Shares:
        overlaps = (weights * kernel(points, states, index.gamma).mean(1).view(weights.shape)).sum(1)
        return _summed(dict(zip(index.names, nearest_mixture(gram, overlaps).tolist(), strict=True)))

    return Way(index, shares)


def _summed(shares: Shares) -> dict[str, float]:
    """Of each participant, over its adapters."""
    whole: dict[str, float] = {}
    for name, share in shares.items():
        owner = name.partition("/")[0]
        whole[owner] = whole.get(owner, 0.0) + share
    return whole


def _some(states: Tensor, windows: int, draw: np.random.Generator) -> Tensor:
    return states[torch.from_numpy(draw.permutation(len(states))[:windows])]


def _owner(match: Match) -> str:
    return match.name.partition("/")[0]


def _tokens(windows: int) -> str:
    return f"{windows * MAX_WINDOW:,} tokens"


# --- how fast ------------------------------------------------------------------------------------


def _speed(size: Size, index: Index, queries: States) -> Iterator[Measurement]:
    """A library of many, each half one real entry and half another; searched with real queries."""
    many = _many(size.entries, index)
    began = time.perf_counter()
    large = index_of(many, index.gamma)
    yield measured(f"indexing {size.entries:,}", [time.perf_counter() - began], "s")
    draw = np.random.default_rng(0)
    asked = [_some(queries[name], _SEARCHED, draw) for name in sorted(queries) for _ in range(size.runs)]
    quick, exact, mixed, farther = [], [], [], []
    for query in asked:
        best: list[float] = []

        def search(candidates: int | None, states: Tensor = query, found: list[float] = best) -> None:
            found.append(nearest(large, states, candidates=candidates)[0].distance)

        times = paired(lambda: search(CANDIDATES), lambda: search(None), 1)[0]
        quick.append(1e3 * times[0])
        exact.append(1e3 * times[1])
        farther.append(best[0] - best[1])
        mixed.append(1e3 * seconds(partial(mixture, large, query)))
    what = f"over {size.entries:,} entries, {_tokens(_SEARCHED)}"
    peer = f"all by the kernel itself: {np.median(exact):.1f} ms"
    yield measured(f"search {what}", quick, "ms", at_most=50, peer=peer)
    yield measured(f"mixture {what}", mixed, "ms", at_most=50)
    yield measured("what is found is farther than the nearest by", [max(farther)], "distance", at_most=0.01)


def _many(count: int, index: Index) -> dict[str, Specification]:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for number in range(count):
        halves = []
        for row in torch.randperm(len(index.names), generator=draw)[:2].tolist():
            real = int((index.weights[row] > 0).sum())
            halves.append((row, torch.randperm(real, generator=draw)[: index.points.shape[1] // 2]))
        points = torch.cat([index.points[row][some] for row, some in halves])
        weights = torch.cat([index.weights[row][some] for row, some in halves])
        found[f"{number:04}"] = Specification(points, weights / weights.sum(), "mixed")
    return found


if __name__ == "__main__":
    main(measure, SIZES)
