"""The event log: the truth of a run, one JSON object a line.

``docs/reference/events.md`` describes every kind. Two runs of one recipe write the same events but for
the keys ``time`` and ``seconds``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potluck.errors import CheckpointError
from potluck.files import storing
from potluck.untrusted import loads

SCHEMA = 1
TIMING_KEYS = ("time", "seconds")
MAX_LINE_BYTES = 1 << 24

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Append-only ``events.jsonl`` that also tells its listeners.

    Args:
        path: The file; it continues at ``position``, and what lies behind is cut off.
        position: Bytes of the log that belong to the state the run continues from.

    Raises:
        CheckpointError: The log is shorter than that.
        StorageError: The disk is full or cannot be written.
    """

    def __init__(self, path: Path, position: int = 0, listeners: tuple[Listener, ...] = ()) -> None:
        self._listeners = listeners
        with storing(path):
            self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
            if self._file.tell() < position:
                raise CheckpointError(f"{path}: shorter than the {position} bytes the checkpoint goes with")
            self._file.truncate(position)

    def write(self, event: str, /, **fields: Any) -> None:
        """Append one event and pass it on.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        entry: Event = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"
        with storing(self._file.name):
            self._file.write(line.encode())
            self._file.flush()
        for listener in self._listeners:
            listener(entry)

    def sync(self) -> int:
        """Force the log to disk.

        Returns:
            Its length in bytes.
        """
        with storing(self._file.name):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path, end: int | None = None) -> Iterator[Event]:
    """The events of a log, up to byte ``end``; a last line cut off by a crash is left out.

    Raises:
        CheckpointError: The log cannot be read, or a line before the last is not an event.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: the event log cannot be read ({error.strerror})") from None
    with file:
        position = 0
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.endswith(b"\n") or (end is not None and position > end):
                return
            try:
                entry = loads(line, most_bytes=MAX_LINE_BYTES)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or "event" not in entry:
                raise CheckpointError(f"{path}: line {number} is not an event")
            yield entry


def without_timing(event: Event) -> Event:
    """An event without the keys that differ between two runs of one recipe."""
    return {key: value for key, value in event.items() if key not in TIMING_KEYS}
