"""Who is there: each participant's value in the key-value bucket, and when it last changed by our own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from potluck.contribution import HeldOutText, ParticipantId
from potluck.engine.nats.claim import REFUSED
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.signs import read_sign
from potluck.engine.nats.subjects import Names
from potluck.untrusted import in_a_line

Presence = Literal["absent", "reading", "ready", "working", "left", "silent"]
_SAID = ("reading", "ready", "working", "left")


@dataclass
class Member:
    """One participant as it presents itself.

    Attributes:
        said: Its last sign of life: ``status``, ``session``, ``holding``, ``task`` and other facts.
        revision: Of its value; one that stays is no sign of life.
        since: When it began to do what it does.
        unread: Revision of one that could not be read.
        seen: When it last changed, on our monotonic clock: participants' clocks may be wrong.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 0
    unread: int = 0
    seen: float = float("-inf")
    since: float = float("-inf")

    def presence(self, now: float, silence: float) -> Presence:
        """Where it is."""
        status = self.said.get("status")
        if status not in _SAID:
            return "absent"
        if status != "left" and now - self.seen > silence:
            return "silent"
        return status  # type: ignore[no-any-return]


class Members:
    """All participants' values, read again and again: no subscription has to survive the server.

    Attributes:
        unfit: Why one that is there cannot take part, from what it says of itself; empty if it can.
        holds: Tokens of training text with which one first joined.
        refused: Told of what was no sign of life: whose it seems to be, and why.
    """

    def __init__(self, connection: Connection, names: Names, participants: Iterable[ParticipantId], silence: float):
        self._connection, self._names, self._silence = connection, names, silence
        self.unfit: Callable[[ParticipantId, Mapping[str, Any]], str] = lambda name, said: ""
        self.holds: Callable[[ParticipantId], int] = lambda name: 0
        self.refused: Callable[[ParticipantId, str], None] = lambda name, why: None
        self.of = {name: Member() for name in participants}

    def look(self) -> None:
        """Read everybody's value.

        Raises:
            EngineError: The server is away.
        """
        for name, member in self.of.items():
            direct = self._names.direct(f"KV_{self._names.members}", self._names.member(name))
            found = self._connection.last(direct, patience=5.0)
            if found is None:
                continue
            data, headers = found
            revision = int(headers.get("Nats-Sequence", 0))
            if revision in (member.revision, member.unread):  # of a store that was lost they begin anew
                continue
            try:
                said = read_sign(data)
            except Exception as error:  # whatever a message does to its reader, it ends here
                member.unread = revision
                self.refused(name, f"no sign of life: {in_a_line(str(error))}")
                continue
            if said["status"] != REFUSED:  # of a process that may not serve
                age = 0.0 if member.revision else _age(headers.get("Nats-Time-Stamp", ""))
                if any(said.get(key) != member.said.get(key) for key in ("status", "task")):
                    member.since = time.monotonic()
                member.said, member.revision, member.seen = said, revision, time.monotonic() - age

    def presence(self, name: ParticipantId) -> Presence:
        """Where a participant is."""
        return self.of[name].presence(time.monotonic(), self._silence)

    def away(self, name: ParticipantId, reading: bool = False, silent: bool = True) -> str:
        """Why a participant cannot be given a task now; empty if it can.

        Args:
            reading: One that is still preparing will do.
            silent: And so will one that gives no sign of life: it may come back.
        """
        presence = self.presence(name)
        if presence == "silent" and not silent:
            return "is silent"
        if presence in ("absent", "left") or (presence == "reading" and not reading):
            why = f": {self.of[name].said['reason']}" if presence == "left" and self.of[name].said.get("reason") else ""
            return {"absent": "has not joined", "left": "has left", "reading": "is still preparing"}[presence] + why
        return self.unfit(name, self.of[name].said)

    def gone(self, name: ParticipantId, seconds: float) -> bool:
        """Whether a participant said goodbye, so long ago."""
        return self.presence(name) == "left" and time.monotonic() - self.of[name].seen > seconds

    def idle(self, name: ParticipantId, asked: float, seconds: float) -> bool:
        """Whether a participant that was ``asked`` something by now has said for so long that it has nothing to do."""
        member, ready = self.of[name], self.presence(name)
        waits = ready == "ready" or (ready == "reading" and member.said.get("words") is True)
        return waits and member.seen > asked and time.monotonic() - max(member.since, asked) > seconds

    def contested(self) -> set[ParticipantId]:
        """Participants who say that others with their invite were refused."""
        return {name for name, member in self.of.items() if member.said.get("refused") not in (None, 0)}

    def held_out(self, name: ParticipantId) -> HeldOutText | None:
        """How much text a participant says it holds out; ``None`` if it does not say."""
        holding = self.of[name].said.get("holding")
        return None if holding is None else HeldOutText(holding["validation_tokens"] - 1, holding["validation_bytes"])

    def facts(self, name: ParticipantId) -> dict[str, Any]:
        """What ``potluck status`` shows of one."""
        member = self.of[name]
        ago = time.monotonic() - member.seen
        seen = None if ago == float("inf") else round(ago, 1)
        return {**member.said, "presence": self.presence(name), "seen_seconds_ago": seen}


def _age(stamp: str) -> float:
    """Seconds since the server stored a value that was there before us, by the clocks of both; 0 if they disagree."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(f"{stamp[:19]}+00:00")).total_seconds())
    except ValueError:
        return 0.0
