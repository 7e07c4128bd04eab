"""The synchronous loop and its plain twin compute the same numbers."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from examples import one_file_diloco
from examples.one_file_diloco import diloco, nats
from potluck.local.evaluate import negative_log_likelihood
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
    how = {"count": rounds, "local_steps": steps, "weights": "data"}
    recipe = make_recipe(3, outer=outer, rounds=how, local={"schedule": schedule})
    world = make_world(recipe)
    world.holds = {f"p{i}": 400 * weight for i, weight in enumerate(weights)}
    vocabulary = world.participants["p0"].network.model.config.vocab_size
    model = build_model(recipe.model, vocabulary, 0, recipe.seed)

    def batches_of(participant, number, step):
        batches = world.participants[f"p{participant}"].batches[0]
        size = recipe.local.batch_size
        return torch.from_numpy(batches.draw((number * steps + step) * size, size))

    twin = diloco(
        model, batches_of, participants=3, rounds=rounds, local_steps=steps, warmup=warmup, weights=weights,
        outer_rate=recipe.outer.learning_rate, outer_momentum=recipe.outer.momentum,
    )  # fmt: skip
    start = world.shared.theta.clone()
    assert torch.equal(world.run(), twin)
    assert torch.dist(twin, start) > 0.1


def test_both_measure_the_same_loss(make_recipe, make_network) -> None:
    network, stream = make_network(make_recipe()), torch.arange(50) % 7
    expected, _ = negative_log_likelihood(network, stream.numpy(), 16)
    assert nats(network.model, stream, 16) == pytest.approx(expected, rel=1e-6)


def test_the_example_stands_alone_in_under_200_lines() -> None:
    source = Path(one_file_diloco.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 200
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {name.partition(".")[0] for name in imported} <= {*sys.stdlib_module_names, "torch", "transformers"}


def test_the_example_trains_on_texts(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(one_file_diloco, "ROUNDS", 1)
    monkeypatch.setattr(one_file_diloco, "LOCAL_STEPS", 3)
    monkeypatch.setattr(one_file_diloco, "WARMUP", 1)
    (tmp_path / "yours").mkdir()
    for file in (tmp_path / "mine.txt", tmp_path / "yours" / "a.txt", tmp_path / "yours" / "b.md"):
        file.write_text("to be or not to be, that is the question\n" * 20)
    one_file_diloco.main([tmp_path / "mine.txt", tmp_path / "yours"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in table] == ["bits", "untrained", "mine", "yours", "FedAvg", "DiLoCo"]
    assert float(table[4][-1]) < float(table[1][-1])
