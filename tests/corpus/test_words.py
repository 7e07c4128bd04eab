"""Counts of words from outside: what is refused, and that no count, however large, is counted one by one."""

from __future__ import annotations

import json

import pytest
import torch

from potluck.asking import MAX_WORD_BYTES, _listed, words_of
from potluck.contribution import Contribution
from potluck.corpus.tokenizer import MAX_WORDS, PIECE_CHARACTERS, at_most
from potluck.errors import TrainingError


def contribution(words: object, counts: torch.Tensor) -> Contribution:
    text = words if isinstance(words, bytes) else json.dumps(words).encode()
    tensors = {"words": torch.frombuffer(bytearray(text), dtype=torch.uint8), "counts": counts}
    return Contribution(kind="words", revision=0, header={}, tensors=tensors)


def test_counts_come_through() -> None:
    assert words_of(contribution(["a", " b"], torch.tensor([2, 10**12 - 2]))) == {"a": 2, " b": 10**12 - 2}


@pytest.mark.parametrize(
    ("words", "counts", "reason"),
    [
        (["a"], torch.tensor([10**12 + 1]), "not text"),
        (["a"], torch.tensor([-(2**63)]), "do not match"),
        (["a"], torch.tensor([1.0]), "not a count"),
        (["a"], torch.tensor([[1]]), "not a count"),
        (["a", "a"], torch.tensor([1, 2]), "counted twice"),
        (["a"], torch.tensor([1, 2]), "do not match"),
        (["\ud800"], torch.tensor([1]), "surrogates"),
        (["a" * (PIECE_CHARACTERS + 1)], torch.tensor([1]), "not text"),
        ([1], torch.tensor([1]), "not text"),
        (b"[" * 200_000, torch.tensor([1]), "nested deeper"),
        ([["a"]], torch.tensor([1]), "nested deeper"),
        (b" " * (MAX_WORD_BYTES + 1), torch.tensor([1]), "at most"),
    ],
)
def test_what_is_no_count_of_words_is_refused(words: object, counts: torch.Tensor, reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        words_of(contribution(words, counts))


def test_a_huge_count_is_not_counted_one_by_one() -> None:
    assert at_most({"a": 3, "b": 1}) == {"a": 3, "b": 1}
    assert at_most({"a": 10**12, "b": 10**12, "c": 5}) == {"a": MAX_WORDS // 2 - 1, "b": MAX_WORDS // 2 - 1}


def test_of_very_many_words_the_most_frequent_are_sent() -> None:
    from collections import Counter

    assert _listed(Counter({"b": 9, "a": 9, "rare": 1, "c": 5}), 14) == ["a", "b", "c"]
