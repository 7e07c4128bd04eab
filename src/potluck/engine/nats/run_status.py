"""What a coordinator says at the server of itself and of the run, and says again if the server loses it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from potluck.engine.nats.claim import Claim
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.subjects import Names
from potluck.errors import PotluckError

_SHOWN = ("run_started", "run_resumed", "round", "evaluation", "run_finished")


class Presence:
    """The coordinator's own sign of life, and the frame about the run.

    Args:
        claim: The right to coordinate this run.

    Attributes:
        progress: How far the run is.
    """

    def __init__(self, connection: Connection, names: Names, claim: Claim) -> None:
        self._connection, self._names, self._claim = connection, names, claim
        self._about: bytes | None = None
        self._left = False
        self.progress: dict[str, Any] = {"status": "working"}

    def tell_about(self, frame: bytes) -> None:
        """Tell participants what the run is about.

        Raises:
            StorageError, EngineError: The server does not take it.
        """
        self._about = frame
        self._connection.store(self._names.about, frame)

    def tell_again(self) -> None:
        """Tell it once more, if the server does not have it.

        Raises:
            StorageError, EngineError: The server does not take it.
        """
        asked = self._names.direct(self._names.states, self._names.about)
        if self._about is not None and self._connection.last(asked, patience=2.0) is None:
            self.tell_about(self._about)

    def take_event(self, event: Mapping[str, Any]) -> None:
        """Let everybody who may look know how far the run is; a listener of its event log."""
        if event["event"] in _SHOWN:
            bits = (event.get("union") or {}).get("bits_per_byte")
            facts = {"rounds": event.get("rounds"), "round": event.get("round"), "bits_per_byte": bits}
            new = {key: value for key, value in facts.items() if value is not None}
            self.progress = {**self.progress, **new, "event": event["event"], "time": event["time"]}

    def renew(self) -> None:
        """Give a sign of life.

        Raises:
            AlreadyServed: Another process coordinates this run now.
            EngineError: The server is away.
        """
        if not self._left:
            self._claim.renew(self.progress, patience=2.0)

    def leave(self) -> None:
        """Say goodbye, if the server is there: another process of this run may coordinate at once."""
        self._left = True
        with suppress(PotluckError):
            self._claim.renew({**self.progress, "status": "left"}, patience=2.0)
