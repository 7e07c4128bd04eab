"""Tasks and contributions as bytes: one safetensors file with a JSON header and a hash.

Layout (``docs/reference/wire-format.md``): a safetensors file whose metadata hold ``potluck``, a JSON object with
``format``, ``message`` (``task`` or ``contribution``), ``kind``, ``revision``, ``header`` and ``sha256``, the
hash of all tensor bytes in order of the tensors' names. Nothing in it is ever unpickled or evaluated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from potluck.contribution import Contribution, Scalar, Task
from potluck.errors import TrainingError

FORMAT = 1
MAX_HEADER_BYTES = 1 << 20
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}


def encode(message: Task | Contribution) -> bytes:
    """A message as bytes, ``wire_bytes(message)`` of them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in message.tensors.items()}
    return bytes(save(tensors, {"potluck": _header(message, _hash(tensors))}))


def decode(data: bytes, max_bytes: int) -> Task | Contribution:
    """A message from bytes of unknown origin.

    Args:
        data: What arrived.
        max_bytes: More than this is refused unread.

    Raises:
        TrainingError: Too large, not a message of this format, or its hash does not match its content.
    """
    if len(data) > max_bytes:
        raise TrainingError(f"a message of {len(data)} bytes is larger than the {max_bytes} allowed")
    try:
        header = json.loads(_metadata(data)["potluck"])
        tensors = load(data)
        fields = _checked(header)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"not a message of format {FORMAT}: {error}") from None
    if _hash(tensors) != header["sha256"]:
        raise TrainingError("a message's content does not match its hash")
    kind, revision, values = fields
    if header["message"] == "task":
        return Task(kind=kind, revision=revision, parameters=values, tensors=tensors)
    return Contribution(kind=kind, revision=revision, header=values, tensors=tensors)


def wire_bytes(message: Task | Contribution) -> int:
    """How many bytes ``encode(message)`` has, without encoding."""
    offset = 0
    entries: dict[str, Any] = {"__metadata__": {"potluck": _header(message, "0" * 64)}}
    for name, tensor in sorted(message.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (header + 7) // 8 * 8 + offset


def _header(message: Task | Contribution, digest: str) -> str:
    task = isinstance(message, Task)
    fields = {
        "format": FORMAT,
        "message": "task" if task else "contribution",
        "kind": message.kind,
        "revision": message.revision,
        "header": dict(message.parameters if isinstance(message, Task) else message.header),
        "sha256": digest,
    }
    return json.dumps(fields, separators=(",", ":"), sort_keys=True)


def _checked(header: Any) -> tuple[str, int, dict[str, Scalar]]:
    kind, revision, values = header["kind"], header["revision"], header["header"]
    if header["format"] != FORMAT or header["message"] not in ("task", "contribution"):
        raise ValueError(f"format {header['format']!r}, message {header['message']!r}")
    if not isinstance(kind, str) or type(revision) is not int or revision < 0 or not isinstance(values, dict):
        raise ValueError("kind, revision or header has the wrong type")
    if not isinstance(header["sha256"], str):
        raise ValueError("sha256 has the wrong type")
    if not all(isinstance(value, str | int | float | bool) for value in values.values()):
        raise ValueError("a header value is not a scalar")
    return kind, revision, values


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {length} bytes")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if not isinstance(metadata, dict):
        raise ValueError("no metadata")
    return metadata


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
