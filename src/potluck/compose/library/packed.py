"""The form in which a set of packed adapters travels (`packing.py` makes it), and how it is read.

One safetensors file of seven tensors. The header's ``about`` is the layout: the linear maps, and of each adapter its
name, facts and rank at each map. Terms are counted by map, then by adapter, then by rank.

| tensor | form | what |
| --- | --- | --- |
| ``stages`` | uint8 ``(T,)`` | stages of each term; 0: left out |
| ``SIDE.pool`` | fp16 ``(pool, shard)`` | shards of the A (SIDE ``down``) or of the B (``up``) |
| ``SIDE.scales`` | bf16, one a stage of a term | by map, then by stage, then by term |
| ``SIDE.indices`` | uint8, ``ceil(d / shard)`` a stage of a term | in the same order |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.library.storage import Files
from potluck.errors import ModelError
from potluck.tensors import load_tensors, read_header
from potluck.untrusted import loads

MAX_POOL = 256  # what a byte can say
MAX_SHARD = 64
MAX_STAGES = 16
_MAX_BYTES = 4 << 30
_SIDES = ("down", "up")
_KEY = "about"
Size = Annotated[int, Field(ge=1, le=1 << 20)]


class Member(BaseModel):
    """An adapter of the set: what `Adapter` says of it, and its rank at each linear map, 0 where it has none.

    Attributes:
        error: ``‖ΔW − ΔW'‖ / ‖ΔW‖`` over all linear maps, as whoever packed it has measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(max_length=256)
    error: float = Field(ge=0, lt=1)
    base: str = ""
    transposed: bool = False
    about: dict[str, Any] = {}
    ranks: list[Annotated[int, Field(ge=0, le=1 << 16)]]


class Layout(BaseModel):
    """Whose terms the numbers are: linear maps as ``(place, d_in, d_out)``, and the adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    shard: int = Field(ge=1, le=MAX_SHARD)
    modules: list[tuple[str, Size, Size]]
    members: list[Member]

    def terms(self, module: int) -> int:
        """Terms of all adapters at one linear map."""
        return sum(member.ranks[module] for member in self.members)


@dataclass(frozen=True)
class Side:
    """Everybody's A, or everybody's B; shapes as in the table above."""

    pool: Tensor
    scales: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Packed:
    """A set of adapters, packed."""

    layout: Layout
    stages: Tensor
    down: Side
    up: Side

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names in the file."""
        named = {f"{side}.{key}": tensor for side in _SIDES for key, tensor in vars(getattr(self, side)).items()}
        return {"stages": self.stages, **named}

    @property
    def bytes(self) -> int:
        """Size of all tensors; the file has its header besides."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def errors(self) -> dict[str, float]:
        """What packing lost of each adapter, as a share of its norm."""
        return {member.name: member.error for member in self.layout.members}


def unpack(packed: Packed) -> dict[str, Adapter]:
    """The adapters again, but for what packing lost; what was left out entirely is not there."""
    layout = packed.layout
    modules: dict[str, dict[str, Factors]] = {member.name: {} for member in layout.members}
    stages = packed.stages.split([layout.terms(number) for number in range(len(layout.modules))])
    downs = _vectors(packed.down, [d_in for _, d_in, _ in layout.modules], stages)
    ups = _vectors(packed.up, [d_out for _, _, d_out in layout.modules], stages)
    for number, (path, _, _) in enumerate(layout.modules):
        of_each = stages[number].split([member.ranks[number] for member in layout.members])
        ranks = [int((mine > 0).sum()) for mine in of_each]
        for member, rank, down, up in zip(
            layout.members, ranks, next(downs).split(ranks), next(ups).split(ranks), strict=True
        ):
            if rank:
                modules[member.name][path] = Factors(down, up.T.contiguous())
    return {m.name: Adapter(modules[m.name], m.base, m.transposed, m.about) for m in layout.members}


def assembled(pool: Tensor, indices: Tensor, scales: Tensor) -> Tensor:
    """Vectors put together: ``scale · [pool[i_1] … pool[i_n]]``, ``(t, n · shard)`` of indices ``(t, n)``."""
    return scales.float()[:, None] * pool.float()[indices.long()].flatten(1)


def save_packed(packed: Packed, path: Path) -> None:
    """Write one file, whole or not at all.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    content = save(packed.tensors, metadata={_KEY: packed.layout.model_dump_json()})
    Files(path.parent).write(path.name, content)


