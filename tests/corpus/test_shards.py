"""Shards hold exactly the text, are built once, and appear complete or not at all."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.corpus.shards import Shard, build_corpus
from potluck.corpus.tokenizer import PIECE_CHARACTERS, Vocabulary
from potluck.errors import CorpusError, StorageError
from potluck.recipe import Recipe, parse_recipe


def write(path: Path, documents: int, start: int = 0) -> None:
    rows = (json.dumps({"text": f"Document {i}: ü {i * i}.\n" * (1 + i % 5)}) for i in range(start, start + documents))
    path.write_text("\n".join(rows))


def recipe(folder: Path, **tables: Any) -> Recipe:
    files = sorted(folder.glob("*.jsonl"))
    return parse_recipe(
        {
            "data": {"shards": str(folder / "shards"), "validation_fraction": 0.2},
            "participants": [{"name": file.stem, "source": {"jsonl": str(file)}} for file in files],
            **tables,
        }
    )


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write(tmp_path / "ann.jsonl", 200)
    write(tmp_path / "bob.jsonl", 200, 150)
    return tmp_path


def texts(shard: Shard, vocabulary: Vocabulary) -> list[str]:
    parts = np.split(shard.tokens, shard.starts[1:])
    assert all(part[0] == vocabulary.end_of_text for part in parts)
    return [vocabulary.tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts]


@pytest.mark.parametrize("tokenizer", [{"kind": "bytes"}, {"kind": "bpe", "vocab_size": 400}])
def test_the_shards_hold_the_text(two: Path, tokenizer: dict[str, Any]) -> None:
    long = "long words and 漢字 " * (PIECE_CHARACTERS // 8)
    with (two / "ann.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": long}))
    corpus = build_corpus(recipe(two, tokenizer=tokenizer))
    assert list(corpus.holdings) == ["ann", "bob"]
    for name, holding in corpus.holdings.items():
        expected = [json.loads(line)["text"] for line in (two / f"{name}.jsonl").read_text().splitlines()]
        found = [texts(shard, corpus.vocabulary) for shard in (holding.train, holding.validation)]
        assert sorted(found[0] + found[1]) == sorted(expected)
        assert found[0] == [text for text in expected if text in set(found[0])]
        assert holding.train.documents == len(found[0])
        assert holding.train.text_bytes == sum(len(text.encode()) for text in found[0])
        assert holding.train.tokens.dtype == np.uint16 and not holding.train.tokens.flags.writeable


def test_a_second_build_writes_nothing_and_changed_text_makes_new_tokens(two: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (two / "shards").rglob("*")}

    told: list[str] = []
    bpe = {"kind": "bpe", "vocab_size": 300}
    first = build_corpus(recipe(two, tokenizer=bpe)).holdings
    before = state()
    second = build_corpus(recipe(two, tokenizer=bpe), told.append).holdings
    assert state() == before and told == ["reading the sources"]
    assert [h.content_hash for h in first.values()] == [h.content_hash for h in second.values()]

    plain = build_corpus(recipe(two)).holdings
    with (two / "bob.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    changed = build_corpus(recipe(two)).holdings
    assert changed["ann"].content_hash == plain["ann"].content_hash
    assert changed["bob"].content_hash != plain["bob"].content_hash


def test_damaged_and_half_built_folders_are_built_again(two: Path) -> None:
    good = build_corpus(recipe(two)).holdings
    tokens = {name: holding.train.tokens.copy() for name, holding in good.items()}
    folders = [holding.train.index.parent for holding in good.values()]
    with (folders[0] / "train.bin").open("ab") as file:
        file.truncate(100)
    (folders[1] / "manifest.json").unlink()
    again = build_corpus(recipe(two)).holdings
    for name in again:
        assert again[name].content_hash == good[name].content_hash
        assert np.array_equal(again[name].train.tokens, tokens[name])
    assert sorted((two / "shards").iterdir()) == sorted(folders)


def _hash(folder: Path) -> list[str]:
    return [holding.content_hash for holding in build_corpus(recipe(folder)).holdings.values()]


def test_processes_that_build_at_once_agree(two: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        hashes = pool.map(_hash, [two] * 6, chunksize=1)
    assert all(found == hashes[0] for found in hashes)
    assert len(list((two / "shards").iterdir())) == 2


def test_a_full_disk_leaves_nothing_behind(two: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            build_corpus(recipe(two))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((two / "shards").iterdir()) == []
    shutil.rmtree(two / "shards")
    (two / "shards").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        build_corpus(recipe(two))


def test_too_little_text(tmp_path: Path) -> None:
    write(tmp_path / "ann.jsonl", 20)
    with pytest.raises(CorpusError, match=r"ann: has \d+ training tokens .* needs 1,025, one batch \(8 x 1"):
        build_corpus(recipe(tmp_path))


def test_many_participants_share_one_source(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", 12_000)
    source = {"jsonl": str(tmp_path / "all.jsonl")}
    data = {"source": source, "split": {"participants": 600}, "shards": str(tmp_path / "shards")}
    local = {"batch_size": 1, "sequence_length": 16}
    corpus = build_corpus(parse_recipe({"data": {**data, "validation_fraction": 0.5}, "local": local}))
    assert sum(h.train.documents + h.validation.documents for h in corpus.holdings.values()) == 12_000


PEAK = """
import resource, sys
from potluck.corpus.shards import build_corpus
from potluck.recipe import load_recipe
build_corpus(load_recipe(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def peak_mib(mib: int) -> int:
        line = json.dumps({"text": "x" * 4000 + " of a longer text\n" * 2})
        with (tmp_path / f"{mib}.jsonl").open("w") as file:
            file.writelines(f'{line[:-2]}{i}"}}\n' for i in range(mib * 255))
        path = tmp_path / f"{mib}.toml"
        path.write_text(
            f'data.shards = "{tmp_path}/shards"\n[[participants]]\nname = "a"\nsource.jsonl = "{mib}.jsonl"\n'
        )
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak_mib(33) - peak_mib(1) < 10
