"""The synchronous loop and its plain twin compute the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.one_file_diloco import diloco
from potluck.models.build import build_model

OUTER = {
    "fedavg": {"kind": "sgd"},
    "half of fedavg": {"kind": "sgd", "learning_rate": 0.5},
    "diloco": {"kind": "nesterov", "learning_rate": 0.7, "momentum": 0.9},
}


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_the_example_and_the_rounds_agree_bit_for_bit(make_recipe, make_world, outer, weights) -> None:
    rounds, steps, warmup = 3, 4, 2
    schedule = {"kind": "cosine", "warmup_steps": warmup}
    recipe = make_recipe(
        3, outer=outer, rounds={"count": rounds, "local_steps": steps}, local={"schedule": schedule}
    )
    world = make_world(recipe)
    vocabulary = world.participants["p0"].network.model.config.vocab_size
    model = build_model(recipe.model, vocabulary, 0, recipe.seed)

    def perform(name, task):
        done = world.participants[name].perform(task)
        tokens = done.header["tokens"] * weights[int(name[1])]
        return replace(done, header={**done.header, "tokens": tokens})

    def batches_of(participant, number, step):
        batches = world.participants[f"p{participant}"].batches[0]
        size = recipe.local.batch_size
        return torch.from_numpy(batches.draw((number * steps + step) * size, size))

    twin = diloco(
        model, batches_of, participants=3, rounds=rounds, local_steps=steps, warmup=warmup, weights=weights,
        outer_rate=recipe.outer.learning_rate, outer_momentum=recipe.outer.momentum,
    )  # fmt: skip
    start = world.shared.theta.clone()
    assert torch.equal(world.run(perform), twin)
    assert torch.dist(twin, start) > 0.1
