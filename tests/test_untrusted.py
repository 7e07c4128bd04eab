"""JSON from outside: what is refused, in which words, and that a good value comes through as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from potluck.untrusted import Count, Digest, checked, load_json, loads, loads_toml, read_bytes


class Named(BaseModel):
    """A payload's size and hash."""

    bytes: Count
    sha256: Digest


def test_json_comes_through_as_it_is() -> None:
    value = {"a": [1, -2.5, True, None, "é\n𝄞"], "b": {"c": []}, "": 2**63, "most": 2**64 - 1}
    assert loads(json.dumps(value).encode()) == loads(memoryview(json.dumps(value).encode())) == value
    assert loads(json.dumps(value)) == value
    assert loads("[" * 5 + "]" * 5, depth=5) == [[[[[]]]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested deeper than 32"),
        ("[" * 33 + "]" * 33, "nested deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested deeper than 32"),
        ('{"a": 1, "b": 2, "a": 3}', "a key twice"),
        ("[NaN]", "NaN is no JSON"),
        ("-Infinity", "Infinity is no JSON"),
        ("1e999", "not finite"),
        ("1" + "0" * 400, "401 digits"),
        ("-18446744073709551616", "21 digits"),
        ('["\\ud800"]', "surrogates"),
        ('{"a": {"\\uDC00": 1}}', "surrogates"),
        ("[1", "delimiter"),
        ("", "Expecting value"),
        (b"\xff", "utf-8"),
        ('"a"'.encode("utf-16"), "utf-8"),
        (b"[" + b" " * 100 + b"]", "102 bytes of JSON, at most 100"),
    ],
)
def test_what_is_no_json_of_ours_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        loads(text, most_bytes=100 if words.startswith("102") else 1 << 20)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_pairs_of_surrogates_are_text() -> None:
    assert loads('["\\ud83d\\ude00"]') == ["😀"]


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="at most 1000 are read"):
        load_json(path, most_bytes=1000)
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="at most 1000 are read"):
            read_bytes(Path("/dev/zero"), 1000)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"bytes": 5}, "sha256: Field required"),
        ({"bytes": "5", "sha256": "a" * 64}, "bytes: Input should be a valid integer"),
        ({"bytes": True, "sha256": "a" * 64}, "bytes: Input should be a valid integer"),
        ({"bytes": -1, "sha256": "a" * 64}, "bytes: .*greater than or equal to 0"),
        ({"bytes": 2**63, "sha256": "a" * 64}, "bytes: .*less than"),
        ({"bytes": 5, "sha256": "a" * 64 + "\n"}, "sha256: "),
        ([1], "valid dictionary"),
    ],
)
def test_a_value_has_the_type_it_should(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        checked(Named, value)
    assert "\n" not in str(caught.value)
    assert checked(Named, {"bytes": 5, "sha256": "a" * 64}).bytes == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000, "nested deeper than 32"),
        ("a = " + "{a=" * 40 + "1" + "}" * 40, "nested deeper than 32"),
        ("a." * 100_000 + "a = 1", "a key of more than 32 parts"),
        ('"a" . ' * 100 + "a = 1", "a key of more than 32 parts"),
        ("[" + "a." * 100 + "a]", "a key of more than 32 parts"),
        ("a = 1" + "0" * 5000, "digits"),
        ("a = 1\na = 2", "overwrite"),
        ("#" * (5 << 20), "at most"),
    ],
)
def test_what_is_no_toml_of_ours_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loads_toml(text)
    assert loads_toml('a.b = ["x.y.z", 1.5]') == {"a": {"b": ["x.y.z", 1.5]}}
