"""A set of adapters in few bytes: two pools of short vectors, and numbers that say which to put together.

From mixture of shards (MoS, arXiv 2410.00938) come the pools that all linear maps share, one for the A and one for the
B, and vectors put together from shards of them by index, those of A and of B apart. MoS trains in this form. Here
adapters that are trained already are brought into it: a code with a loss, which says how large that is.

1. Every product is brought into `canonical` form, ``ΔW = Σ_t b_t a_tᵀ``: the same for equal adapters, and its terms are
   orthogonal, so that their errors add up.
2. A pool is k-means over the shards of these vectors, scaled to entries of mean square 1. Shards are drawn as often as
   their terms count, ``‖a_t‖² ‖b_t‖²``.
3. A vector is coded in stages. A stage replaces what is left of it, shard by shard, with the nearest of the pool, times
   one scale for the whole vector. What then is left is for the next stage.
4. The next stage goes to the terms with the most error for their bytes, until every adapter is within its bound. A term
   that gets none is left out.

At 256 shards of 4 numbers a stage costs two bits a number. How that compares with fp16, fewer ranks and fewer bits is
in ``docs/how-to/route-adapters.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.library.packed import (
    MAX_POOL,
    MAX_SHARD,
    MAX_STAGES,
    Layout,
    Member,
    Packed,
    Side,
    assembled,
    unpack,
)
from potluck.compose.low_rank import canonical, concatenated
from potluck.compose.routing.bundle import by_module
from potluck.errors import ModelError, RecipeError

_LEAST_ERROR = 1e-3
_LEFT = 0.35  # of a term's squared error, that a stage is expected to leave
_SAMPLES = 64  # shards that k-means sees for each of the pool
_ITERATIONS = 15
_DISTANCES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Packing:
    """How adapters are packed.

    Attributes:
        error: Largest ``‖ΔW − ΔW'‖ / ‖ΔW‖`` of an adapter, over all its linear maps.
        pool: Shards in each of the two pools.
        shard: Numbers in a shard.
        seed: Of k-means.
    """

    error: float = 0.1
    pool: int = 256
    shard: int = 4
    seed: int = 0


def pack(adapters: Mapping[str, Adapter], settings: Packing | None = None) -> Packed:
    """Pack a set of adapters of one base; ``Packed.bytes`` is what is sent of them, ``Packed.errors`` what is lost.

    Raises:
        RecipeError: A setting is out of range.
        ModelError: Adapters do not fit each other, one adds nothing, or the bound cannot be kept.
    """
    settings = settings or Packing()
    _check(settings)
    whole = torch.tensor([_squared_norm(adapter) for adapter in adapters.values()], dtype=torch.float64)
    for name, squared in zip(adapters, whole.tolist(), strict=True):
        if not squared > 0:
            raise ModelError(f"{name}: adds nothing to the base", "leave it out")
    maps = [_Map(path, list(parts.items()), list(adapters), settings) for path, parts in by_module(adapters).items()]
    pools = tuple(_pool(maps, side, settings) for side in (0, 1))
    allowed = settings.error**2 * whole
    while True:
        _code_within(allowed, maps, pools)
        packed = _packed(adapters, maps, pools, settings.shard)
        found = unpack(packed)
        errors = {name: relative_error(adapter, found[name]) for name, adapter in adapters.items()}
        if max(errors.values()) <= settings.error:
            return _stating(errors, packed)
        exact = torch.tensor(list(errors.values()))
        allowed = torch.where(exact <= settings.error, allowed, 0.95 * allowed)  # coded terms are not quite orthogonal


def relative_error(adapter: Adapter, other: Adapter) -> float:
    """``‖ΔW − ΔW'‖ / ‖ΔW‖`` over all linear maps, exact, from the factors; a map that the other has not is zero there.

    Args:
        other: Has no other maps than the adapter.
    """
    lost = dict(adapter.modules)
    for path, factors in other.modules.items():
        lost[path] = concatenated([adapter.modules[path], factors], [1, -1])
    return math.sqrt(_squared_norm(Adapter(lost)) / _squared_norm(adapter))


def _check(settings: Packing) -> None:
    if not _LEAST_ERROR <= settings.error < 1:
        raise RecipeError(f"error = {settings.error:g} is not from {_LEAST_ERROR:g} to below 1")
    if not 2 <= settings.pool <= MAX_POOL or not 1 <= settings.shard <= MAX_SHARD:
        hint = f"a pool holds 2 to {MAX_POOL} shards, a shard 1 to {MAX_SHARD} numbers"
        raise RecipeError(f"pool = {settings.pool}, shard = {settings.shard}", hint)


def _squared_norm(adapter: Adapter) -> float:
    """``‖ΔW‖²`` summed over linear maps, ``tr((BᵀB)(AAᵀ))``."""
    total = 0.0
    for factors in adapter.modules.values():
        down, up = factors.down.double(), factors.up.double()
        total += float(((down @ down.T) * (up.T @ up)).sum())
    return total


class _Map:
    """The terms of all adapters at one linear map, and how far they are coded.

    Attributes:
        owner: Whose term, ``(t,)``.
        targets: a and b of each term, ``(t, d)``, filled up to whole shards.
        left: What the stages so far have left of them.
        stages: How many those are, ``(t,)``.
        errors: ``‖b aᵀ − b' a'ᵀ‖²`` of each term, ``(t,)``.
        coded: Of each side and stage the indices ``(t, pieces)`` and scales ``(t,)``.
    """

    def __init__(
        self, path: str, parts: Sequence[tuple[str, Factors]], names: Sequence[str], settings: Packing
    ) -> None:
        fixed = [canonical(factors.to(torch.float32)) for _, factors in parts]
        widths = {(factors.down.shape[1], factors.up.shape[0]) for factors in fixed}
        if len(widths) > 1:
            raise ModelError(f"{path}: the adapters are of different shapes", "are they of one base?")
        ((self.d_in, self.d_out),) = widths
        self.path = path
        self.ranks = dict.fromkeys(names, 0) | {
            name: factors.rank for (name, _), factors in zip(parts, fixed, strict=True)
        }
        self.owner = torch.arange(len(names)).repeat_interleave(torch.tensor(list(self.ranks.values())))
        sides = torch.cat([factors.down for factors in fixed]), torch.cat([factors.up.T for factors in fixed])
        self.targets = tuple(pad(side, (0, -side.shape[1] % settings.shard)) for side in sides)
        self.left = tuple(target.clone() for target in self.targets)
        self.stages = torch.zeros(len(self.owner), dtype=torch.uint8)
        self.errors = (self.targets[0].norm(dim=1) * self.targets[1].norm(dim=1)).double().square()
        self.coded: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    @property
    def bytes_each(self) -> int:
        """Numbers in a term, to which the bytes of a stage are in proportion."""
        return self.d_in + self.d_out

    def code(self, rows: Tensor, pools: Sequence[Tensor]) -> None:
        """One more stage for some terms."""
        for side, (left, pool) in enumerate(zip(self.left, pools, strict=True)):
            indices, scales = _nearest(left[rows], pool)
            left[rows] -= assembled(pool, indices, scales)
            left[:, (self.d_in, self.d_out)[side] :] = 0
            for stage in self.stages[rows].unique().tolist():
                of_stage = self.stages[rows] == stage
                self._keep(side, stage, rows[of_stage], indices[of_stage], scales[of_stage])
        self.stages[rows] += 1
        a, b = (target[rows].double() for target in self.targets)
        a_left, b_left = (left[rows].double() for left in self.left)
        a_coded = a - a_left
        crossed = 2 * (b * b_left).sum(1) * (a_left * a_coded).sum(1)
        squares = [vectors.square().sum(1) for vectors in (b, a_left, b_left, a_coded)]
        self.errors[rows] = squares[0] * squares[1] + crossed + squares[2] * squares[3]

    def _keep(self, side: int, stage: int, rows: Tensor, indices: Tensor, scales: Tensor) -> None:
        coded = self.coded[side]
        if stage == len(coded):
            terms = len(self.owner)
            coded.append((indices.new_zeros(terms, indices.shape[1]), scales.new_zeros(terms)))
        coded[stage][0][rows], coded[stage][1][rows] = indices, scales


def _pool(maps: Sequence[_Map], side: int, settings: Packing) -> Tensor:
    """k-means over shards of a side's vectors, fp16 ``(pool, shard)``."""
    draw = torch.Generator().manual_seed(settings.seed)
    weights = torch.cat([m.errors for m in maps])  # nothing is coded yet
    terms = torch.multinomial(weights, _SAMPLES * settings.pool, replacement=True, generator=draw)
    counts = terms.bincount(minlength=len(weights)).split([len(m.errors) for m in maps])
    samples = []
    for m, mine in zip(maps, counts, strict=True):
        rows = torch.arange(len(mine)).repeat_interleave(mine)
        shards = m.targets[side].unflatten(1, (-1, settings.shard))
        which = torch.randint(shards.shape[1], (len(rows),), generator=draw)
        samples.append(shards[rows, which] / _sizes(m.targets[side])[rows])
    points = torch.cat(samples)
    pool = points[torch.randperm(len(points), generator=draw)[: settings.pool]]
    for _ in range(_ITERATIONS):
        nearest = _closest(points, pool)
        sizes = nearest.bincount(minlength=len(pool))[:, None]
        sums = torch.zeros_like(pool).index_add_(0, nearest, points)
        pool = torch.where(sizes > 0, sums / sizes.clamp_min(1), pool)
    return pool.half()


