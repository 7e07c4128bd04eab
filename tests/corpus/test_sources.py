"""Every kind of source gives its documents, and a fault gives one clear error."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from potluck.corpus.sources import documents, fingerprint
from potluck.errors import CorpusError
from potluck.recipe.sources import Source


def source(**keys: Any) -> Source:
    return TypeAdapter(Source).validate_python(keys)


def names(**keys: Any) -> list[str]:
    return [document.name for document in documents(source(**keys))]


def test_folder_takes_text_in_path_order_and_leaves_binary_empty_and_hidden_files(tmp_path: Path) -> None:
    for name, content in {
        "b/z.md": b"z",
        "a.md": b"a\r\n",
        "b.md": "ü".encode(),
        "latin.md": b"\xff\xfe",
        "zero.md": b"a\0b",
        "blank.md": b" \n",
        ".git/config": b"x",
        "b/c/d.txt": b"d",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = list(documents(source(path=str(tmp_path))))
    assert [(d.name, d.text, d.group) for d in found] == [
        ("a.md", "a\r\n", "a.md"),
        ("b.md", "ü", "b.md"),
        ("b/c/d.txt", "d", "b"),
        ("b/z.md", "z", "b"),
    ]
    assert names(path=str(tmp_path), glob="b/**/*.txt") == ["b/c/d.txt"]
    assert names(path=str(tmp_path), glob="*.md") == ["a.md", "b.md"]
    shuffled = names(path=str(tmp_path), order="shuffled")
    assert sorted(shuffled) == [d.name for d in found] and shuffled == names(path=str(tmp_path), order="shuffled")


def test_packages_are_read_without_importing_them() -> None:
    before = set(sys.modules)
    numpy = names(package="numpy")
    assert "linalg/__init__.py" in numpy and not any("tests/" in name for name in numpy)
    stdlib = names(package="stdlib")
    assert {"abc.py", "json/decoder.py"} <= set(stdlib)
    assert not any(name.startswith(("site-packages/", "test/", "idlelib/")) for name in stdlib)
    assert names(package="typing_extensions") == ["typing_extensions.py"]
    assert not {name for name in set(sys.modules) - before if name.startswith("numpy.")}


@pytest.mark.parametrize("package", ["no_such_package_here", "os.path", "../x", "sys", ""])
def test_a_package_without_source_is_an_error(package: str) -> None:
    with pytest.raises(CorpusError, match="package"):
        names(package=package)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
        ('{"text": "a"}\n\n[1]', "line 3 is not a JSON object"),
        ('{"body": "a", "id": 1}', r"no field 'text', only 'body', 'id'"),
        ('{"text": 3}', "field 'text' is a number, not text"),
        ('{"text": null}', "field 'text' is null, not text"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ('{"text": " "}', "holds no text"),
        ("", "holds no text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(CorpusError, match=message) as error:
        names(jsonl=str(path))
    assert "body" not in lines or 'field = "body"' in error.value.hint


def test_one_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear Ben")
    (found,) = documents(source(path=str(path)))
    assert (found.name, found.text) == ("letter.txt", "Dear Ben")
    before = fingerprint(source(path=str(path)))
    path.write_text("Dear Ada")
    assert fingerprint(source(path=str(path))) != before
    with pytest.raises(CorpusError, match="`glob` has no effect"):
        names(path=str(path), glob="*.md")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    with pytest.raises(CorpusError, match="JSON lines"):
        names(path=str(tmp_path / "rows.jsonl"))


def test_json_lines_with_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}", "who": i % 2}) + "\n" for i in range(3)))
    found = list(documents(source(jsonl=str(path), field="body", group_field="who")))
    assert [(d.name, d.text, d.group) for d in found] == [
        ("a.jsonl:1", "text 0", "0"),
        ("a.jsonl:2", "text 1", "1"),
        ("a.jsonl:3", "text 2", "0"),
    ]


def test_separated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<<<FILE docs/a.md>>>\n\nfirst\n<<<FILE b.md>>>\n \n<<<FILE c.md>>>\nlast <<<FILE x")
    found = list(documents(source(file=str(path))))
    assert [(d.name, d.text, d.group) for d in found] == [
        ("docs/a.md", "\nfirst\n", "docs"),
        ("c.md", "last <<<FILE x", "c.md"),
    ]
    with pytest.raises(CorpusError, match="line 1 is text before any line that starts with '=== '"):
        names(file=str(path), separator="=== ")


@pytest.mark.parametrize("keys", [{"path": "nowhere"}, {"jsonl": "nowhere"}, {"file": "nowhere"}])
def test_a_missing_source_is_an_error(tmp_path: Path, keys: dict[str, str]) -> None:
    missing = source(**{key: str(tmp_path / value) for key, value in keys.items()})
    for reading in (fingerprint, lambda s: list(documents(s))):
        with pytest.raises(CorpusError) as error:
            reading(missing)
        assert str(error.value).count("nowhere") == 1 and "is relative to" in error.value.hint
    (tmp_path / "nowhare").mkdir()
    with pytest.raises(CorpusError) as error:
        fingerprint(missing)
    assert error.value.hint == f"did you mean {tmp_path / 'nowhare'}?"


def test_files_that_are_no_text_are_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\0")
    (tmp_path / "b.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(CorpusError) as error:
        names(path=str(tmp_path))
    assert error.value.hint.count("of its files") == 1 and "a.png" in error.value.hint and "b.txt" in error.value.hint


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra `datasets`")
def test_a_dataset_on_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", " ", "two"], "who": ["a", "b", "a"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
    found = list(documents(source(dataset=str(tmp_path / "d"), group_field="who")))
    assert [(d.name, d.text, d.group) for d in found] == [("0", "one", "a"), ("2", "two", "a")]
    assert fingerprint(source(dataset=str(tmp_path / "d"))) == fingerprint(source(dataset=str(tmp_path / "d")))
    with pytest.raises(CorpusError, match="no split 'test', only train"):
        names(dataset=str(tmp_path / "d"), split="test")
    with pytest.raises(CorpusError, match="no field 'body', only 'text', 'who'"):
        names(dataset=str(tmp_path / "d"), field="body")
    with pytest.raises(CorpusError, match="cannot be loaded"):
        names(dataset=str(tmp_path))
