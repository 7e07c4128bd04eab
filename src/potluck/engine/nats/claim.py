"""One participant, one process: of all that hold an invite, the one that serves under its name. So of coordinators.

A participant's last sign of life on the server says who serves. It is replaced only by whoever knows its sequence
number (compare and set), so that of two processes one is told that the other was first.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potluck.engine.nats.connection import Connection
from potluck.engine.nats.signs import MAX_BYTES
from potluck.engine.nats.subjects import COORDINATOR, Names
from potluck.errors import AlreadyServed, EngineError, Interrupted, Outrun
from potluck.files import storing, write_text
from potluck.untrusted import loads

REFUSED = "refused"  # the status of a sign of life that another process left behind
LOOK_SECONDS = 0.2
_HINT = "end one of them: an invite is for one machine, and one folder there"
_HOST_HINT = "end one of them: a copy of a run folder is the same run"


class Claim:
    """The right to serve under a name.

    Args:
        session: Of the folder that keeps the participant's state: a process that comes back there goes on at once.
        silence: Seconds without a sign of life after which another's claim is void.

    Attributes:
        refused: Other processes that were refused while this one served.
        lost: Why this process serves no longer; empty while it does.
    """

    def __init__(self, connection: Connection, names: Names, name: str, session: str, silence: float) -> None:
        self._connection, self._name, self._session, self._silence = connection, name, session, silence
        self._subject = names.member(name)
        self._direct = names.direct(f"KV_{names.members}", self._subject)
        self._does, self._hint = f"takes part as {name}", _HINT
        if name == COORDINATOR:
            self._does, self._hint = "coordinates this run", _HOST_HINT
        self._process, self._sequence = uuid.uuid4().hex[:12], 0
        self._renewed = time.monotonic()
        self._lock = threading.Lock()
        self.refused, self.lost = 0, ""

    @property
    def stale(self) -> bool:
        """Whether another may have taken over since this process last said anything, as after it was suspended."""
        return time.monotonic() - self._renewed > self._silence

    def make(self, stop: Callable[[], bool], told: Callable[[str], None]) -> None:
        """Become the process that serves, once no other does.

        Raises:
            AlreadyServed: Another process gives signs of life. It is told.
            EngineError: The server is away.
        """
        sequence, said = self._last()
        until = time.monotonic() + self._silence
        if self._of_another(said):
            told(f"another process {self._does}, or did: waiting up to {self._silence:g} s for a sign of it")
        while self._of_another(said):
            first, (sequence, said) = sequence, self._last()
            if self._of_another(said) and sequence != first:
                self._knock(sequence)
                raise AlreadyServed(
                    f"another process {self._does}, on another machine or in another folder", self._hint
                )
            if time.monotonic() > until:
                break
            if stop():
                raise Interrupted("while another process might still have served")
            time.sleep(LOOK_SECONDS)
        self._sequence = sequence

    def renew(self, facts: Mapping[str, Any], patience: float) -> None:
        """Give a sign of life.

        Raises:
            AlreadyServed: Another process serves under this name now.
            EngineError: The server is away.
        """
        if not self._lock.acquire(timeout=patience):
            raise EngineError("the server does not answer")  # another thread waits for it
        try:
            while not self.lost:
                try:
                    said = {**facts, **self._who(), "refused": self.refused}
                    self._sequence = self._put(said, self._sequence, patience)
                    self._renewed = time.monotonic()
                    return
                except Outrun:
                    self._sequence, other = self._last(patience)
                    if other.get("process") == self._process:
                        self._renewed = time.monotonic()  # it had come, and its acknowledgement had not
                    elif other.get("status") == REFUSED:
                        self.refused += 1
                    elif other and other.get("status") != "left":
                        self.lost = f"another process {self._does} now"
            raise AlreadyServed(self.lost, self._hint)
        finally:
            self._lock.release()

    def _of_another(self, said: Mapping[str, Any]) -> bool:
        """Whether a sign of life is of a process elsewhere that may be at work."""
        return bool(said) and said.get("status") not in ("left", REFUSED) and said.get("session") != self._session

    def _knock(self, sequence: int) -> None:
        """Let the one that serves know; if it was quicker, it has been told by its next sign of life."""
        try:
            self._put({**self._who(), "status": REFUSED}, sequence, 5.0)
        except Outrun:
            self._put({**self._who(), "status": REFUSED}, self._last()[0], 5.0)

    def _who(self) -> dict[str, str]:
        return {"session": self._session, "process": self._process}

    def _put(self, said: Mapping[str, Any], sequence: int, patience: float) -> int:
        return self._connection.store(self._subject, json.dumps(said).encode(), patience, after=sequence)

    def _last(self, patience: float = 30.0) -> tuple[int, Mapping[str, Any]]:
        """The last sign of life under this name, and its sequence number; 0 if there is none."""
        found = self._connection.last(self._direct, patience)
        if found is None:
            return 0, {}
        try:
            said = loads(found[0], most_bytes=MAX_BYTES)
        except ValueError:
            said = {}
        return int(found[1].get("Nats-Sequence", 0)), said if isinstance(said, dict) else {}


def session_of(folder: Path) -> str:
    """The session of a folder, made when it is first asked for; a copy of the folder has another.

    Raises:
        StorageError: The folder cannot be written.
    """
    path = folder / "session"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        place = (path.read_text(encoding="ascii", errors="replace")[:32], socket.gethostname(), path.stat().st_ino)
        return hashlib.sha256(repr(place).encode()).hexdigest()[:32]
