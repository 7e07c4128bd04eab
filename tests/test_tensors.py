"""Tensors from outside: what a header may say, before a library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from potluck.tensors import load_tensors, read_header


def content(entries: Any, body: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_come_through(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(0, 3, dtype=torch.int64), "c": torch.tensor(1.5)}
    written = save(tensors, metadata={"about": "x"})
    (tmp_path / "t").write_bytes(written)
    for source in (written, tmp_path / "t"):
        found = load_tensors(source)
        assert (
            all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and found.keys() == tensors.keys()
        )
        header = read_header(source)
        assert header.about == {"about": "x"} and header.tensors["a"].shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (content({"a": entry([0, 1 << 62, 1 << 62], [0, 0])}), r"2\^63 bytes"),
        (content({"a": entry([1 << 40], [0, 1 << 42])}), "where the header says"),
        (content({"a": entry([1] * 1000, [0, 4])}, b"abcd"), "without shape or place"),
        (content({"a": entry([-1], [0, 4])}, b"abcd"), "without shape or place"),
        (content({"a": entry([True], [0, 4])}, b"abcd"), "without shape or place"),
        (content({"a": entry([1.0], [0, 4])}, b"abcd"), "without shape or place"),
        (content({"a": entry([1], [0, 4], "F4")}, b"abcd"), "numbers of type F4"),
        (content({"a": entry([1], [0, 4], ["F32"])}, b"abcd"), "numbers of type"),
        (content({"a": entry([1], [4, 8])}, b"abcdefgh"), "do not lie where"),
        (content({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"abcd"), "do not lie where"),
        (content({"a": entry([1], [0, 4])}, b"abcdefgh"), "8 bytes of tensors where the header says 4"),
        (content({"a": {**entry([1], [0, 4]), "more": 1}}, b"abcd"), "no tensor's"),
        (content({"__metadata__": {"a": 1}}), "not texts"),
        (content(b'{"a": 1, "a": 2}'), "a key twice"),
        (content(b"[" * 100_000), "nested deeper"),
        (content(b"[]"), "no object"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "cut off"),
        (b"abc", "cut off"),
        (b"", "cut off"),
    ],
)
def test_what_is_no_safetensors_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(data)
    for source in (data, tmp_path / "t"):
        with pytest.raises(ValueError, match=reason):
            load_tensors(source)
    with pytest.raises(ValueError, match="No such file"):
        load_tensors(tmp_path / "nothing")
