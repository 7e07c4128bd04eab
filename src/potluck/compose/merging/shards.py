"""Model folders read and written a few rows at a time: safetensors files by position, never a whole model.

Files are read and written, not mapped: memory is what the caller holds, and a file that shrinks is an error and no
crash. The format: 8 bytes with the header's length, a JSON header with each tensor's type, shape and place, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.errors import ModelError
from potluck.files import storing
from potluck.models.folder import INDEX, WEIGHTS, Stored
from potluck.tensors import SIZES

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's form, and where it lies.

    Attributes:
        dtype: As safetensors names it.
        file: Descriptor of the open file.
        begin: Its first byte in the file.
        path: Of the file, for messages.
    """

    dtype: str
    shape: tuple[int, ...]
    file: int = -1
    begin: int = 0
    path: Path = Path()

    @property
    def rows(self) -> int:
        """The first dimension; a vector or a scalar is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return SIZES[self.dtype] * math.prod(self.shape)

    def read(self, first_row: int, into: Tensor) -> Tensor:
        """Fill ``into``, ``(rows, columns)``, float32 and contiguous, from a row on; for types in `FLOATS`.

        Raises:
            ModelError: The file cannot be read, or ends before.
        """
        begin = first_row * self.columns * SIZES[self.dtype]
        if self.dtype == "F32":
            self._read_bytes(begin, into.view(-1).view(torch.uint8))
            return into
        stored = torch.empty(into.shape, dtype=FLOATS[self.dtype])
        self._read_bytes(begin, stored.view(-1).view(torch.uint8))
        return into.copy_(stored)

    def announce(self) -> None:
        """Let the system read ahead."""
        os.posix_fadvise(self.file, self.begin, self.nbytes, os.POSIX_FADV_WILLNEED)

    def chunks(self, size: int = 1 << 24) -> Iterator[Tensor]:
        """Its bytes, in pieces."""
        for begin in range(0, self.nbytes, size):
            piece = torch.empty(min(size, self.nbytes - begin), dtype=torch.uint8)
            self._read_bytes(begin, piece)
            yield piece

    def write(self, first_row: int, rows: Tensor) -> None:
        """Store rows, in this tensor's type."""
        stored = rows.to(FLOATS[self.dtype]).view(torch.uint8)
        self.write_bytes(first_row * self.columns * SIZES[self.dtype], stored)

    def write_bytes(self, begin: int, data: Tensor) -> None:
        """Store bytes at a place within this tensor."""
        left, position = data.flatten().numpy().data, self.begin + begin
        while left:
            written = os.pwrite(self.file, left, position)
            left, position = left[written:], position + written

    def _read_bytes(self, begin: int, data: Tensor) -> None:
        left, position = data.numpy().data, self.begin + begin
        while left:
            try:
                got = os.preadv(self.file, [left], position)
            except OSError as error:
                raise ModelError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not got:
                raise ModelError(f"{self.path}: has become shorter while it was read")
            left, position = left[got:], position + got


@contextmanager
def opened(weights: Mapping[str, Stored]) -> Iterator[dict[str, StoredTensor]]:
    """Stored tensors under the same names; within, their files are open.

    Raises:
        ModelError: A file cannot be opened.
    """
    files: dict[Path, int] = {}
    try:
        for path in {tensor.path: None for tensor in weights.values()}:
            try:
                files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
        yield {name: StoredTensor(t.dtype, t.shape, files[t.path], t.begin, t.path) for name, t in weights.items()}
    finally:
        for file in files.values():
            os.close(file)


@contextmanager
def created(
    folder: Path, tensors: Mapping[str, StoredTensor], max_shard_bytes: int
) -> Iterator[dict[str, StoredTensor]]:
    """New files for tensors of the types and shapes of these, at full size; within, they can be written.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files: list[int] = []
    try:
        stored: dict[str, StoredTensor] = {}
        with storing(folder):
            for name, shard in zip(names, shards, strict=True):
                files.append(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
                stored |= _laid_out(folder / name, files[-1], {key: tensors[key] for key in shard})
            yield stored
            for file in files:
                os.fsync(file)
            if count > 1:
                total = sum(tensor.nbytes for tensor in stored.values())
                places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
                index = {"metadata": {"total_size": total}, "weight_map": places}
                (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    finally:
        for file in files:
            os.close(file)


def _shards(tensors: Mapping[str, StoredTensor], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut where a file would become too large; one holds at least one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _laid_out(path: Path, file: int, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Write the header of a file and reserve its space."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
    os.posix_fallocate(file, 0, data + end)
    places = {name: data + header[name]["data_offsets"][0] for name in tensors}
    return {name: StoredTensor(t.dtype, t.shape, file, places[name], path) for name, t in tensors.items()}
