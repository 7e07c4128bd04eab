"""Messages as bytes: what is encoded comes back, and nothing else comes through."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from potluck.contribution import Contribution, Task
from potluck.errors import TrainingError
from potluck.updates import codec
from potluck.updates.codec import decode, encode, wire_bytes

LIMIT = 1 << 20
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
scalars = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
)  # fmt: skip
headers = st.dictionaries(names, scalars, max_size=5)


@st.composite
def tensors(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64]))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@st.composite
def messages(draw) -> Task | Contribution:
    kind, revision = draw(names), draw(st.integers(0, 10**12))
    header, content = draw(headers), draw(st.dictionaries(names, tensors(), max_size=6))
    if draw(st.booleans()):
        return Task(kind=kind, revision=revision, parameters=header, tensors=content)
    return Contribution(kind=kind, revision=revision, header=header, tensors=content)


MESSAGE = Contribution(
    kind="train", revision=3, header={"loss": 2.5, "tokens": 640},
    tensors={"parameters": torch.arange(40.0), "other": torch.ones(3, dtype=torch.int64)},
)  # fmt: skip
DATA = encode(MESSAGE)


HALVES = {"y": torch.ones(2, 3, dtype=torch.bfloat16), "x": torch.empty(0, 2, dtype=torch.float16)}


@given(messages())
@example(Task(kind="\x1f", revision=0, tensors=HALVES))
@settings(deadline=None)
def test_what_is_encoded_comes_back_in_as_many_bytes_as_said(message) -> None:
    data = encode(message)
    assert len(data) == wire_bytes(message)
    back = decode(data, LIMIT)
    assert (type(back), back.kind, back.revision) == (type(message), message.kind, message.revision)
    assert getattr(back, "parameters", None) == getattr(message, "parameters", None)
    assert getattr(back, "header", None) == getattr(message, "header", None)
    assert back.tensors.keys() == message.tensors.keys()
    for name, tensor in message.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor) and back.tensors[name].shape == tensor.shape


def test_views_and_transposes_are_sent_as_they_look() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    message = Task(kind="train", revision=0, tensors={"column": table[:, 1], "turned": table.T, "again": table})
    assert len(encode(message)) == wire_bytes(message)
    assert torch.equal(decode(encode(message), LIMIT).tensors["turned"], table.T)


def test_every_flipped_bit_is_noticed() -> None:
    passed = []
    for position in range(8 * len(DATA)):
        flipped = bytearray(DATA)
        flipped[position // 8] ^= 1 << position % 8
        try:
            decode(bytes(flipped), LIMIT)
        except TrainingError:
            continue
        passed.append(position // 8)
    assert bytes(DATA[i] for i in dict.fromkeys(passed)) == b""


def test_every_cut_and_every_addition_is_noticed() -> None:
    for damaged in [*(DATA[:length] for length in range(len(DATA))), DATA + b"\0", b"\0" + DATA, DATA + DATA]:
        with pytest.raises(TrainingError, match="not a message of format 2"):
            decode(damaged, LIMIT)


def test_too_large_is_refused_unread() -> None:
    decode(DATA, len(DATA))
    with pytest.raises(TrainingError, match=f"{len(DATA)} bytes is larger than the {len(DATA) - 1} allowed"):
        decode(DATA, len(DATA) - 1)


def file_of(fields: object, payload: bytes = b"") -> bytes:
    """Any fields, with the hash that they should have."""
    if isinstance(fields, dict):
        fields = {**fields, "sha256": hashlib.sha256(canonical(fields)).hexdigest()}
    text = canonical(fields)
    return len(text).to_bytes(8, "little") + text + payload


def canonical(fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def with_payload(payload: bytes) -> bytes:
    named = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    return file_of({**EMPTY, "payload": named}, payload)


def claiming(entry: object) -> bytes:
    header = json.dumps({"x": entry}).encode()
    return with_payload(len(header).to_bytes(8, "little") + header)


EMPTY = {"format": 2, "message": "task", "kind": "train", "revision": 0, "header": {}}
STRANGE = {
    "another format": file_of({**EMPTY, "format": 1}),
    "another message": file_of({**EMPTY, "message": "reply"}),
    "kind is a number": file_of({**EMPTY, "kind": 3}),
    "revision is true": file_of({**EMPTY, "revision": True}),
    "revision is negative": file_of({**EMPTY, "revision": -1}),
    "revision is missing": file_of({key: value for key, value in EMPTY.items() if key != "revision"}),
    "a list in the header": file_of({**EMPTY, "header": {"steps": [1]}}),
    "NaN in the header": file_of({**EMPTY, "header": {"loss": float("nan")}}),
    "the header is a list": file_of([EMPTY]),
    "a field too many": file_of({**EMPTY, "sender": "ada"}),
    "a payload that is not named": file_of(EMPTY, b"more"),
    "a payload that is missing": file_of({**EMPTY, "payload": {"bytes": 4, "sha256": "0" * 64}}),
    "a payload of no size": file_of({**EMPTY, "payload": {"sha256": "0" * 64}}),
    "a payload that is a number": file_of({**EMPTY, "payload": 4}, b"more"),
    "a payload that is no safetensors": with_payload(b"more"),
    "four terabytes of zeros in 70 bytes": claiming({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
    "a tensor that ends before it begins": claiming({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
    "a type that is not sent": claiming({"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}),
    "another hash": canonical({**EMPTY, "sha256": "0" * 64}),
    "huge fields": (1 << 62).to_bytes(8, "little") + b"{}" * 100,
    "fields over the bound": file_of({**EMPTY, "header": {"x": "y" * codec.MAX_FIELDS_BYTES}}),
    "a deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a pickle": pickle.dumps(MESSAGE.header),
    "nothing": b"",
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_what_is_not_a_message_is_refused(data) -> None:
    with pytest.raises(TrainingError, match="not a message of format 2"):
        decode(data, 1 << 23)


def test_a_type_without_a_name_in_the_format_is_refused() -> None:
    message = Task(kind="train", revision=0, tensors={"x": torch.zeros(2, dtype=torch.float64)})
    for attempt in (encode, wire_bytes):
        with pytest.raises(TrainingError, match="float64 cannot be sent"):
            attempt(message)


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_not_sent(figure) -> None:
    for attempt in (encode, wire_bytes):
        with pytest.raises(TrainingError, match="figures cannot be sent"):
            attempt(Contribution(kind="train", revision=0, header={"loss": figure}))
