"""Tasks and contributions as bytes: JSON fields, and the tensors as one safetensors payload that they name by its hash.

Layout (``docs/reference/wire-format.md``): 8 bytes of length, the fields, the payload. The fields hold ``format``,
``message`` (``task`` or ``contribution``), ``kind``, ``revision``, ``header``, where there are tensors ``payload``
with its ``bytes`` and ``sha256``, and the ``sha256`` of all these fields. A payload holds tensors and nothing else:
one state that is sent with several tasks is one payload. Nothing in a message is ever unpickled or evaluated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.contribution import Contribution, Fields, Packed, Scalar, Task
from potluck.errors import TrainingError
from potluck.tensors import load_tensors
from potluck.untrusted import loads
from potluck.updates.framing import FORMAT, as_json, fields_of, message_bytes, payload_header, payload_order

MAX_FIELDS_BYTES = 1 << 20
_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_KEPT = {**_DTYPES, torch.float64: "F64"}  # on a disk of one's own
_FIELDS = {"format", "message", "kind", "revision", "header", "sha256"}


def pack(message: Task | Contribution, like: Packed | None = None) -> Packed:
    """A message without copying its tensors: the payload is views of them.

    Args:
        like: Another message with the same tensors, which then need not be read and hashed again.

    Raises:
        TrainingError: A figure is not finite, or a tensor has a type that is not sent.
    """
    fields = _fields(message)
    if not message.tensors:
        return Packed(fields=_hashed(fields))
    if like is not None:
        return Packed(fields=_hashed({**fields, "payload": like.fields["payload"]}), parts=like.parts)
    parts = _parts(message.tensors, _DTYPES)
    size, digest = sum(part.nbytes for part in parts), hashlib.sha256()
    for part in parts:
        digest.update(part)
    return Packed(fields=_hashed({**fields, "payload": {"bytes": size, "sha256": digest.hexdigest()}}), parts=parts)


def payload_parts(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Tensors as a safetensors file in parts: the header, then each tensor's bytes; float64 too, which is not sent."""
    return _parts(tensors, _KEPT)


def _parts(tensors: Mapping[str, Tensor], types: Mapping[torch.dtype, str]) -> list[memoryview]:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layout = {name: (_type(tensor, types), tuple(tensor.shape)) for name, tensor in ready.items()}
    content = [ready[name].reshape(-1).view(torch.uint8).numpy() for name in payload_order(layout)]
    return [memoryview(payload_header(layout)), *(part.data for part in content if part.size)]


def unpack(fields: Any, payload: bytes | Path | None) -> Task | Contribution:
    """A message from fields and a payload of unknown origin, whose size and hash the caller has checked.

    Args:
        payload: The bytes, or a file of them, which is mapped and read only where it is used; it must not change.

    Raises:
        TrainingError: It is not a message of this format.
    """
    try:
        kind, revision, values = _checked(fields)
        if ("payload" in fields) != (payload is not None):
            raise ValueError("a payload that is not named, or is missing")
        tensors = {} if payload is None else load_tensors(payload)
        if any(tensor.dtype not in _DTYPES for tensor in tensors.values()):
            raise ValueError("a tensor of a type that is not sent")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"not a message of format {FORMAT}: {error}") from None
    if fields["message"] == "task":
        return Task(kind=kind, revision=revision, parameters=values, tensors=tensors)
    return Contribution(kind=kind, revision=revision, header=values, tensors=tensors)


def encode(message: Task | Contribution) -> bytes:
    """A message as bytes, ``wire_bytes(message)`` of them; raises what ``pack`` raises."""
    packed = pack(message)
    fields = as_json(packed.fields).encode()
    return b"".join([len(fields).to_bytes(8, "little"), fields, *packed.parts])


def decode(data: bytes, max_bytes: int) -> Task | Contribution:
    """A message from bytes of unknown origin.

    Args:
        data: What arrived.
        max_bytes: More than this is refused unread.

    Raises:
        TrainingError: Too large, not a message of this format, or its payload does not match its hash.
    """
    if len(data) > max_bytes:
        raise TrainingError(f"a message of {len(data)} bytes is larger than the {max_bytes} allowed")
    fields, payload = split_message(data)
    return unpack(fields, payload)


def split_message(data: bytes) -> tuple[Any, bytes | None]:
    """A message's fields and its payload, which is held to the size and hash that the fields name.

    Raises:
        TrainingError: The fields cannot be read, or the payload is another.
    """
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        if not 10 <= end <= min(8 + MAX_FIELDS_BYTES, len(data)):
            raise ValueError(f"fields of {end - 8} bytes")
        fields = loads(data[8:end], most_bytes=MAX_FIELDS_BYTES)
        payload = fields.get("payload")
        if payload is None and len(data) > end:
            raise ValueError("a payload that is not named")
        if payload is None:
            return fields, None
        size, digest = payload["bytes"], payload["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"not a message of format {FORMAT}: {error}") from None
    if size != len(data) - end:
        raise TrainingError(f"not a message of format {FORMAT}: a payload of {len(data) - end} bytes, {size} are named")
    if hashlib.sha256(memoryview(data)[end:]).hexdigest() != digest:
        raise TrainingError("a message's content does not match its hash")
    return fields, data[end:]


def wire_bytes(message: Task | Contribution) -> int:
    """How many bytes ``encode(message)`` has, without encoding; raises what it raises."""
    tensors = {name: (_type(tensor), tuple(tensor.shape)) for name, tensor in message.tensors.items()}
    return message_bytes(_fields(message), tensors)


def _fields(message: Task | Contribution) -> Fields:
    if isinstance(message, Task):
        return fields_of("task", message.kind, message.revision, message.parameters)
    return fields_of("contribution", message.kind, message.revision, message.header)


def _hashed(fields: Fields) -> Fields:
    return {**fields, "sha256": hashlib.sha256(as_json(fields).encode()).hexdigest()}


def _type(tensor: Tensor, types: Mapping[torch.dtype, str] = _DTYPES) -> str:
    if tensor.dtype not in types:
        raise TrainingError(f"tensors of {tensor.dtype} cannot be sent")
    return types[tensor.dtype]


def _checked(fields: Any) -> tuple[str, int, dict[str, Scalar]]:
    kind, revision, values = fields["kind"], fields["revision"], fields["header"]
    if fields["format"] != FORMAT or fields["message"] not in ("task", "contribution"):
        raise ValueError(f"format {fields['format']!r}, message {fields['message']!r}")
    if not isinstance(kind, str) or type(revision) is not int or revision < 0 or not isinstance(values, dict):
        raise ValueError("kind, revision or header has the wrong type")
    if not _FIELDS <= fields.keys() <= {*_FIELDS, "payload"}:
        raise ValueError(f"fields {', '.join(sorted(map(str, fields)))}")
    for value in values.values():
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError("a header value is not a finite scalar")
    if _hashed({key: value for key, value in fields.items() if key != "sha256"}) != fields:
        raise ValueError("its fields do not match their hash")
    return kind, revision, values
