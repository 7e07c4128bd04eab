"""What a participant sends of its edits and its text, and what of it may be added up.

Of each layer ``M = Rᵀ K`` (``product``), ``G = Kᵀ K`` (``gram``) and ``Σ k kᵀ`` over its text (``moment``). Of a
symmetric matrix the upper triangle travels; doubles as the int64 of the same bits, masked numbers in fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from potluck.aggregation.masks import fixed, floating, mask
from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.contribution import Contribution
from potluck.edit.layout import Layout
from potluck.edit.moments import squared_keys
from potluck.edit.together.maps import Maps
from potluck.errors import EditError
from potluck.recipe.editing import Editing

MOMENT, GRAM, PRODUCT = "moment", "gram", "product"
_SEQUENCES = 16  # in a batch
_FEWER_BITS = 10  # behind the point: moments are sums over many tokens
_SLACK = 1e-4  # of the mean diagonal: rounding to fp32


@dataclass(frozen=True)
class Wire:
    """How numbers travel.

    Attributes:
        numbers: ``double`` or ``single``, if they are not masked; moments, of which one message is sent, are doubles.
        fraction: Bits behind the point of masked ones; ``None`` does not mask.
    """

    numbers: str = "double"
    fraction: int | None = None

    def type_of(self, name: str) -> torch.dtype:
        """Of one tensor as it travels."""
        rounded = self.fraction is None and self.numbers == "single" and not name.endswith(MOMENT)
        return torch.float32 if rounded else torch.int64

    def bits(self, name: str) -> int:
        """Behind the point of one tensor's masked numbers."""
        assert self.fraction is not None
        return self.fraction - (_FEWER_BITS if name.endswith(MOMENT) else 0)


@dataclass(frozen=True)
class Hiding:
    """Whose masks are put on: secret, name, all who send, and what no other sum has in common with this one."""

    secret: bytes
    name: str
    parties: tuple[str, ...]
    context: str


def wire_of(editing: Editing) -> Wire:
    """A recipe's."""
    return Wire(editing.numbers, None if editing.masks is None else editing.masks.fraction_bits)


def moment_shapes(maps: Maps) -> dict[str, tuple[int, ...]]:
    """Names and shapes of key moments as they travel."""
    return {f"{layer}.{MOMENT}": (_triangle(m.d_in),) for layer, m in maps.items()}


