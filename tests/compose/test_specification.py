"""What stands for a text, and how a text finds what is like it: against plain float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from potluck.compose.base import Base
from potluck.compose.effect import affordable
from potluck.compose.library import written
from potluck.compose.library.search import Index, closeness, index_of, mixture, nearest, verdict
from potluck.compose.library.simplex import nearest_mixture
from potluck.compose.library.specification import (
    MAX_BYTES,
    Specification,
    kernel,
    kmeans,
    read_specification,
    specification_of,
)
from potluck.compose.library.storage import Files
from potluck.compose.library.tensors import packed
from potluck.compose.library.written import written_by
from potluck.compose.library.yardstick import (
    MAX_WINDOW as WINDOW,
)
from potluck.compose.library.yardstick import (
    Yardstick,
    read_yardstick,
    window_states,
    yardstick_of,
)
from potluck.corpus.tokenizer import vocabulary_from_words
from potluck.errors import CorpusError, ModelError


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def yardstick(dimension: int, gamma: float = 1.0) -> Yardstick:
    return Yardstick("of-a-test", "0" * 64, torch.zeros(dimension), torch.eye(dimension), gamma)


def domain(number: int, count: int, seed: int = 0, dimension: int = 16) -> Tensor:
    """Points of length one around two places that are a domain's own."""
    places = torch.randn(2, dimension, generator=drawn(1000 + number))
    at = places[torch.randint(2, (count,), generator=drawn(seed))]
    return normalize(at + 0.5 * torch.randn(count, dimension, generator=drawn(7919 * seed + number)), dim=1)


# --- the nearest mixture -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_the_nearest_mixture_is_optimal(count: int, dimension: int, seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker, also where points coincide or lie on a line."""
    points = torch.randint(-2, 3, (count, dimension), generator=drawn(seed)).double()
    target = torch.randn(dimension, generator=drawn(seed + 1), dtype=torch.float64)
    gram, overlap = points @ points.T, points @ target
    weights = nearest_mixture(gram, overlap)
    assert weights.min() >= 0 and math.isclose(float(weights.sum()), 1, abs_tol=1e-12)
    slope = gram @ weights - overlap
    assert float(weights @ slope - slope.min()) <= 1e-6 * max(1.0, float(gram.diagonal().max()))


def test_a_target_inside_is_met() -> None:
    points = torch.randn(5, 8, generator=drawn(0), dtype=torch.float64)
    truth = torch.tensor([0.5, 0.0, 0.3, 0.0, 0.2], dtype=torch.float64)
    found = nearest_mixture(points @ points.T, points @ (truth @ points))
    assert torch.allclose(found, truth, atol=1e-6)


def test_points_that_can_hardly_be_told_apart() -> None:
    """As an absolute width of kernel sees short vectors: a Gram matrix of ones, up to rounding."""
    points = 1e-3 * torch.randn(80, 8, generator=drawn(0))
    gram = kernel(points, points, 0.1)
    weights = nearest_mixture(gram, gram.mean(0))
    assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1)


# --- specifications ------------------------------------------------------------------------------


def misfit(points: Tensor, weights: Tensor, states: Tensor, gamma: float) -> float:
    """``‖Σβk(z, ·) − mean k(x, ·)‖²``, one pair at a time."""
    both = torch.cat([points, states]).double()
    signed = torch.cat([weights.double(), torch.full((len(states),), -1 / len(states), dtype=torch.float64)])
    pairs = itertools.product(range(len(both)), repeat=2)
    return sum(float(signed[i] * signed[j] * torch.exp(-gamma * (both[i] - both[j]).square().sum())) for i, j in pairs)


def test_it_stands_for_the_text_better_than_means_of_groups() -> None:
    states = domain(0, 60)
    found = specification_of(states, yardstick(16), points=6)
    means = kmeans(states, 6, 0)
    sizes = torch.bincount(torch.cdist(states, means).argmin(1), minlength=6) / len(states)
    ours, plain = misfit(found.points, found.weights, states, 1.0), misfit(means, sizes, states, 1.0)
    assert 0 < ours < 0.7 * plain


def test_it_is_small_and_read_as_it_was_taken() -> None:
    measure, states = yardstick(128), domain(1, 600, dimension=128)
    found = specification_of(states, measure, noise=0.05)
    content = found.to_bytes()
    assert (
        len(found.weights) > 60
        and len(Specification(torch.ones(100, 128), torch.ones(100), "f" * 64).to_bytes()) <= MAX_BYTES
    )
    again = read_specification(content, "it", measure)
    assert torch.equal(again.points, found.points) and torch.equal(again.weights, found.weights)
    assert (again.noise, again.yardstick) == (0.05, measure.content_hash)


