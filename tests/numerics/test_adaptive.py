"""The batch that a participant asks for, and the streams that it trains."""

from __future__ import annotations

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from potluck.corpus.batches import Batches
from potluck.errors import RecipeError
from potluck.local.adaptive import GradientNorms, adaptive_steps, in_passes, next_batch_size, norm_test
from potluck.local.optimizers import InnerOptimizer
from potluck.local.replicas import (
    AdaptiveState,
    Stream,
    merge_smallest,
    new_streams,
    restore_streams,
    stream_facts,
    stream_steps,
    stream_tensors,
)
from potluck.local.steps import local_steps
from potluck.recipe.adaptive import AdaptiveBatch
from potluck.recipe.load import parse_recipe

CPU = torch.device("cpu")
PLAIN_SGD = {"optimizer": {"kind": "sgd", "learning_rate": 1.0}, "clip_norm": 0.0}
OPTIMIZERS = [{"kind": "adamw"}, {"kind": "sgd", "momentum": 0.9}, {"kind": "muon"}]
BATCH, RATES = 4, [1.0, 0.5, 0.25]


class Text:
    """Random tokens, drawn as a participant draws them."""

    def __init__(self, seed: int = 0, texts: int = 1) -> None:
        tokens = np.random.default_rng(seed).integers(0, 60, (texts, 900), dtype=np.uint16)
        self.batches, self.cursor = [Batches(row, 16, seed) for row in tokens], 0

    def __call__(self, count: int) -> list[torch.Tensor]:
        drawn = [torch.from_numpy(batches.draw(self.cursor, count)) for batches in self.batches]
        self.cursor += count
        return drawn


def optimizer_of(recipe, network):
    return InnerOptimizer(recipe.local.optimizer, network.flat, network.model)


def adaptive(recipe, network, table, batch_size=BATCH, text=None, rates=RATES):
    optimizer = optimizer_of(recipe, network)
    optimizer.bind(torch.zeros(optimizer.size), 0)
    return adaptive_steps(network, optimizer, recipe.local, table, batch_size, text or Text(), rates, None)


def rounds(recipe, network, table, state, text, count=1):
    optimizer = optimizer_of(recipe, network)
    return [stream_steps(network, optimizer, recipe.local, table, state, text, RATES, None) for _ in range(count)]


def streams_of(recipe, network, table):
    return new_streams(recipe.local, table, optimizer_of(recipe, network).size, CPU)


# --- the test ---------------------------------------------------------------------------------------

parts, rows, etas = st.integers(2, 6), st.integers(1, 5), st.floats(0.05, 3)


def normal_gradients(seed, steps, parts, rows, mean, deviation, size=400):
    """Gradients of batches, float64 ``(steps, parts, size)``: a batch of ``rows`` has a ``rows``-th of the variance."""
    noise = np.random.default_rng(seed).normal(0, deviation, (steps, parts, rows, size))
    return mean + noise.mean(2)


def norms_of(gradients, rows):
    steps, parts, _ = gradients.shape
    squares, mean_squares = (gradients**2).sum(), (gradients.mean(1) ** 2).sum()
    return GradientNorms(parts=parts, rows=rows, steps=steps, squares=squares, mean_squares=mean_squares)


@given(st.integers(0, 99), st.integers(1, 4), parts, rows)
def test_the_variance_is_that_of_the_sample(seed, steps, parts, rows) -> None:
    gradients = normal_gradients(seed, steps, parts, rows, 0.3, 1.0)
    expected = gradients.var(axis=1, ddof=1).sum(-1).mean() * rows
    assert norms_of(gradients, rows).variance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("parts", "rows"), [(2, 1), (2, 8), (5, 3)])
def test_variance_and_signal_are_those_of_the_distribution_whatever_the_batch(parts, rows) -> None:
    norms = norms_of(normal_gradients(1, 300, parts, rows, 0.5, 1.5), rows)
    assert norms.variance == pytest.approx(400 * 1.5**2, rel=0.02)
    assert norms.signal == pytest.approx(400 * 0.5**2, rel=0.05)