def load_packed(path: Path) -> Packed:
    """Read a file that came from outside.

    Raises:
        ModelError: It is missing, damaged, or not what its layout says.
        StorageError: It cannot be read.
    """
    content = Files(path.parent).read(path.name, _MAX_BYTES)
    if content is None:
        raise ModelError(f"{path}: no such file", "pack adapters with potluck.compose.library.packing.pack")
    try:
        layout = Layout.model_validate(loads(read_header(content).about[_KEY]))
        found = load_tensors(content)
        sides = {side: Side(*(found.pop(f"{side}.{key}") for key in ("pool", "scales", "indices"))) for side in _SIDES}
        packed = Packed(layout, found.pop("stages"), **sides)
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{path}: not a set of packed adapters ({error})") from None
    wrong = ", ".join(found) if found else _mistake(packed)
    if wrong:
        raise ModelError(f"{path}: {wrong}: not as its layout says")
    return packed


def _vectors(side: Side, widths: list[int], stages: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Each linear map's vectors, ``(terms that have a stage, width)``."""
    shard = side.pool.shape[1]
    scales, indices = side.scales, side.indices
    for width, counts in zip(widths, stages, strict=True):
        pieces, coded = -(-width // shard), counts[counts > 0]
        vectors = torch.zeros(len(coded), pieces * shard)
        for stage in range(int(coded.max()) if len(coded) else 0):
            rows = (coded > stage).nonzero().squeeze(1)
            mine, indices = indices[: len(rows) * pieces], indices[len(rows) * pieces :]
            vectors[rows] += assembled(side.pool, mine.view(-1, pieces), scales[: len(rows)])
            scales = scales[len(rows) :]
        yield vectors[:, :width]


def _mistake(packed: Packed) -> str:
    """What of it is not as the layout says; empty if all is."""
    layout, stages = packed.layout, packed.stages
    if any(len(member.ranks) != len(layout.modules) for member in layout.members):
        return "ranks"
    if len({member.name for member in layout.members}) < len(layout.members):
        return "names"
    counts = [layout.terms(number) for number in range(len(layout.modules))]
    if stages.dtype != torch.uint8 or stages.shape != (sum(counts),) or (stages > MAX_STAGES).any():
        return "stages"
    coded = [int(part.sum()) for part in stages.split(counts)]
    downs, ups = [d_in for _, d_in, _ in layout.modules], [d_out for _, _, d_out in layout.modules]
    for name, side, widths in (("down", packed.down, downs), ("up", packed.up, ups)):
        pieces = [-(-width // layout.shard) for width in widths]
        expected = sum(count * each for count, each in zip(coded, pieces, strict=True))
        if side.pool.dtype != torch.float16 or not 1 <= len(side.pool) <= MAX_POOL:
            return f"{name}.pool"
        if side.pool.shape[1:] != (layout.shard,) or not side.pool.isfinite().all():
            return f"{name}.pool"
        if side.scales.dtype != torch.bfloat16 or side.scales.shape != (sum(coded),):
            return f"{name}.scales"
        if not side.scales.isfinite().all():
            return f"{name}.scales"
        if side.indices.dtype != torch.uint8 or side.indices.shape != (expected,):
            return f"{name}.indices"
        if expected and int(side.indices.max()) >= len(side.pool):
            return f"{name}.indices"
    return ""
