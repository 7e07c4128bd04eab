"""A fused model in the rounds: only its head is trained and travels, in one process and over nats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from tests.machines.test_machines import Hosted

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


@dataclass(frozen=True)
class Trained:
    """A run in one process, and the fused folder that it started from.

    Attributes:
        another: A folder of the same shape, in which one frozen model is another.
    """

    fused: Path
    another: Path
    recipe: Path
    foreseen: dict[str, Any]
    run: Path


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, potluck_in: Callable[[Path], Potluck], tables: Tables
) -> Iterator[Trained]:
    from potluck.compose.fusion import fuse_models
    from potluck.models.build import build_model
    from potluck.models.export import export_folder
    from potluck.recipe.schema import Bytes, Shape
    from tests.compose.test_fusion import VOCABULARY

    root = tmp_path_factory.mktemp("fused")
    wide = Shape(layers=1, width=32, heads=2, feedforward=48, context=64)
    deep = Shape(layers=2, width=16, heads=2, feedforward=32, context=64)
    for name, shape, seed in (("ada", wide, 1), ("bob", deep, 2), ("another", deep, 3)):
        model = build_model(shape, VOCABULARY.size, VOCABULARY.end_of_text, seed)
        export_folder(model, Bytes(), VOCABULARY.tokenizer, VOCABULARY.end_of_text, root / name)
    fuse_models({"ada": root / "ada", "bob": root / "bob"}, root / "fused", "ada", width=4)
    fuse_models({"ada": root / "ada", "bob": root / "another"}, root / "fused-another", "ada", width=4)

    verbs = potluck_in(root)
    own = {key: value for key, value in tables.items() if key != "tokenizer"}
    local = {**tables["local"], "optimizer": {"kind": "adamw", "learning_rate": 0.02}}
    rounds = {"count": 3, "local_steps": 3}
    recipe = verbs.recipe(own, model={"path": str(root / "fused")}, local=local, rounds=rounds)
    foreseen = verbs("check", recipe, "--json").result
    verbs("train", recipe, "--set", f"records.folder={root / 'run'}")
    yield Trained(root / "fused", root / "fused-another", recipe, foreseen, root / "run")
    verbs.end()


def test_only_the_head_is_trained_and_travels(trained: Trained, potluck: Potluck) -> None:
    from safetensors.torch import load_file

    from potluck.models.build import load_folder
    from potluck.records.curves import read_run

    run = read_run(trained.run)
    start, end = (load_file(folder / "model.safetensors") for folder in (trained.fused, trained.run / "model"))
    head = {name for name in start if name.startswith("fusion.")}
    size = sum(start[name].numel() for name in head)
    assert {name for name in start if not start[name].equal(end[name])} == head and start.keys() == end.keys()
    assert size == trained.foreseen["parameters"] == run.parameters
    assert size < 0.1 * sum(tensor.numel() for tensor in start.values())
    for direction in ("up_bytes", "down_bytes"):
        assert run.transferred(direction) == pytest.approx(trained.foreseen[direction], rel=0.01)
    assert run.union_curve[-1] < run.union_curve[0]
    assert load_folder(trained.run / "model").num_parameters(only_trainable=True) == size
    card = (trained.run / "model" / "README.md").read_text()
    assert f"of {size} parameters beside " in card and "register()" in card
    potluck("generate", trained.run / "model", "--max-tokens", 2)


def test_over_nats_it_is_the_same(
    trained: Trained, potluck: Potluck, tables: Tables, tmp_path: Path, final_hash: Callable[[Path], str]
) -> None:
    """And nobody is let in whose frozen models are others."""
    from potluck.records.curves import read_run

    hosted = Hosted(potluck, trained.recipe, tmp_path / "apart")

    def join(participant: dict[str, Any], folder: Path) -> Any:
        name = participant["name"]
        part = tmp_path / f"{name}-{folder.name}.toml"
        part.write_text(tomli_w.dumps({"source": participant["source"], "model": str(folder)}))
        own = ("--part", part, "--folder", tmp_path / f"at-{name}-{folder.name}")
        return potluck.start("join", "--invite", hosted.invite(name), *own, "--json")

    ada, *others = tables["participants"]
    refused = join(ada, trained.another).wait()
    assert refused.code == 13 and "other parameters than the coordinator's" in json.loads(refused.out)["error"]
    for participant in (ada, *others):
        join(participant, trained.fused)
    assert hosted.coordinator.wait().code == 0, hosted.said()
    assert final_hash(tmp_path / "apart") == final_hash(trained.run)
    run = read_run(tmp_path / "apart")
    assert all(4 * run.parameters < c.up_bytes < 4 * run.parameters + 4096 for c in run.contributions)


def test_together_is_pooled_when_every_step_is_exchanged(trained: Trained, potluck: Potluck, tmp_path: Path) -> None:
    from potluck.records.checkpoint import load_checkpoint

    plain = ("rounds.local_steps=1", "rounds.weights=uniform", "local.clip_norm=0.0",
             "local.optimizer={kind='sgd',learning_rate=0.01}", "records.folder=both")  # fmt: skip
    potluck("compare", trained.recipe, *(word for setting in plain for word in ("--set", setting)))
    together, pooled = (
        load_checkpoint(tmp_path / "both" / kind / "checkpoints").parts["shared"]["theta"]
        for kind in ("together", "pooled")
    )
    assert float((together - pooled).abs().max()) < 1e-6