@given(st.floats(0.1, 10), st.floats(0.1, 10), parts, rows, etas)
def test_the_test_passes_from_the_batch_on_that_it_asks_for(variance, signal, parts, rows, eta) -> None:
    mean_squares = signal + variance / (parts * rows)
    squares = parts * mean_squares + variance * (parts - 1) / rows
    norms = GradientNorms(parts=parts, rows=rows, steps=1, squares=squares, mean_squares=mean_squares)
    least = norm_test(norms, eta)
    assert least == pytest.approx(variance / (eta**2 * signal), rel=1e-3)
    for batch, passes in ((least * 1.01, True), (least * 0.99, False)):
        assert (variance / batch <= eta**2 * signal) is passes


def test_where_noise_hides_the_signal_a_hundredth_of_the_square_stands_for_it() -> None:
    hidden = GradientNorms(steps=1, squares=2.0, mean_squares=0.4)  # g_i of length 1 and nearly opposite
    assert hidden.signal == pytest.approx(0.004) and norm_test(hidden, 1.0) == pytest.approx(1.2 / 0.004)
    assert norm_test(GradientNorms(steps=1, squares=2.0, mean_squares=1.0), 1.0) == 0.0  # no noise
    assert norm_test(GradientNorms(steps=1), 1.0) == 0.0  # no gradient


tables = st.builds(
    AdaptiveBatch,
    max_batch_size=st.integers(2, 40), accumulate_above=st.integers(1, 3),
    max_accumulation=st.sampled_from([1, 4, 9]), threshold=etas,
)  # fmt: skip


@given(tables, st.integers(1, 20), st.integers(0, 9), st.floats(0, 1e9), st.floats(0, 1e9))
def test_the_batch_never_shrinks_at_most_doubles_and_stays_within_bounds(table, half, steps, signal, noise) -> None:
    batch = min(2 * half, table.max_batch_size)
    parts, rows = in_passes(batch, table)
    norms = GradientNorms(parts, rows, steps, parts * (signal + noise), signal)
    wanted = next_batch_size(batch, norms, table)
    assert batch <= wanted <= min(2 * batch, max(batch, table.max_batch_size * table.max_accumulation))
    assert steps or wanted == batch


@given(tables, st.integers(1, 400))
def test_the_switch_to_accumulation(table, batch) -> None:
    passes, rows = in_passes(batch, table)
    assert passes >= 2 and rows <= table.max_batch_size
    if batch > table.accumulate_above * table.max_batch_size:
        assert 0 <= passes * rows - batch < passes
    else:
        assert passes == 2 and 0 <= passes * rows - min(batch, table.max_batch_size) < 2


def test_accumulation_that_is_never_reached_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_accumulation 2: must be 1, for none, or more than"):
        AdaptiveBatch(max_accumulation=2, accumulate_above=2)


