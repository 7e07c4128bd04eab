"""Seeded changes to good inputs: to their values where they are JSON, to their headers where they hold tensors."""

from __future__ import annotations

import json
import random
from typing import Any

MOST_BYTES = 64 << 10
_HOSTILE: tuple[Any, ...] = (
    -1, 0, 1, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**40, 10**400, -(2**63), 1.5, -0.0, 1e308, float("nan"),
    float("inf"), True, False, None, "", "a" * 5000, "\ud800", "\x00\x1b[31m", "../../x", "/", "1e9", "０", [], {},
    [[]], [0] * 2000, ["a"] * 300, {"a": {}}, {str(n): n for n in range(300)}, [[[[[[1]]]]]], [-1], [2**62, 0],
)  # fmt: skip
_NESTED = (b"[" * 20_000, b'{"a":' * 10_000, b"[" * 40 + b"]" * 40)
_PIECES = (*_NESTED, b"NaN", b"1" * 5000, b"\\ud800", b"a." * 2000, b"\xff")


def mutated(form: str, seed: bytes, draw: random.Random) -> bytes:
    """A changed input.

    Args:
        form: ``json``, ``lines`` of JSON, ``tensors`` (safetensors), ``message`` (of the wire format), or ``bytes``.
    """
    if draw.random() < 0.15 or form == "bytes":
        return _bytes(seed, draw)[:MOST_BYTES]
    match form:
        case "json":
            found = _json(seed, draw)
        case "lines":
            lines = seed.splitlines()
            lines[draw.randrange(len(lines))] = _json(draw.choice(lines), draw)
            found = b"\n".join(lines) + b"\n"
        case _:  # eight bytes of length, JSON, and what lies behind it
            end = 8 + int.from_bytes(seed[:8], "little")
            header, body = _json(seed[8:end], draw), seed[end:]
            body = _bytes(body, draw) if draw.random() < 0.2 else body
            found = (len(header) + draw.choice((0, 0, 0, 0, 1, -1))).to_bytes(8, "little", signed=True) + header + body
    return found[:MOST_BYTES]


def _json(seed: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.03:
        return draw.choice(_NESTED)
    value = json.loads(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _value(value, draw)
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.8)
    except ValueError:  # an integer of more digits than Python writes
        text = "1" * 5000
    if draw.random() < 0.03:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode(errors="surrogatepass")


def _value(value: Any, draw: random.Random) -> Any:
    """One place of it changed, chosen at random on the way down."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or draw.random() < 0.1:
        return draw.choice(_HOSTILE)
    key, new = draw.choice(keys), (dict(value) if isinstance(value, dict) else list(value))
    match draw.randrange(10):
        case 0:
            del new[key]
        case 1 if isinstance(new, dict):
            new[draw.choice(("", "__metadata__", "a" * 300, "\ud800"))] = draw.choice(_HOSTILE)
        case 1:
            new += [new[key]] * draw.choice((1, 100))
        case 2:
            other = draw.choice(keys)
            new[key], new[other] = new[other], new[key]
        case _:
            new[key] = _value(new[key], draw)
    return new


def _bytes(seed: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(seed) + 1)
    match draw.randrange(6):
        case 0:
            return seed[:at]
        case 1:
            return seed[:at] + draw.randbytes(draw.choice((1, 4, 100))) + seed[at:]
        case 2:
            changed = bytearray(seed)
            for _ in range(draw.choice((1, 1, 8))):
                if changed:
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
            return bytes(changed)
        case 3:
            return seed[:at] + seed[at : at + 200] * draw.choice((2, 50)) + seed[at:]
        case 4:
            return (
                seed[:at] + draw.choice((*_NESTED, b"NaN", b"1" * 5000, b"\\ud800", b"a." * 2000, b"\xff")) + seed[at:]
            )
        case _:
            return draw.randbytes(draw.choice((0, 1, 8, 64, 1000)))