def edit_shapes(maps: Maps, layers: Sequence[int], products: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the statistics of edits as they travel."""
    grams: dict[str, tuple[int, ...]] = {f"{layer}.{GRAM}": (_triangle(maps[layer].d_in),) for layer in layers}
    return grams | {f"{layer}.{PRODUCT}": (maps[layer].d_out, maps[layer].d_in) for layer in layers if products}


def message_bytes(maps: Maps, editing: Editing) -> int:
    """Of the largest message of statistics, without its header."""
    size = 8 if editing.masks is not None or editing.numbers == "double" else 4
    layers = [_triangle(m.d_in) + m.d_in * m.d_out for m in maps.values()]
    moments = 8 * sum(_triangle(m.d_in) for m in maps.values())
    return max(moments, size * (sum(layers) if editing.form == "one-shot" else max(layers)))


def edit_sums(keys: Mapping[int, Tensor], residuals: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """``M`` and the upper triangle of ``G`` of each layer, float64.

    Args:
        keys: ``(E, d_in)`` by layer.
        residuals: ``(E, d_out)`` by layer; without them there is no M.
    """
    found = {f"{layer}.{GRAM}": upper(k.T @ k) for layer, k in keys.items()}
    return found | {f"{layer}.{PRODUCT}": r.T @ keys[layer] for layer, r in residuals.items()}


def token_moments(
    base: Base, layout: Layout, layers: Sequence[int], tokens: np.ndarray, sequence_length: int
) -> dict[str, Tensor]:
    """Upper triangle of ``Σ k kᵀ`` over a stream of tokens, float64, as `potluck.edit.moments` takes it of texts.

    Args:
        tokens: Token ids, ``(T,)``; what does not fill a sequence is left out.

    Raises:
        EditError: The text is shorter than one sequence.
    """
    count = len(tokens) // sequence_length
    if not count:
        raise EditError(f"the text is shorter than one sequence of {sequence_length} tokens")
    rows = torch.from_numpy(tokens[: count * sequence_length].astype(np.int64)).view(count, sequence_length)
    sums, _ = squared_keys(base, layout, layers, rows.split(_SEQUENCES))
    return {f"{layer}.{MOMENT}": upper(total) for layer, total in sums.items()}


def packed(sums: Mapping[str, Tensor], wire: Wire, hiding: Hiding | None) -> dict[str, Tensor]:
    """Statistics as they travel.

    Raises:
        EditError: A number does not fit its fixed point.
    """
    if wire.fraction is None:
        return {
            name: tensor.float() if wire.type_of(name) == torch.float32 else tensor.contiguous().view(torch.int64)
            for name, tensor in sums.items()
        }
    assert hiding is not None
    drawn = partial(mask, hiding.secret)
    found = {}
    for name, tensor in sums.items():
        try:
            whole = fixed(tensor, wire.bits(name), len(hiding.parties))
        except ValueError as error:
            raise EditError(f"{name}: {error}", "lower editing.masks.fraction_bits") from None
        covered = drawn(f"{hiding.context}\n{name}", hiding.name, hiding.parties, whole.numel())
        found[name] = whole + covered.view(whole.shape)
    return found


def received(
    name: str,
    contribution: Contribution,
    shapes: Mapping[str, tuple[int, ...]],
    base_hash: str,
    wire: Wire,
    most: int,
) -> Statistics:
    """Statistics of unknown origin, checked as far as they can be read.

    Args:
        most: They count no more than that, for no more was asked for.

    Raises:
        EditError: They are of another model, have other names, shapes or types, are not finite, or are no sums of
            squares.
    """
    said, tensors = contribution.header, contribution.tensors
    if said.get("base") != base_hash:
        raise EditError(f"{name}: its statistics are of another model, {str(said.get('base'))[:12]}")
    if tensors.keys() != dict(shapes).keys():
        wrong = ", ".join(sorted(tensors.keys() ^ dict(shapes).keys())[:4])
        raise EditError(f"{name}: its statistics are not those that were asked for: {wrong}")
    count = said.get("count")
    if type(count) is not int or not 0 <= count <= most:
        raise EditError(f"{name}: a count of {str(count)[:20]}, at most {most} were asked for")
    found = {}
    for key, shape in shapes.items():
        tensor, dtype = tensors[key], wire.type_of(key)
        if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
            raise EditError(f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {tuple(shape)}")
        if wire.fraction is None:
            tensor = tensor.double() if dtype == torch.float32 else tensor.view(torch.float64)
            _check_readable(name, key, tensor)
        found[key] = tensor
    return Statistics(contribution.kind, found, max(count, 1), base_hash)


def read_sum(total: Statistics, wire: Wire) -> dict[str, Tensor]:
    """Sums in float64; symmetric matrices whole, ``(d_in, d_in)``.

    Raises:
        EditError: A sum is no sum of squares: masked statistics can be checked no earlier.
    """
    found = {}
    for key, tensor in total.tensors.items():
        number = tensor if wire.fraction is None else floating(tensor, wire.bits(key))
        _check_readable("the sum", key, number)
        found[key] = number if key.endswith(PRODUCT) else symmetric(number)
    return found


def upper(matrix: Tensor) -> Tensor:
    """The upper triangle of ``(n, n)``, ``(n (n + 1) / 2,)``."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(triangle: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle."""
    size = int((8 * triangle.numel() + 1) ** 0.5) // 2
    rows, columns = torch.triu_indices(size, size)
    whole = torch.zeros(size, size, dtype=triangle.dtype)
    whole[rows, columns] = triangle
    whole[columns, rows] = triangle
    return whole


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _check_readable(name: str, key: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise EditError(f"{name}: {key} holds NaN or infinite values")
    if key.endswith(PRODUCT):
        return
    matrix = symmetric(tensor)
    scale = matrix.diagonal().clamp(min=0).mean()
    matrix.diagonal().add_(_SLACK * scale + torch.finfo(torch.float64).tiny)
    if int(torch.linalg.cholesky_ex(matrix)[1]):
        raise EditError(f"{name}: {key} is no sum of squares, it is negative in some direction")
