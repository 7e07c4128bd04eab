"""LoRA-LEGO: units, k-means on inner products, and what the reweightings keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.low_rank import canonical
from potluck.compose.merging.adapters import merge_adapters
from potluck.compose.merging.lego import Lego, kmeans, lego


def random(rank: int, seed: int, d_out: int = 11, d_in: int = 13) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw))


def gram(points: Tensor) -> Tensor:
    return points.double() @ points.double().T


def spread(points: Tensor, labels: Tensor) -> float:
    clusters = [points[labels == label] for label in labels.unique()]
    return float(sum(((cluster - cluster.mean(0)) ** 2).sum() for cluster in clusters))


def test_kmeans_finds_what_is_apart() -> None:
    torch.manual_seed(0)
    truth = torch.arange(40) % 5
    points = 20 * torch.randn(5, 6)[truth] + torch.randn(40, 6)
    labels = kmeans(gram(points), 5, torch.Generator().manual_seed(1))
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 5


def test_kmeans_is_a_fixed_point_of_lloyds_algorithm() -> None:
    torch.manual_seed(0)
    points = torch.randn(30, 4).double()
    labels = kmeans(gram(points), 6, torch.Generator().manual_seed(1))
    centres = torch.stack([points[labels == j].mean(0) for j in range(6)])
    assert torch.equal(torch.cdist(points, centres).argmin(1), labels)
    random_labels = [torch.randint(6, (30,)) for _ in range(20)]
    assert spread(points, labels) < min(spread(points, other) for other in random_labels)


@pytest.mark.parametrize("points", [torch.ones(7, 3), torch.zeros(7, 3), torch.eye(7), torch.ones(1, 1)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_cluster_has_a_point(points: Tensor, k: int) -> None:
    """Even where all points coincide."""
    k = min(k, len(points))
    assert set(kmeans(gram(points), k, torch.Generator().manual_seed(0)).tolist()) == set(range(k))


def test_with_a_cluster_for_each_unit_it_is_the_mean() -> None:
    parts = [random(2, 1), random(5, 2), random(3, 3)]
    mean = sum((part.delta() for part in parts), torch.zeros(())) / 3
    found = lego(parts, 99, Lego())
    assert found.rank == 10
    assert torch.allclose(found.delta(), mean, atol=1e-5)


def test_equal_adapters_are_found_in_any_gauge() -> None:
    """Their units coincide once the gauge is fixed, and centres need no reweighting."""
    part, mix = random(3, 1), torch.tensor([[2.0, 0.3, 0], [0, -1, 0.5], [0.2, 0, 0.7]])
    same = Factors(mix @ part.down, part.up @ mix.inverse())
    assert torch.allclose(lego([part, same], 3, Lego()).delta(), part.delta(), atol=1e-4)


def test_reweighting() -> None:
    parts = [random(4, seed) for seed in range(3)]
    plain, longer, scaled, both = (
        lego(parts, 2, Lego(reweight_parameters=p, reweight_output=o)) for o in (False, True) for p in (False, True)
    )
    assert torch.allclose(scaled.down, plain.down * 2**0.5) and torch.allclose(both.up, longer.up * 2**0.5)
    norms = torch.cat([(canonical(p).down ** 2).sum(1) + (canonical(p).up ** 2).sum(0) for p in parts]).sqrt()
    merged = ((longer.down**2).sum(1) + (longer.up**2).sum(0)).sqrt()
    assert norms.min() <= merged.min() and merged.max() <= norms.max()
    assert (merged > ((plain.down**2).sum(1) + (plain.up**2).sum(0)).sqrt()).all()


def test_opposite_and_empty_adapters_leave_no_nan() -> None:
    part = random(2, 1)
    opposite, zero = Factors(part.down, -part.up), Factors(part.down, 0 * part.up)
    for parts in ([part, opposite], [zero, zero], [zero, part]):
        found = lego(parts, 1, Lego())
        assert torch.isfinite(found.delta()).all()


def test_a_seed_decides() -> None:
    adapters = [Adapter({"x": random(4, seed), "y": random(3, 9 + seed)}) for seed in range(4)]
    one, again = (merge_adapters(adapters, Lego(seed=3), rank=3) for _ in range(2))
    for path, factors in one.modules.items():
        assert torch.equal(factors.delta(), again.modules[path].delta()) and factors.rank == 3
