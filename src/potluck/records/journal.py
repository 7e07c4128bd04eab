"""What a long-lived process says: to a person on a console, and as JSON lines in a file. Secrets are never among it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potluck.files import storing

Say = Callable[[str], None]


class Journal:
    """Says things once on the console and once in a file.

    Args:
        path: JSON lines, appended.
        say: The console.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self._say, self._lock = say, threading.Lock()
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def __call__(self, text: str, **facts: Any) -> None:
        """Say something, with facts for machines; callable from any thread."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": text, **facts}
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps(entry, default=str) + "\n")
                self._file.flush()
            self._say(text)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()
