"""Every link and the chains that papers make of them: what they send, what they lose, what they keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from potluck.errors import TrainingError
from potluck.recipe import updates as recipe
from potluck.updates import codes, cosine, pieces, sparse
from potluck.updates.links import link_of, pack, unpack
from potluck.updates.sizes import elements, payload_bytes, update_forms

LOSSY = {
    "top-k": [recipe.TopK(density=0.03)],
    "block-top-k": [recipe.BlockTopK()],
    "block-top-k, small": [recipe.BlockTopK(k=3, block=50)],
    "random-k": [recipe.RandomK(density=0.3, unbiased=False)],
    "random-k, most": [recipe.RandomK(density=0.8, unbiased=False)],
    "dct-top-k": [recipe.DctTopK()],
    "dct-top-k, small": [recipe.DctTopK(k=5, chunk=8)],
    "low-rank": [recipe.LowRank(rank=4)],
    "int8": [recipe.Quantize()],
    "int4": [recipe.Quantize(bits=4, block=64)],
    "2 bits": [recipe.Quantize(bits=2, block=64)],
    "codebook": [recipe.Codebook()],
    "sign": [recipe.Sign()],
    "block-top-k and 2 bits": [recipe.BlockTopK(), recipe.Quantize(bits=2, block=64)],
    "low-rank and int4": [recipe.LowRank(rank=2), recipe.Quantize(bits=4, block=64)],
    "dct-top-k and int8": [recipe.DctTopK(k=8, chunk=16), recipe.Quantize()],
    "top-k and sign": [recipe.TopK(), recipe.Sign(block=8)],
}
CHAINS = {
    "none": [],
    "random-k, unbiased": [recipe.RandomK(density=0.1)],
    "clip": [recipe.Clip(norm=0.5)],
    "clip and int8": [recipe.Clip(norm=0.5), recipe.Quantize()],
    "SparseLoCo": [recipe.ErrorFeedback(decay=0.95), recipe.BlockTopK(), recipe.Quantize(bits=2, block=64)],
    "DeMo": [recipe.ErrorFeedback(decay=0.999), recipe.DctTopK()],
    "PowerSGD and int4": [recipe.ErrorFeedback(), recipe.LowRank(rank=2), recipe.Quantize(bits=4, block=64)],
}
LAYOUTS = {
    **{str(size): ((size,),) for size in (1, 7, 4095, 4097)},
    "prime sides": ((67, 61),),
    "a model": ((96, 64), (64,), (3, 5, 7), (), (70, 128), (130, 64), (1, 9)),
}
often = settings(deadline=None, max_examples=50)
every_link = pytest.mark.parametrize("tables", (LOSSY | CHAINS).values(), ids=LOSSY | CHAINS)
every_lossy = pytest.mark.parametrize("tables", LOSSY.values(), ids=LOSSY)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
MODEL = LAYOUTS["a model"]


@pytest.fixture(autouse=True, scope="module")
def _short_pieces() -> Iterator[None]:
    """Vectors of a test are worked on in several pieces, as long ones are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pieces, codes, cosine, sparse):
            patch.setattr(module, "PIECE", 3000)
        yield


