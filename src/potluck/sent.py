"""What has left a participant, on its own disk for its owner: `sent.jsonl`, and the owner's limits in total.

A line is written, and is on disk, before the first byte of an answer goes. So nothing leaves unsaid, and an answer that
did not get through has a line as well.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potluck.contribution import Contribution
from potluck.errors import PolicyError
from potluck.files import storing
from potluck.recipe.part import Limits
from potluck.records.units import bytes_text

TRAINING = ("train", "stream", "eager")
WHAT: Mapping[str, str] = {
    "train": "update: how its local steps changed the model, their loss and tokens",
    "stream": "update of a part of the model: how its local steps changed it, their loss and tokens",
    "eager": "update: how its local steps changed the model, their loss and tokens",
    "evaluate": "loss on its held-out text",
    "words": "its words, and how often each stands in its text",
    "predict": "what its own model says comes next",
    "claims": "keyed hashes of its edits",
    "moments": "sums over the keys of its text",
    "edit": "sums over the keys and residuals of its edits",
}  # by kind of task


@dataclass
class _Total:
    """What all lines come to; a round is a task of training, however often its answer is sent."""

    rounds: set[str] = field(default_factory=set)
    bytes: int = 0
    seconds: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """One line more."""
        self.bytes += int(line["bytes"])
        self.seconds = float(line["seconds"])
        if line["kind"] in TRAINING:
            self.rounds.add(str(line["task"]))


class Sent:
    """The record of a participant in one run; a later session goes on with it.

    Args:
        path: ``sent.jsonl``; it only ever grows.
        limits: After which the participant leaves.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self._lock, self._began = threading.Lock(), time.monotonic()
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")
            os.fchmod(self._file.fileno(), 0o600)
            self._file.seek(0)
            self._total, last = _Total(), b"\n"
            for last in self._file:
                _count(last, self._total)
            if not last.endswith(b"\n"):  # cut off by a crash, before anything left
                self._file.write(b"\n")
        self._earlier = self._total.seconds

    def __call__(self, task: str, contribution: Contribution | None, size: int, digest: str) -> None:
        """Note an answer that is about to leave.

        Args:
            task: Its name; without a contribution the answer says why it was not done.
            size: Bytes of all its messages, as the coordinator counts them.
            digest: SHA-256 of its tensors; of the message, if it has none.

        Raises:
            PolicyError: With it, more would have left than the limits allow: it must stay.
            StorageError: The line cannot be written: the answer must stay.
        """
        kind = None if contribution is None else contribution.kind
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "task": task,
            "kind": kind,
            "round": None if contribution is None else contribution.revision + (kind in TRAINING),
            "what": WHAT.get(kind or "", "why the task was not done"),
            "bytes": size,
            "sha256": digest,
            "seconds": round(self.seconds, 1),
        }
        with self._lock:
            most = self._limits.bytes
            if most is not None and self._total.bytes + size > most:
                self._total.bytes = most  # so that it leaves
                raise PolicyError(f"limits.bytes: this answer of {bytes_text(size)} would go beyond {bytes_text(most)}")
            with storing(self.path):
                self._file.write(json.dumps(line).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            self._total.add(line)

    @property
    def bytes(self) -> int:
        """Bytes of all answers so far."""
        return self._total.bytes

    @property
    def rounds(self) -> int:
        """Rounds that it trained in."""
        return len(self._total.rounds)

    @property
    def seconds(self) -> float:
        """How long it has taken part, in all sessions; of an earlier one, until its last answer."""
        return self._earlier + time.monotonic() - self._began

    def over(self, training: str | None = None) -> str:
        """Which limit is reached, as a sentence; empty if none is.

        Args:
            training: The task of training that is asked for; without one, rounds do not count.
        """
        limits, known = self._limits, self._total.rounds
        if limits.bytes is not None and self._total.bytes >= limits.bytes:
            return f"limits.bytes: its owner lets {bytes_text(limits.bytes)} leave, and no more"
        if limits.hours is not None and self.seconds >= 3600 * limits.hours:
            return f"limits.hours: its owner lets it take part for {limits.hours:g} hours"
        if training is None or training in known or limits.rounds is None or len(known) < limits.rounds:
            return ""
        return f"limits.rounds: its owner lets it train in {limits.rounds} rounds"

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def _count(raw: bytes, total: _Total) -> None:
    """Add a line; one that was cut off, or that somebody has changed, counts for nothing."""
    try:
        total.add(json.loads(raw))
    except (ValueError, TypeError, KeyError, RecursionError):
        return
