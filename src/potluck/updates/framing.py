"""How many bytes a message has: from its fields and the forms of its tensors, without their content and without torch.

``docs/reference/wire-format.md`` has the layout; `potluck.updates.codec` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from potluck.contribution import Fields, Header
from potluck.errors import TrainingError
from potluck.updates.sizes import DTYPE_BYTES

FORMAT = 2
Layout = Mapping[str, tuple[str, Sequence[int]]]


def fields_of(message: Literal["task", "contribution"], kind: str, revision: int, header: Header) -> Fields:
    """What a message says beside its tensors."""
    return {"format": FORMAT, "message": message, "kind": kind, "revision": revision, "header": dict(header)}


def as_json(value: Any) -> str:
    """JSON without spaces, keys in order.

    Raises:
        TrainingError: A figure is not finite.
    """
    try:
        return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise TrainingError(f"a message's figures cannot be sent: {error}") from None


def payload_header(tensors: Layout) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, JSON, and blanks up to a multiple of 8.

    Args:
        tensors: Type, as safetensors names it, and shape of each.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name in payload_order(tensors):
        dtype, shape = tensors[name]
        begin, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def payload_order(tensors: Layout) -> list[str]:
    """How safetensors lays tensors out: by type, the widest first, then by name."""
    order = list(DTYPE_BYTES)
    return sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name))


def message_bytes(fields: Fields, tensors: Layout) -> int:
    """Bytes of a message as serialised: 8 for the length of its fields, these as JSON, and the payload.

    Args:
        fields: From ``fields_of``.
        tensors: Type, as safetensors names it, and shape of each.

    Raises:
        TrainingError: A figure is not finite.
    """
    payload = 0
    if tensors:
        payload = len(payload_header(tensors)) + sum(DTYPE_BYTES[d] * math.prod(shape) for d, shape in tensors.values())
        fields = {**fields, "payload": {"bytes": payload, "sha256": "0" * 64}}
    return 8 + len(as_json({**fields, "sha256": "0" * 64})) + payload