def _sizes(vectors: Tensor) -> Tensor:
    """Root mean square of each vector's entries, ``(t, 1)``."""
    return vectors.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)


def _nearest(vectors: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Indices, uint8 ``(t, pieces)``, and scales, bf16 ``(t,)``, of the vectors nearest in shape: one stage."""
    size = _sizes(vectors)
    shape = vectors / size
    indices = _closest(shape.view(-1, pool.shape[1]), pool.float()).view(len(vectors), -1)
    found = assembled(pool, indices, torch.ones(len(vectors)))
    scales = (shape * found).sum(1) / found.square().sum(1).clamp_min(1e-30) * size.squeeze(1)
    return indices.to(torch.uint8), scales.bfloat16()


def _closest(points: Tensor, pool: Tensor) -> Tensor:
    """For each point the nearest of the pool, ``argmin ‖q‖² / 2 − x · q``."""
    half_squares = pool.square().sum(1) / 2
    at_once = max(1, _DISTANCES_AT_ONCE // len(pool))
    return torch.cat([torch.addmm(half_squares, part, pool.T, alpha=-1).argmin(1) for part in points.split(at_once)])


def _code_within(allowed: Tensor, maps: Sequence[_Map], pools: Sequence[Tensor]) -> None:
    """Code further stages until the errors of each adapter's terms add up to no more than is allowed, ``(N,)``."""
    owner = torch.cat([m.owner for m in maps])
    cost = torch.cat([torch.full((len(m.owner),), m.bytes_each) for m in maps])
    while True:
        errors, stages = torch.cat([m.errors for m in maps]), torch.cat([m.stages for m in maps])
        excess = torch.zeros_like(allowed).index_add_(0, owner, errors) - allowed
        if (excess <= 0).all():
            return
        due = torch.zeros(len(owner), dtype=torch.bool)
        for number in (excess > 0).nonzero().flatten().tolist():
            open_terms = ((owner == number) & (stages < MAX_STAGES)).nonzero().flatten()
            if not len(open_terms):
                raise ModelError("so small an error cannot be kept", "use smaller shards or a larger pool")
            worth, order = (errors[open_terms] / cost[open_terms]).sort(descending=True)
            gained = ((1 - _LEFT) * errors[open_terms[order]]).cumsum(0)
            enough = int((gained < excess[number]).sum()) + 1
            due[open_terms[order[:enough][worth[:enough] >= _LEFT * worth[0]]]] = True
        for m, mine in zip(maps, due.split([len(m.owner) for m in maps]), strict=True):
            if mine.any():
                m.code(mine.nonzero().flatten(), pools)


def _packed(adapters: Mapping[str, Adapter], maps: Sequence[_Map], pools: Sequence[Tensor], shard: int) -> Packed:
    members = [
        Member(
            name=name,
            error=0,
            base=adapter.base,
            transposed=adapter.transposed,
            about=dict(adapter.about),
            ranks=[m.ranks[name] for m in maps],
        )
        for name, adapter in adapters.items()
    ]
    layout = Layout(shard=shard, modules=[(m.path, m.d_in, m.d_out) for m in maps], members=members)
    sides = []
    for side, pool in enumerate(pools):
        scales, indices = [torch.zeros(0, dtype=torch.bfloat16)], [torch.zeros(0, dtype=torch.uint8)]
        for m in maps:
            for stage, (of_stage, scales_of_stage) in enumerate(m.coded[side]):
                rows = m.stages > stage
                indices.append(of_stage[rows].flatten())
                scales.append(scales_of_stage[rows])
        sides.append(Side(pool, torch.cat(scales), torch.cat(indices)))
    return Packed(layout, torch.cat([m.stages for m in maps]), *sides)


def _stating(errors: Mapping[str, float], packed: Packed) -> Packed:
    members = [member.model_copy(update={"error": errors[member.name]}) for member in packed.layout.members]
    return replace(packed, layout=packed.layout.model_copy(update={"members": members}))
