"""What a run left on disk may be cut or damaged: the file is named, whatever is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potluck.engine.nats.host_keys import Place, open_premises
from potluck.errors import CheckpointError, InviteError, RunFolderError
from potluck.local_store import LocalStore
from potluck.records.checkpoint import attempts, load_checkpoint, save_checkpoint
from potluck.records.events import EventLog, read_events
from potluck.records.folder import open_run
from potluck.updates.codec import payload_parts

DAMAGES = [
    "[" * 100_000,
    '{"event": "round", "x": ' + "[" * 200 + "]" * 200 + "}",
    '{"event": "round", "round": 1',
    '{"event": "round", "round": 1' + "0" * 5000 + "}",
    "\x00\x00\x00",
    "[]",
]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for number in range(3):
        log.write("round", round=number)
    log.close()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match="line 2 is not an event"):
        list(read_events(path))

    save_checkpoint(tmp_path, 7, {"task": "x"}, {"part": payload_parts({"x": torch.ones(3)})})
    (tmp_path / "round-000007" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"round-000007.*damaged"):
        load_checkpoint(tmp_path)
    (tmp_path / "attempts.json").write_text(damage)
    assert attempts(tmp_path) == {}

    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run(tmp_path)
    with pytest.raises(InviteError, match=r"run.json: damaged"):
        open_premises(tmp_path, "tiny", ["ada"], Place(), {})


def test_a_task_that_was_kept_without_its_facts_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tasks", 1, {"run": "x", "task": ["nested"], "revision": "1"}, {})
    with pytest.raises(CheckpointError, match="task 1 is damaged"):
        LocalStore(tmp_path, {"run": "x"}, keep=4)