def test_the_same_seed_gives_the_same_bytes_and_noise_never() -> None:
    states, measure = domain(0, 50), yardstick(16)
    contents = [specification_of(states, measure, points=8, seed=seed).to_bytes() for seed in (1, 1, 2)]
    assert contents[0] == contents[1] != contents[2]
    noisy = [specification_of(states, measure, points=8, noise=0.3) for _ in range(2)]
    assert noisy[0].to_bytes() != noisy[1].to_bytes()


def test_no_state_stands_for_itself() -> None:
    states = domain(0, 9)
    found = specification_of(states, yardstick(16))
    assert len(found.weights) <= 6
    assert torch.cdist(found.points, states).amin() > 1e-3
    with pytest.raises(CorpusError, match="at least 2 windows"):
        specification_of(states[:1], yardstick(16))


def content(**changes: object) -> bytes:
    tensors = {"points": torch.zeros(2, 4).half(), "weights": torch.tensor([0.5, 0.5])}
    facts = {"version": 1, "yardstick": yardstick(4).content_hash, "noise": 0.0}
    tensors |= {name: value for name, value in changes.items() if isinstance(value, Tensor)}
    return packed(tensors, facts | {name: value for name, value in changes.items() if name in facts})


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (content()[:50], "cannot be read"),
        (b"", "cannot be read"),
        (content(points=torch.full((2, 4), torch.nan)), "NaN"),
        (content(points=torch.zeros(2, 5)), "of another form"),
        (content(weights=torch.tensor([1.0])), "of another form"),
        (content(weights=torch.tensor([1.5, -0.5])), "no shares"),
        (content(weights=torch.tensor([0.5, 0.1])), "no shares"),
        (content(version=2), "of another form"),
        (content(noise="much"), "not a specification"),
        (content(yardstick="f" * 64), "another library"),
        (content(points=torch.zeros(4000, 4), weights=torch.full((4000,), 1 / 4000)), "are allowed"),
    ],
)
def test_what_is_no_specification(found: bytes, says: str) -> None:
    with pytest.raises(ModelError, match=f"it: .*{says}"):
        read_specification(found, "it", yardstick(4))


# --- the yardstick -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, **shape)).eval()
    return Base(model, vocabulary_from_words({"a": 2}, 300), "tiny")


@pytest.fixture(scope="module")
def measured(base: Base) -> Yardstick:
    return yardstick_of(base, "of-a-test", "cpu")


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 257, count * WINDOW)


def test_the_yardstick_is_the_bases_alone(base: Base, measured: Yardstick) -> None:
    assert measured.to_bytes() == yardstick_of(base, "of-a-test", "cpu").to_bytes()
    again = read_yardstick(measured.to_bytes(), "it")
    assert (again.gamma, again.content_hash, again.base_hash) == (
        measured.gamma,
        measured.content_hash,
        base.content_hash,
    )
    points = measured.measure(base, tokens(40), "cpu")
    assert points.shape == (40, 32) and torch.allclose(points.norm(dim=1), torch.ones(40), atol=1e-5)


