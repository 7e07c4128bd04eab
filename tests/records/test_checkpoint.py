"""Checkpoints take no more of the disk than they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potluck.errors import CheckpointError
from potluck.records.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from potluck.updates.codec import payload_parts


def save(folder: Path, number: int, shared: float, ada: float) -> None:
    parts = {"shared": {"theta": torch.full((50,), shared)}, "ada": {"moments": torch.full((90,), ada)}, "none": {}}
    save_checkpoint(folder, number, {"best": number}, {name: payload_parts(part) for name, part in parts.items()})


def file(folder: Path, number: int, part: str) -> Path:
    return folder / f"round-{number:06d}" / f"{part}.safetensors"


def test_a_part_that_did_not_change_is_linked(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, 0.0)
    save(tmp_path, 2, 2.0, 0.0)
    assert file(tmp_path, 1, "ada").samefile(file(tmp_path, 2, "ada"))
    assert not file(tmp_path, 1, "shared").samefile(file(tmp_path, 2, "shared"))
    prune_checkpoints(tmp_path, 1, None)
    found = load_checkpoint(tmp_path)
    assert float(found.parts["ada"]["moments"].sum()) == 0 and float(found.parts["shared"]["theta"].sum()) == 100


def test_what_was_cut_off_is_not_linked(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, 0.0)
    file(tmp_path, 1, "ada").write_bytes(b"")
    save(tmp_path, 2, 1.0, 0.0)
    assert load_checkpoint(tmp_path, 2).round == 2
    assert not file(tmp_path, 1, "ada").samefile(file(tmp_path, 2, "ada"))


def test_the_same_round_again_keeps_its_linked_parts(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0, 5.0)
    save(tmp_path, 1, 2.0, 5.0)
    found = load_checkpoint(tmp_path, 1)
    assert float(found.parts["shared"]["theta"][0]) == 2 and float(found.parts["ada"]["moments"][0]) == 5


def test_of_the_best_only_the_weights_are_kept(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path, number, float(number), float(number))
        prune_checkpoints(tmp_path, 2, 1)
    assert list_checkpoints(tmp_path) == [1, 3, 4]
    assert sorted(path.name for path in (tmp_path / "round-000001").iterdir()) == ["shared.safetensors", "state.json"]
    assert float(load_checkpoint(tmp_path, 1, only="shared").parts["shared"]["theta"][0]) == 1
    with pytest.raises(CheckpointError, match="only the weights were kept") as error:
        load_checkpoint(tmp_path, 1)
    assert "3, 4" in error.value.hint