# --- its steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["kind"])
@pytest.mark.parametrize("texts", [1, 3])
def test_steps_are_plain_local_steps_bit_for_bit(make_recipe, make_network, optimizer, texts) -> None:
    recipe = make_recipe(1, local={"optimizer": optimizer})
    plain, watched, text = make_network(recipe), make_network(recipe), Text(texts=texts)
    inner = optimizer_of(recipe, plain)
    inner.bind(torch.zeros(inner.size), 0)
    halves = lambda _: [batch for _ in range(2) for batch in text(BATCH // 2)]  # noqa: E731
    expected = local_steps(plain, inner, recipe.local, halves, RATES, None)
    report, norms = adaptive(recipe, watched, AdaptiveBatch(threshold=1e6), text=Text(texts=texts))
    assert report == expected and norms.steps == len(RATES) and norms.parts == 2 * texts
    assert torch.equal(plain.flat.vector, watched.flat.vector)
    assert all(not p._post_accumulate_grad_hooks for p in watched.flat.parameters)


@pytest.mark.parametrize("passes", [2, 4])
def test_the_norms_are_those_of_the_batches_gradients(make_recipe, make_network, passes) -> None:
    recipe, text = make_recipe(1, local={**PLAIN_SGD, "clip_norm": 1e-3}), Text()
    network = make_network(recipe)
    model, gradients = copy.deepcopy(network.model).double(), []
    for tokens in (text(2)[0] for _ in range(passes)):
        model.zero_grad()
        cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = norms_of(torch.stack(gradients)[None].numpy(), 2)
    table = AdaptiveBatch(max_batch_size=2 if passes > 2 else BATCH, accumulate_above=1, max_accumulation=4)
    _, norms = adaptive(recipe, network, table, 2 * passes, rates=[1.0])
    assert (norms.parts, norms.rows, norms.steps) == (passes, 2, 1)
    assert norms.squares == pytest.approx(expected.squares, rel=1e-5)
    assert norms.mean_squares == pytest.approx(expected.mean_squares, rel=1e-5)
    assert norms.variance == pytest.approx(expected.variance, rel=1e-4)


def test_accumulation_is_one_big_batch(make_recipe, make_network) -> None:
    recipe = make_recipe(1, local=PLAIN_SGD)
    tables = [AdaptiveBatch(max_batch_size=size, accumulate_above=1, max_accumulation=8) for size in (4, 32)]
    moved = []
    for table in tables:
        network = make_network(recipe)
        before = network.flat.vector.clone()
        report, _ = adaptive(recipe, network, table, 16, rates=[1.0])
        moved.append(before - network.flat.vector)
        assert report.examples == 16
    torch.testing.assert_close(*moved, atol=1e-6, rtol=0)


def test_a_step_that_is_not_finite_does_not_count(make_recipe, make_network) -> None:
    model = {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64, "tied": False}
    recipe = make_recipe(1, model=model)
    network, text, drawn = make_network(recipe), Text(), []
    network.model.get_input_embeddings().weight.data[60] = torch.inf

    def spoilt(count: int) -> list[torch.Tensor]:
        drawn.append(text(count)[0])
        if len(drawn) == 3:  # in the second step
            drawn[-1].fill_(60)
        return drawn[-1:]

    report, norms = adaptive(recipe, network, AdaptiveBatch(), text=spoilt)
    assert (report.steps, report.skipped_steps, norms.steps) == (2, 1, 2)
    assert math.isfinite(norms.squares)


# --- streams ----------------------------------------------------------------------------------------


def test_one_stream_is_its_steps_and_its_batch_grows(make_recipe, make_network) -> None:
    recipe, table = make_recipe(1), AdaptiveBatch(threshold=0.2, max_batch_size=4, max_accumulation=4)
    network, apart = make_network(recipe), make_network(recipe)
    state, text = streams_of(recipe, network, table), Text()
    assert state.streams[0].batch_size == recipe.local.batch_size == 2
    _, norms = adaptive(recipe, apart, table, 2)
    (first,) = rounds(recipe, network, table, state, text)
    assert torch.equal(network.flat.vector, apart.flat.vector)
    assert state.streams[0].batch_size == next_batch_size(2, norms, table) == 4
    reports = rounds(recipe, network, table, state, text, 4)
    assert [report.examples for report in (first, *reports)] == [6, 12, 12, 48, 48]  # 4, then 8: clipped; 16: not
    assert text.cursor == 126 and state.streams[0].optimizer_steps == 15


def test_what_streams_contribute_is_their_mean_by_requested_batch(make_recipe, make_network) -> None:
    recipe, table = make_recipe(1), AdaptiveBatch(threshold=1e6, streams=3, merge_every=9)
    network, text = make_network(recipe), Text()
    state = streams_of(recipe, network, table)
    for stream, size in zip(state.streams, (2, 4, 10), strict=True):
        stream.batch_size = size
    expected, alone = torch.zeros_like(network.flat.vector, dtype=torch.float64), Text()
    for size in (2, 4, 10):
        one = make_network(recipe)
        adaptive(recipe, one, table, size, alone)
        expected += one.flat.vector.double() * size / 16
    (report,) = rounds(recipe, network, table, state, text)
    torch.testing.assert_close(network.flat.vector.double(), expected, atol=1e-7, rtol=1e-6)
    assert (report.steps, report.examples, text.cursor) == (3, 48, 48)
    assert len({stream.moments.sum().item() for stream in state.streams}) == 3


def test_the_two_smallest_requests_are_merged_by_their_weight() -> None:
    state = AdaptiveState([Stream(torch.full((3,), float(size)), size, size) for size in (6, 2, 8, 2)])
    merge_smallest(state)
    assert [(s.batch_size, s.moments[0].item()) for s in state.streams] == [(6, 6.0), (8, 8.0), (2, 2.0)]
    merge_smallest(state)
    assert [s.batch_size for s in state.streams] == [6, 8]
    assert state.streams[0].moments[0].item() == pytest.approx((6 * 6 + 2 * 2) / 8)
    assert state.streams[0].optimizer_steps == 6


def test_streams_are_merged_until_one_is_left(make_recipe, make_network) -> None:
    recipe, table, left = make_recipe(1), AdaptiveBatch(streams=3, merge_every=2), []
    network = make_network(recipe)
    state, text = streams_of(recipe, network, table), Text()
    for _ in range(8):
        rounds(recipe, network, table, state, text)
        left.append(len(state.streams))
    assert left == [3, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("keep", [True, False])
def test_a_round_trip_of_the_state_changes_nothing(make_recipe, make_network, keep) -> None:
    recipe = make_recipe(1, local={"keep_optimizer": keep})
    table = AdaptiveBatch(threshold=0.3, max_batch_size=8, streams=3, merge_every=3)
    through, resumed = make_network(recipe), make_network(recipe)
    state, text = streams_of(recipe, through, table), Text()
    rounds(recipe, through, table, state, text, 2)
    saved = {name: tensor.clone() for name, tensor in stream_tensors(state).items()}
    facts, again, later = json.loads(json.dumps(stream_facts(state))), streams_of(recipe, resumed, table), Text()
    resumed.flat.vector.copy_(through.flat.vector)
    later.cursor = text.cursor
    restore_streams(again, facts)
    for name, tensor in stream_tensors(again).items():
        tensor.copy_(saved.pop(name))
    assert not saved and stream_facts(again) == facts
    rounds(recipe, through, table, state, text, 3)
    rounds(recipe, resumed, table, again, later, 3)
    assert torch.equal(through.flat.vector, resumed.flat.vector)
    assert stream_facts(again) == stream_facts(state) and later.cursor == text.cursor
    pairs = zip(stream_tensors(again).items(), stream_tensors(state).items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    "damage",
    [{"batch_sizes": []}, {"batch_sizes": [], "optimizer_steps": []}, {"optimizer_steps": [1, 2]}, {"rounds": None}],
)
def test_a_state_that_does_not_fit_is_refused(damage) -> None:
    facts = {"rounds": 1, "batch_sizes": [2], "optimizer_steps": [3], **damage}
    with pytest.raises((TypeError, ValueError)):
        restore_streams(AdaptiveState([Stream(torch.zeros(3), 2)]), facts)


# --- in a recipe and a run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"local": {"batch_size": 3}}, "local.batch_size 3: the first batch must be even"),
        ({"local": {"batch_size": 128}}, "at most adaptive_batch.max_batch_size 64"),
        ({"local": {"accumulation": 2}}, "local.accumulation and local.adaptive_batch"),
        ({"rounds": {"local_tokens": 64}}, "rounds.local_tokens and local.adaptive_batch"),
        ({"rounds": {"streaming": {"kind": "streaming"}}}, "rounds.streaming and local.adaptive_batch"),
    ],
)
def test_what_does_not_go_with_it_is_refused(make_recipe, changes, said) -> None:
    local = {**changes.get("local", {}), "adaptive_batch": {}}
    with pytest.raises(RecipeError, match=re.escape(said)):
        make_recipe(2, **{**changes, "local": local})


def test_the_virtual_clock_does_not_know_it() -> None:
    participants = [{"name": "a", "source": {"path": "text"}, "profile": {"steps_per_second": 1.0}}]
    with pytest.raises(RecipeError, match=r"participants\.profile and local\.adaptive_batch"):
        parse_recipe({"participants": participants, "local": {"adaptive_batch": {}}})


def test_a_run_trains_on_more_text_as_its_batches_grow(make_recipe, make_world) -> None:
    local = {"adaptive_batch": {"threshold": 0.2, "max_batch_size": 4, "streams": 2, "merge_every": 3}}
    world = make_world(make_recipe(2, local=local, rounds={"count": 4, "local_steps": 2}))
    world.run()
    examples = [[e["examples"] for e in world.told("contribution") if e["round"] == n] for n in range(1, 5)]
    assert examples == [[8, 8], [16, 16], [16, 16], [32, 32]]  # 2, then 4, 8: clipped; of one stream 16 in four passes
    assert {len(person.state.adaptive.streams) for person in world.participants.values()} == {1}
    assert {e["steps"] for e in world.told("contribution")} == {2}