def numbers(kind: str, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss, others = torch.randn(size, generator=generator), torch.randn(3, size, generator=generator)
    t3 = gauss / others.square().mean(0).sqrt()
    return {"gauss": gauss, "t3": t3, "ties": gauss.round(), "rare": gauss * (gauss > 2), "zeros": 0 * gauss}[kind]


samples = st.builds(
    lambda layout, kind, seed: (layout, numbers(kind, elements(layout), seed)),
    st.sampled_from(list(LAYOUTS.values())),
    st.sampled_from(["gauss", "t3", "ties", "rare", "zeros"]),
    st.integers(0, 1000),
)


def through(tables, vector, layout, draw=0):
    """The vector after the way there, from a fresh state."""
    link = link_of(tables)
    return unpack(link, pack(link, vector, layout, link.init(layout), draw), layout, draw)


def energy(x):
    return float(x.double().square().sum())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what is sent --------------------------------------------------------------------------------


@every_layout
@every_link
def test_what_is_sent_has_the_declared_form(tables, layout) -> None:
    link, vector = link_of(tables), numbers("gauss", elements(layout))
    state, before = link.init(layout), vector.clone()
    for draw in range(2):
        sent = pack(link, vector, layout, state, draw)
        forms = update_forms(tables, layout)
        types = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
        assert {n: (t.dtype, t.shape) for n, t in sent.items()} == {n: (types[f[0]], (f[1],)) for n, f in forms.items()}
        assert sum(t.numel() * t.element_size() for t in sent.values()) == payload_bytes(forms)
        found = unpack(link, sent, layout, draw)
        assert found.shape == vector.shape and found.dtype == torch.float32 and found.isfinite().all()
        assert torch.equal(vector, before)


def test_sparseloco_sends_what_its_paper_says() -> None:
    bits = 8 * payload_bytes(update_forms(CHAINS["SparseLoCo"], ((100, 4096),))) / 409600
    assert bits == (64 * (12 + 2) + 2 * 16) / 4096  # it counts places and codes; and the two magnitudes


@every_layout
@every_link
def test_a_saved_state_goes_on_with_the_same_bits(tables, layout) -> None:
    size, link = elements(layout), link_of(tables)
    state = link.init(layout)
    pack(link, numbers("t3", size, 1), layout, state, 1)
    other, restored = link_of(deepcopy(tables)), load(save(state)) if state else {}
    sent = pack(link, numbers("t3", size, 2), layout, state, 2)
    assert same(sent, pack(other, numbers("t3", size, 2), layout, restored, 2))
    assert same(state, restored)
    assert torch.equal(unpack(link, sent, layout, 2), unpack(other, sent, layout, 2))


# --- what is lost --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top-k", "block-top-k", "block-top-k, small", "dct-top-k", "dct-top-k, small"])
@often
@given(samples)
def test_top_k_loses_no_more_than_its_share(name, sample) -> None:
    """``|x - C(x)|^2 <= (1 - k/d) |x|^2`` in each block or tensor, with the k and d that it sends."""
    (layout, x), (table,) = sample, LOSSY[name]
    if isinstance(table, recipe.BlockTopK):
        parts = x.split(table.block)
        shares = [math.ceil(table.k * len(part) / table.block) / len(part) for part in parts]
    elif isinstance(table, recipe.TopK):
        parts, shares = [x], [max(1, round(table.density * len(x))) / len(x)]
    else:
        parts = x.split([math.prod(shape) for shape in layout])
        forms = [update_forms([table], (shape,)) for shape in layout]
        shares = [f["values"].size / len(part) for part, f in zip(parts, forms, strict=True)]
    lost = (through([table], x, layout) - x).split([len(part) for part in parts])
    for part, loss, share in zip(parts, lost, shares, strict=True):
        assert energy(loss) <= (1 - share + 1e-5) * energy(part)


@pytest.mark.parametrize("name", ["top-k", "block-top-k", "block-top-k, small"])
@often
@given(samples)
def test_top_k_keeps_the_largest_as_they_are(name, sample) -> None:
    (layout, x), (table,) = sample, LOSSY[name]
    found = through([table], x, layout)
    kept = found != 0
    assert torch.equal(found[kept], x[kept])
    block = table.block if isinstance(table, recipe.BlockTopK) else len(x)
    for part, chosen in zip(x.abs().split(block), kept.split(block), strict=True):
        assert (part[~chosen].amax() if not chosen.all() else 0) <= (part[chosen].amin() if chosen.any() else 0)


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("shape", [(64, 128), (6, 20), (50,), (67, 61)])
def test_all_cosine_coefficients_are_the_matrix(shape, chunk) -> None:
    x = numbers("t3", math.prod(shape))
    torch.testing.assert_close(through([recipe.DctTopK(k=4096, chunk=chunk)], x, (shape,)), x, rtol=1e-5, atol=1e-5)


def test_a_wave_is_one_cosine_coefficient() -> None:
    rows, columns = torch.arange(16)[:, None] + 0.5, torch.arange(32)[None] + 0.5
    wave = (torch.cos(math.pi * rows * 2 / 8) * torch.cos(math.pi * columns * 5 / 8)).flatten()
    torch.testing.assert_close(through([recipe.DctTopK(k=1, chunk=8)], wave, ((16, 32),)), wave)


@pytest.mark.parametrize("name", ["int8", "int4"])
@often
@given(samples, st.sampled_from([1, 1e-38, 1e-43, 1e37]))
def test_an_integer_is_off_by_half_a_scale_at_most(name, sample, unit) -> None:
    (layout, x), (table,) = sample, LOSSY[name]
    x = (x * unit).clamp(-2.9e38, 2.9e38)
    found = through([table], x, layout)
    for part, back in zip(x.double().split(table.block), found.double().split(table.block), strict=True):
        scale = float(part.abs().max()) / (2 ** (table.bits - 1) - 1)
        assert float((part - back).abs().max()) <= max(scale, torch.finfo(torch.float32).tiny) * (0.5 + 1e-5)


@often
@given(samples)
def test_two_bits_are_a_sign_and_the_mean_of_half_a_block(sample) -> None:
    layout, x = sample
    found = through([recipe.Quantize(bits=2, block=64)], x, layout).double()
    expected = torch.zeros_like(found)
    for part, result in zip(x.double().split(64), expected.split(64), strict=True):
        above = part.abs() > part.abs().sort().values[(len(part) - 1) // 2]
        for half in (above, ~above):
            result[half] = part[half].abs().mean() * torch.where(part[half] < 0, -1, 1)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


@often
@given(samples)
def test_a_sign_loses_no_more_than_its_paper_says(sample) -> None:
    """``|x - C(x)|^2 <= (1 - |x|_1^2 / (d |x|_2^2)) |x|^2`` in each block."""
    layout, x = sample
    for part, back in zip(x.split(256), through([recipe.Sign()], x, layout).split(256), strict=True):
        share = float(part.double().abs().sum()) ** 2 / len(part)
        assert energy(part - back) <= energy(part) - share + 1e-5 * energy(part)
        assert torch.equal(back < 0, (part < 0) & (back != 0))


@often
@given(samples)
def test_a_codebook_is_off_by_a_bin_at_most_and_keeps_the_mean(sample) -> None:
    layout, x = sample
    found, deviation = through([recipe.Codebook()], x, layout).double(), float(x.double().std(correction=0))
    inner = (x.double() - x.double().mean()).abs() < 3 * deviation * 126 / 128  # the outer bins hold all that is beyond
    assert ((found - x)[inner].abs() <= 6 * deviation / 256 * (1 + 1e-5)).all()
    assert float((found - x).sum().abs()) <= 1e-6 * float(x.double().abs().sum())


def test_random_k_is_the_vector_in_the_mean() -> None:
    draws, layout, table = 1000, ((60,),), recipe.RandomK(density=0.2)
    x = numbers("t3", 60)
    found = [through([table], x, layout, draw) for draw in range(draws)]
    assert {int(one.count_nonzero()) for one in found} == {12}
    deviation = x.abs() * math.sqrt((60 / 12 - 1) / draws)
    assert ((torch.stack(found).mean(0) - x).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_random_k_without_scaling_sends_entries_as_they_are(density) -> None:
    x, layout = numbers("gauss", 1000), ((1000,),)
    one, other = (through([recipe.RandomK(density=density, unbiased=False)], x, layout, draw) for draw in (1, 2))
    assert int(one.count_nonzero()) == round(1000 * density)
    assert torch.equal(one[one != 0], x[one != 0])
    assert torch.equal(one, other) == (density == 1)


@pytest.mark.parametrize("rank", range(5))
def test_a_matrix_of_low_rank_comes_back(rank) -> None:
    layout, generator = ((40, 30), (9,), (50, 5, 12)), torch.Generator().manual_seed(3)
    parts = [torch.randn(9, generator=generator)]
    for rows, columns in ((40, 30), (250, 12)):
        sides = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        parts.append((sides[0] @ sides[1]).flatten())
    x = torch.cat([parts[1], parts[0], parts[2]])
    assert energy(through([recipe.LowRank(rank=4)], x, layout) - x) <= 1e-9 * energy(x)


def test_low_rank_projects_and_comes_to_the_best_factors() -> None:
    layout, table = ((60, 40),), recipe.LowRank(rank=3)
    link, x = link_of([table]), numbers("gauss", 2400)
    state = link.init(layout)
    pack(link, torch.zeros(2400), layout, state, 0)  # nothing is learnt, and nothing forgotten
    assert same(state, link.init(layout))
    for _ in range(100):
        found = unpack(link, pack(link, x, layout, state, 0), layout, 0)
        assert energy(x - found) == pytest.approx(energy(x) - energy(found), rel=1e-4)
    best = energy(torch.linalg.svdvals(x.double().view(60, 40))[3:])
    assert best * (1 - 1e-4) <= energy(x - found) <= best * 1.02


@pytest.mark.parametrize("power", [100, -80])
@every_lossy
def test_size_does_not_matter(tables, power) -> None:
    """Of numbers about 1e30 and 1e-24 as much is lost as of numbers about 1, and none becomes infinite."""
    link = link_of(tables)
    states = [link.init(MODEL), link.init(MODEL)]
    for draw in range(2):
        x = numbers("t3", elements(MODEL), draw)
        lost = []
        for state, unit in zip(states, (1.0, 2.0**power), strict=True):
            lost.append(unpack(link, pack(link, x * unit, MODEL, state, draw), MODEL, draw) / unit - x)
        assert energy(lost[1]) == pytest.approx(energy(lost[0]), rel=0.1, abs=1e-9 * energy(x))


@pytest.mark.parametrize(("name", "gauss", "t3"), [("int8", 0.007, 0.02), ("int4", 0.108, 0.2), ("codebook", 0.016, 1)])
def test_the_loss_is_the_one_known(name, gauss, t3) -> None:
    layout = ((1 << 18,),)
    x, y = numbers("gauss", 1 << 18), numbers("t3", 1 << 18)
    assert math.sqrt(energy(through(LOSSY[name], x, layout) - x) / energy(x)) == pytest.approx(gauss, rel=0.05)
    assert math.sqrt(energy(through(LOSSY[name], y, layout) - y) / energy(y)) <= t3


def test_two_bits_of_the_largest_lose_what_is_known() -> None:
    layout, x = ((1 << 18,),), numbers("gauss", 1 << 18)
    kept, sent = (
        through([recipe.BlockTopK()], x, layout),
        through([recipe.BlockTopK(), recipe.Quantize(bits=2, block=64)], x, layout),
    )
    assert energy(kept) / energy(x) == pytest.approx(0.12, rel=0.05)
    assert math.sqrt(energy(sent - kept) / energy(kept)) == pytest.approx(0.076, rel=0.05)


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUTS["7"], LAYOUTS["4097"], MODEL], ids=["7", "4097", "a model"])
@every_lossy
def test_error_feedback_loses_nothing(tables, layout) -> None:
    """What was sent and what is kept add up to what came in."""
    link = link_of([recipe.ErrorFeedback(), *tables])
    state, total, sent = link.init(layout), 0, 0
    for draw in range(6):
        vector = numbers("t3", elements(layout), draw)
        total += vector.double()
        sent += unpack(link, pack(link, vector, layout, state, draw), layout, draw).double()
    torch.testing.assert_close(sent + state["residual"], total, rtol=0, atol=1e-5 * float(total.abs().max()))


def test_error_feedback_forgets_with_its_decay() -> None:
    link, layout = link_of([recipe.ErrorFeedback(decay=0.5), recipe.TopK(density=0.25)]), ((4,),)
    state = link.init(layout)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert unpack(link, pack(link, x, layout, state, 0), layout, 0).tolist() == [0, 0, 0, 4]
    assert unpack(link, pack(link, x, layout, state, 0), layout, 0).tolist() == [0, 0, 4.5, 0]
    assert state["residual"].tolist() == [1.5, 3, 0, 4]


@often
@given(samples, st.floats(0.1, 100))
def test_clip_bounds_the_norm(sample, norm) -> None:
    layout, x = sample
    found = through([recipe.Clip(norm=norm)], x, layout)
    length = math.sqrt(energy(x))
    assert math.sqrt(energy(found)) == pytest.approx(min(norm, length), rel=1e-5)
    torch.testing.assert_close(found * max(1, length / norm), x)


# --- what is refused -----------------------------------------------------------------------------


@every_link
def test_what_does_not_fit_is_not_sent(tables) -> None:
    link, layout = link_of(tables), ((5, 3),)
    for vector in (torch.ones(14), torch.ones(5, 3), torch.ones(15, dtype=torch.float64)):
        with pytest.raises(TrainingError, match="does not fit"):
            pack(link, vector, layout, link.init(layout), 0)
    for wrong in (math.nan, math.inf, -math.inf):
        vector = torch.ones(15)
        vector[7] = wrong
        with pytest.raises(TrainingError, match="not finite"):
            pack(link, vector, layout, link.init(layout), 0)
    with pytest.raises(TrainingError, match="does not fit"):
        pack(link, torch.empty(0), ((0,),), {}, 0)


@pytest.mark.parametrize("tables", [t for n, t in (LOSSY | CHAINS).items() if n not in ("none", "clip")])
@often
@given(st.sampled_from(list(LAYOUTS.values())), st.integers(0, 1000), st.sampled_from([-math.inf, math.nan, 3.3e38]))
def test_what_was_tampered_with_is_refused_or_finite(tables, layout, seed, wrong) -> None:
    link, generator = link_of(tables), torch.Generator().manual_seed(seed)
    sent = pack(link, numbers("gauss", elements(layout)), layout, link.init(layout), 0)
    for name, tensor in sent.items():
        damaged = torch.randint(256, tensor.shape, generator=generator, dtype=torch.uint8)
        if tensor.is_floating_point():
            damaged = tensor.clone()
            damaged[int(torch.randint(tensor.numel(), (), generator=generator)) :] = wrong
        with pytest.raises(TrainingError):
            unpack(link, sent | {name: damaged[:-1]}, layout, 0)
        try:
            found = unpack(link, sent | {name: damaged}, layout, 0)
        except TrainingError:
            continue
        assert found.isfinite().all() and found.shape == (elements(layout),)


@pytest.mark.parametrize("places", [[1, 1], [2, 1], [0, 8], [-1, 3], [0, 2**31 - 1]])
def test_places_out_of_order_or_outside_are_refused(places) -> None:
    link, layout = link_of([recipe.TopK(density=0.25)]), ((8,),)
    sent = {"places": torch.tensor(places, dtype=torch.int32).view(torch.uint8), "values": torch.ones(2)}
    with pytest.raises(TrainingError, match="places"):
        unpack(link, sent, layout, 0)


@pytest.mark.parametrize("name", ["block-top-k", "dct-top-k"])
def test_a_place_beyond_the_end_of_a_short_block_is_refused(name) -> None:
    link, layout = link_of(LOSSY[name]), ((63,),)
    sent = pack(link, torch.ones(63), layout, {}, 0)
    sent["places"][-3:] = 255
    with pytest.raises(TrainingError, match="places"):
        unpack(link, sent, layout, 0)


def test_other_tensors_than_declared_are_refused() -> None:
    link, layout = link_of([recipe.Quantize()]), ((16,),)
    sent = pack(link, torch.ones(16), layout, {}, 0)
    for wrong in ({}, {"codes": sent["codes"]}, sent | {"more": torch.ones(1)}):
        with pytest.raises(TrainingError, match="expected"):
            unpack(link, wrong, layout, 0)
