"""What the local steps run on does not change what they do, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from potluck.recipe import Recipe


@pytest.mark.parametrize(
    ("compute", "relative"),
    [
        ({"gradient_checkpointing": True}, 0.0),
        ({"precision": "bf16"}, 0.2),
    ],
)
def test_update(
    make_recipe: Callable[..., Recipe], make_world: Callable[..., Any], compute: dict[str, Any], relative: float
) -> None:
    def reached(**changes: Any) -> torch.Tensor:
        recipe = make_recipe(1, rounds={"count": 1, "local_steps": 3})
        changed = recipe.model_copy(update={"compute": recipe.compute.model_copy(update=changes)})
        world = make_world(changed)
        start = world.shared.theta.clone()
        return world.run() - start

    plain, other = reached(), reached(**compute)
    assert float((plain - other).norm() / plain.norm()) <= relative
