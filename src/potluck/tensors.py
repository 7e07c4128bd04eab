"""Tensors from outside, as safetensors: their header is checked before a library reads it or memory is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from potluck.untrusted import MAX_BYTES, loads

if TYPE_CHECKING:  # headers are read without torch
    from torch import Tensor

SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_DIMENSIONS = 8
_MAX_NAME = 1000  # characters


class Entry(NamedTuple):
    """A tensor's form, and where it lies in the file.

    Attributes:
        dtype: As safetensors names it.
        begin: Its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        about: Its ``__metadata__``.
    """

    tensors: dict[str, Entry]
    about: dict[str, str]


def read_header(source: bytes | Path) -> Header:
    """The header of a content or file, held against its size.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no safetensors, is cut off, or holds what is no tensor.
    """
    if isinstance(source, Path):
        size = source.stat().st_size
        with source.open("rb") as file:
            text = file.read(min(_header_bytes(file.read(8), size), MAX_BYTES))
    else:
        size = len(source)
        text = source[8 : 8 + _header_bytes(source[:8], size)]
    entries = loads(text, depth=3)
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    about = entries.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its metadata are not texts")
    data = 8 + len(text)
    tensors = {name: _entry(name, entry, data) for name, entry in entries.items()}
    end = data
    for begin, length in sorted((entry.begin, _bytes(entry)) for entry in tensors.values()):
        if begin != end:
            raise ValueError("its tensors do not lie where the header says")
        end += length
    if end != size:
        raise ValueError(f"{size - data} bytes of tensors where the header says {end - data}")
    return Header(tensors, about)


def load_tensors(source: bytes | Path) -> dict[str, Tensor]:
    """The tensors of a content or file; a file's are mapped, and read where they are used.

    Raises:
        ValueError: The file cannot be read, or it is no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        read_header(source)
        return load_file(source) if isinstance(source, Path) else load(source)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(str(error).partition("\n")[0][:300]) from None


def _header_bytes(start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_BYTES, size - 8):
        raise ValueError("not safetensors, or cut off")
    return length


def _entry(name: str, entry: Any, data: int) -> Entry:
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"} or len(name) > _MAX_NAME:
        raise ValueError("an entry that is no tensor's")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"numbers of type {str(dtype)[:20]}")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError("a tensor without shape or place")
    if math.prod(max(1, side) for side in shape) * SIZES[dtype] >= 1 << 63:  # as its strides must be counted
        raise ValueError("a tensor of 2^63 bytes or more")
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise ValueError("its tensors do not lie where the header says")
    return Entry(dtype, tuple(shape), data + offsets[0])


def _counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _bytes(entry: Entry) -> int:
    return SIZES[entry.dtype] * math.prod(entry.shape)
