"""Asked to leave while the server says nothing more: everybody leaves all the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.machines.test_machines import Hosted

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


def test_a_transfer_that_stands_still_holds_nobody(
    potluck: Potluck,
    tables: Tables,
    sources: dict[str, dict[str, Any]],
    tmp_path: Path,
    events: Callable[..., Any],
) -> None:
    engine = {"kind": "nats", "heartbeat": 0.5, "inline_bytes": 0}
    recipe = potluck.recipe(tables, rounds={"count": 400, "local_steps": 2, "evaluate_every": 400}, engine=engine)
    hosted = Hosted(potluck, recipe, tmp_path / "run")
    joined = [hosted.join(name, source) for name, source in sources.items()]
    hosted.until(lambda: len(events(tmp_path / "run", "round")) > 1)
    server = int((tmp_path / "run" / "host" / "server" / "server.pid").read_text())
    os.kill(server, signal.SIGSTOP)
    try:
        for process in joined:
            process.signal(signal.SIGTERM)
        assert [process.wait(90).code for process in joined] == [130] * 3
        hosted.coordinator.signal(signal.SIGTERM)
        hosted.until(lambda: "stopping after this round" in hosted.said())
        hosted.coordinator.signal(signal.SIGTERM)
        assert hosted.coordinator.wait(90).code == 130
    finally:
        with suppress(OSError):
            os.kill(server, signal.SIGKILL)


def test_a_server_that_is_gone_holds_nobody(
    potluck: Potluck, tables: Tables, sources: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    engine = {"kind": "nats", "heartbeat": 0.5}
    hosted = Hosted(potluck, potluck.recipe(tables, engine=engine), tmp_path / "run")
    ada = hosted.join("ada", sources["ada"])
    hosted.until(lambda: "ada: is here" in hosted.said())
    hosted.coordinator.signal(signal.SIGKILL)
    os.kill(int((tmp_path / "run" / "host" / "server" / "server.pid").read_text()), signal.SIGKILL)
    while "the server is away" not in ada.err.read_text():
        assert not ada.ends_within(0.05)
    ada.signal(signal.SIGTERM)
    assert "could not say goodbye" in ada.wait(8).err  # not for as long as a call may wait for a server
