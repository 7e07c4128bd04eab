"""Clusters of adapters: found from products, whatever the gauge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potluck.compose.adapter import Adapter, Factors
from potluck.compose.library.clustering import cluster_adapters, similarity
from potluck.errors import ModelError, RecipeError

SHAPES = {"a": (10, 6), "b": (6, 12)}


def in_some_gauge(delta: Tensor, rank: int, draw: torch.Generator) -> Factors:
    u, s, vt = torch.linalg.svd(delta)
    gauge = torch.randn(rank, rank, generator=draw) + 2 * torch.eye(rank)
    up, down = u[:, :rank] * s[:rank], vt[:rank]
    return Factors(gauge @ down, up @ torch.linalg.inv(gauge))


def planted(groups: int, each: int, seed: int) -> dict[str, Adapter]:
    """Adapters of mixed ranks around group means, their factors mixed at random."""
    draw = torch.Generator().manual_seed(seed)
    means = [{path: torch.randn(o, i, generator=draw) for path, (i, o) in SHAPES.items()} for _ in range(groups)]
    return {
        f"{group}-{number}": Adapter(
            {
                path: in_some_gauge(mean + 0.5 * torch.randn(mean.shape, generator=draw), 5 + number % 2, draw)
                for path, mean in means[group].items()
            }
        )
        for number in range(each)
        for group in range(groups)
    }


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed: int) -> None:
    adapters = planted(4, 5, seed)
    labels = cluster_adapters(adapters, 4, seed)
    assert labels == {name: int(name[0]) for name in adapters}


def test_the_similarity_is_the_cosine_of_products() -> None:
    adapters = planted(2, 2, 0)
    del adapters["0-1"].modules["b"]
    vectors = [
        torch.cat(
            [
                a.modules[path].to(torch.float64).delta().flatten()
                if path in a.modules
                else torch.zeros(i * o, dtype=torch.float64)
                for path, (i, o) in SHAPES.items()
            ]
        )
        for a in adapters.values()
    ]
    wanted = torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for y in vectors]) for x in vectors])
    assert torch.allclose(similarity(adapters), wanted, atol=1e-6)


def test_every_adapter_may_be_its_own_group() -> None:
    adapters = planted(2, 2, 0)
    assert list(cluster_adapters(adapters, 4).values()) == [0, 1, 2, 3]
    assert set(cluster_adapters(adapters, 1).values()) == {0}


@pytest.mark.parametrize("k", [0, 5])
def test_so_many_groups_there_cannot_be(k: int) -> None:
    with pytest.raises(RecipeError):
        cluster_adapters(planted(2, 2, 0), k)


def test_what_cannot_be_compared_is_refused() -> None:
    one = Adapter({"a": Factors(torch.ones(1, 3), torch.ones(2, 1))})
    with pytest.raises(ModelError, match="different shapes"):
        similarity({"one": one, "other": Adapter({"a": Factors(torch.ones(1, 4), torch.ones(2, 1))})})
    with pytest.raises(ModelError, match="empty: adds nothing"):
        similarity({"one": one, "empty": Adapter({"a": Factors(torch.ones(1, 3), torch.zeros(2, 1))})})
