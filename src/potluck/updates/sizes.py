"""What an update will be on the wire, exactly and without torch: the declared form of every link.

``check`` and ``plan`` predict with it, the coordinator holds what arrives to it, and the conformance test of the links
holds each of them to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from potluck.recipe.updates import (
    BlockTopK,
    Codebook,
    DctTopK,
    LinkTable,
    LowRank,
    Quantize,
    RandomK,
    Sign,
    TopK,
)
from potluck.updates.fragments import Layout


class Form(NamedTuple):
    """Type and length of a one-dimensional tensor; types as safetensors names them."""

    dtype: str
    size: int


DTYPE_BYTES = {"I64": 8, "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
VALUES = "values"  # the floats that no link has turned into something else
CODEBOOK_BINS = 256


def update_forms(links: Sequence[LinkTable], layout: Layout) -> dict[str, Form]:
    """Every tensor of an update that has passed ``links``: what they send beside, and ``values``."""
    forms: dict[str, Form] = {}
    for link in links:
        forms |= side_forms(link, layout)
        layout = layout_after(link, layout)
    rest = elements(layout)
    return {**forms, VALUES: Form("F32", rest)} if rest else forms


def layout_after(link: LinkTable, layout: Layout) -> Layout:
    """Layout of the floats that a link leaves to the next one."""
    match link:
        case TopK(density=density) | RandomK(density=density):
            return ((kept(density, elements(layout)),),)
        case BlockTopK():
            return ((sum(count * k for count, k, _ in blocks(link, layout)),),)
        case DctTopK():
            return ((sum(chunks * k for chunks, k, _ in dct_chunks(link, layout)),),)
        case LowRank(rank=rank):
            return tuple(part for shape in layout for part in factors(shape, rank))
        case Quantize() | Codebook() | Sign():
            return ()
        case _:
            return layout


def side_forms(link: LinkTable, layout: Layout) -> dict[str, Form]:
    """Tensors that a link sends beside the floats it leaves."""
    size = elements(layout)
    match link:
        case TopK(density=density):
            return {"places": Form("U8", 4 * kept(density, size))}
        case BlockTopK():
            return {"places": Form("U8", packed(sum(count * k for count, k, _ in blocks(link, layout)), 12))}
        case DctTopK():
            return {"places": Form("U8", packed(sum(chunks * k for chunks, k, _ in dct_chunks(link, layout)), 12))}
        case Quantize(bits=2, block=block):
            return {"codes": Form("U8", packed(size, 2)), "magnitudes": Form("BF16", 2 * math.ceil(size / block))}
        case Quantize(bits=bits, block=block):
            return {"codes": Form("U8", packed(size, bits)), "scales": Form("F32", math.ceil(size / block))}
        case Codebook():
            return {"codes": Form("U8", size), "means": Form("F32", CODEBOOK_BINS)}
        case Sign(block=block):
            return {"signs": Form("U8", packed(size, 1)), "scales": Form("F32", math.ceil(size / block))}
        case _:
            return {}


def payload_bytes(forms: Mapping[str, Form]) -> int:
    """Bytes of tensors of these forms."""
    return sum(DTYPE_BYTES[form.dtype] * form.size for form in forms.values())


def elements(layout: Layout) -> int:
    """Number of floats in a vector of this layout."""
    return sum(math.prod(shape) for shape in layout)


def kept(density: float, size: int) -> int:
    """Entries that are sent of a vector: at least one."""
    return min(size, max(1, round(density * size)))


def packed(count: int, bits: int) -> int:
    """Bytes of so many codes of so many bits, without gaps."""
    return (count * bits + 7) // 8


def blocks(link: BlockTopK, layout: Layout) -> list[tuple[int, int, int]]:
    """(number, entries sent of each, entries of each) of the whole blocks, and of the shorter last one."""
    whole, tail = divmod(elements(layout), link.block)
    found = [(whole, link.k, link.block)] if whole else []
    return [*found, (1, min(tail, math.ceil(link.k * tail / link.block)), tail)] if tail else found


def dct_chunks(link: DctTopK, layout: Layout) -> list[tuple[int, int, tuple[int, int]]]:
    """For each tensor: (chunks, coefficients sent of each, (rows, columns) of a chunk).

    Sides are the largest divisors of the tensor's sides up to ``chunk``; a vector is one row, a tensor of more
    dimensions the matrix of its last one.
    """
    found = []
    for shape in layout:
        rows, columns = matrix(shape)
        sides = (_divisor(rows, link.chunk), _divisor(columns, link.chunk))
        area = sides[0] * sides[1]
        found.append((rows * columns // area, min(link.k, area), sides))
    return found


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as a matrix of its last dimension; a vector is one row."""
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def factors(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the factors of a matrix, or the shape itself where factors would not be smaller."""
    rows, columns = matrix(shape)
    if rank * (rows + columns) >= rows * columns:
        return (shape,)
    return ((rows, rank), (columns, rank))


def _divisor(size: int, most: int) -> int:
    return next(side for side in range(min(size, most), 0, -1) if size % side == 0)
