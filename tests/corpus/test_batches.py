"""Batches: every sequence once an epoch, however the cursor is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from potluck.corpus.batches import Batches, Seat, documents_drawn, permuted
from potluck.corpus.shards import Shard


@given(st.integers(1, 2000), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_the_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    images = permuted(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(n))


def test_the_order_is_random() -> None:
    orders = [permuted(np.arange(1000), 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, order in enumerate(orders):
        for other in [np.arange(1000), *orders[:i]]:
            assert np.count_nonzero(order == other) < 10
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.15
    firsts = [permuted(np.arange(1), 5, seed, 0)[0] for seed in range(1000)]
    assert np.bincount(firsts, minlength=5).min() > 140


@given(st.integers(2, 400), st.integers(1, 9), st.integers(0, 99), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_draws_do_not_depend_on_how_the_cursor_is_cut(tokens: int, length: int, seed: int, cuts: list[int]) -> None:
    batches = Batches(np.arange(tokens, dtype=np.uint16), min(length, tokens - 1), seed)
    cursor, drawn = 3, []
    for count in cuts:
        drawn.append(batches.draw(cursor, count))
        cursor += count
    assert np.array_equal(np.concatenate(drawn), batches.draw(3, sum(cuts)))


def test_an_epoch_predicts_every_token_once_and_the_next_has_another_order() -> None:
    batches = Batches(np.arange(1005, dtype=np.uint16), 10, seed=7)
    first, second = batches.draw(0, 100), batches.draw(100, 100)
    assert batches.sequences == 100 and first.shape == (100, 11) and first.dtype == np.int64
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch[:, 1:].ravel()), np.arange(1, 1001))
        assert np.all(np.diff(epoch) == 1)
    assert not np.array_equal(first, second)


def test_documents_drawn(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    starts.astype("<i8").tofile(tmp_path / "train.index")
    index = tmp_path / "train.jsonl"
    index.write_text("".join(json.dumps({"name": str(i)}) + "\n" for i in range(40)))
    owner = np.repeat(np.arange(40), lengths)
    shard = Shard(owner.astype(np.uint16), 40, 0, index)  # each token is its document's number
    batches = Batches(shard.tokens, 16, seed=1)
    for cursor in (0, 1, 5, batches.sequences, 3 * batches.sequences):
        expected = sorted({int(token) for token in batches.draw(0, cursor).ravel()})
        assert documents_drawn(shard, batches, cursor) == [str(i) for i in expected]


@given(
    st.lists(st.permutations("abc"), min_size=1, max_size=6), st.integers(1, 2), st.integers(1, 5), st.integers(1, 9)
)
def test_the_places_of_a_round_draw_what_those_who_are_asked_draw(
    orders: list[list[str]], asked: int, per_round: int, count: int
) -> None:
    rounds = [sorted(order[:asked]) for order in orders]
    everybody = {name: Batches(np.arange(50 * i, 50 * i + 41), 2, i) for i, name in enumerate("abc")}
    seats = [Seat(everybody, rounds, place, per_round) for place in range(asked)]
    served = dict.fromkeys("abc", 0)
    for number, names in enumerate(rounds):
        for seat, name in zip(seats, names, strict=True):
            expected = everybody[name].draw(served[name] * per_round, per_round)
            assert np.array_equal(seat.draw(number * per_round, per_round), expected)
            served[name] += 1
    whole = seats[0].draw(0, len(rounds) * per_round + count)  # cut at any place, and on after the last round
    assert np.array_equal(whole, np.concatenate([seats[0].draw(i, 1) for i in range(len(whole))]))