def kept_by(base: Base, folder: Path) -> list[str]:
    """Text for a yardstick, told by what it said of its progress."""
    said: list[str] = []
    written_by(base, WINDOW, "cpu", 0, Files(folder), said.append)
    return said


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny base counts as one that can afford 64 windows, in parts of 40."""
    monkeypatch.setattr(written, "_OPERATIONS", 0.0)
    monkeypatch.setattr(written, "_MANY_AT_ONCE", 40)


@pytest.mark.usefixtures("in_parts")
def test_what_a_base_wrote_is_not_written_again(base: Base, tmp_path: Path) -> None:
    whole = written_by(base, WINDOW, "cpu", 0)
    assert len(whole) == 64 * WINDOW and [line[-11:] for line in kept_by(base, tmp_path)] == [
        "part 1 of 2",
        "part 2 of 2",
    ]
    first, second = sorted((tmp_path / "begun").iterdir())
    second.unlink()  # stopped here
    assert [line[-11:] for line in kept_by(base, tmp_path)] == ["part 2 of 2"]
    assert np.array_equal(written_by(base, WINDOW, "cpu", 0, Files(tmp_path)), whole)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    assert [line[-11:] for line in kept_by(base, tmp_path)] == ["part 1 of 2"]  # damaged


def test_a_large_base_writes_and_reads_less(base: Base) -> None:
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    costs = 2 * parameters * WINDOW
    assert affordable(base.model, WINDOW, 100.5 * costs, 64, 512) == 100
    assert affordable(base.model, WINDOW, costs, 64, 512) == 64
    assert affordable(base.model, WINDOW, 1000 * costs, 64, 512) == 512


def test_a_window_knows_nothing_of_its_neighbours(base: Base) -> None:
    stream = tokens(6)
    turned = stream.reshape(6, WINDOW)[::-1].flatten()
    assert torch.allclose(
        window_states(base, stream, WINDOW, "cpu").flip(0), window_states(base, turned, WINDOW, "cpu"), atol=1e-6
    )
    assert len(window_states(base, stream[:-1], WINDOW, "cpu")) == 5


def test_a_window_fits_the_bases_context() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=12)).eval()
    short = Base(model, vocabulary_from_words({"a": 2}, 300), "short")
    measured = yardstick_of(short, "of-a-test", "cpu")
    assert read_yardstick(measured.to_bytes(), "it").window == 11
    assert measured.measure(short, tokens(1)[:100], "cpu").shape == (9, 16)


def test_what_cannot_be_measured(base: Base, measured: Yardstick) -> None:
    with pytest.raises(CorpusError, match=f"100 tokens, a window needs {WINDOW}"):
        measured.measure(base, tokens(1)[:100], "cpu")
    other = replace(measured, base_hash="1" * 64)
    with pytest.raises(ModelError, match="tiny: not the base of this library"):
        other.measure(base, tokens(2), "cpu")


@pytest.mark.parametrize("change", [{"version": 2}, {"window": 0}, {"gamma": -1.0}, {"gamma": "wide"}])
def test_what_is_no_yardstick(change: dict[str, object]) -> None:
    tensors = {"centre": torch.zeros(4), "directions": torch.zeros(2, 4)}
    facts = {"version": 1, "library": "x", "base_hash": "0" * 64, "gamma": 1.0, "window": WINDOW}
    assert read_yardstick(packed(tensors, facts), "it").gamma == 1
    for wrong in (packed(tensors, facts | change), packed(tensors | {"centre": torch.zeros(3)}, facts)):
        with pytest.raises(ModelError, match="it: not a library's yardstick"):
            read_yardstick(wrong, "it")


# --- search --------------------------------------------------------------------------------------


def market(domains: int, each: int = 1) -> Index:
    measure = yardstick(16)
    found = {
        f"d{d}.{copy}": specification_of(domain(d, 80, seed=copy + 1), measure, points=20, seed=copy)
        for d in range(domains)
        for copy in range(each)
    }
    return index_of(found, measure.gamma)


def test_distances_are_those_of_mean_embeddings() -> None:
    index, states = market(4), domain(2, 30, seed=9)
    for match in nearest(index, states, top=4, candidates=None):
        row = index.names.index(match.name)
        z, w = index.points[row].double(), index.weights[row].double()
        own = sum(
            float(torch.exp(-(states[i].double() - states[j].double()).square().sum()))
            for i, j in itertools.permutations(range(30), 2)
        )
        cross = (w @ kernel(z, states.double(), 1.0)).mean()
        square = float(w @ kernel(z, z, 1.0) @ w - 2 * cross) + own / (30 * 29)
        assert match.distance == pytest.approx(math.sqrt(max(0.0, square)), abs=1e-3)


def test_the_few_best_are_the_best_of_all() -> None:
    index = market(40, each=3)
    for d in range(0, 40, 7):
        states = domain(d, 40, seed=11)
        everywhere, quickly = nearest(index, states, 3, None), nearest(index, states, 3)
        assert [m.name for m in quickly] == [m.name for m in everywhere]
        assert {m.name.partition(".")[0] for m in quickly} == {f"d{d}"}
        assert [m.distance for m in quickly] == sorted(m.distance for m in quickly)


def test_a_mixture_is_taken_apart() -> None:
    index, counts = market(30), {3: 50, 11: 30, 20: 20}
    states = torch.cat([domain(d, count, seed=13) for d, count in counts.items()])
    found = {match.name: match.share for match in mixture(index, states)}
    assert sum(found.values()) == pytest.approx(1)
    truth = {f"d{d}.0": count / 100 for d, count in counts.items()}
    assert sum(abs(found.get(name, 0) - truth.get(name, 0)) for name in found.keys() | truth.keys()) < 0.15
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_who_fits_is_told_from_who_does_not() -> None:
    index = market(20)
    said = {
        d: verdict(closeness(index, nearest(index, domain(d, 40, seed=17), 1)[0])) for d in (*range(20), *range(50, 70))
    }
    assert {said[d] for d in range(20)} == {"alike"}
    assert "alike" not in {said[d] for d in range(50, 70)}
    assert (verdict(None), verdict(0.5), verdict(1.1)) == (None, "related", "unlike")


def test_a_library_of_few() -> None:
    alone, states = market(1), domain(0, 30, seed=3)
    assert [match.share for match in mixture(alone, states)] == [1.0]
    assert nearest(alone, states, top=9)[0].name == "d0.0" and closeness(alone, nearest(alone, states)[0]) is None
    assert len(nearest(market(3), states[:1], top=9)) == 3
    one = Specification(torch.zeros(1, 16), torch.ones(1), "x")
    assert index_of({"a": one}, 1.0).energies.tolist() == [1.0]
