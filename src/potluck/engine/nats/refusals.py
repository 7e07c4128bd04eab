"""What was refused: counted, and told of at the first, the tenth, the hundredth time, so that a flood fills no log."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from potluck.errors import PotluckError

SERVER = "the server"
Told = Callable[[str, str, int], None]


class Refusals:
    """Counts by whose it seemed to be and what was wrong.

    Args:
        told: Told whose, why, and how often that was by now; called by whoever adds.
    """

    def __init__(self, told: Told) -> None:
        self._told, self._lock = told, threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, who: str, why: str) -> None:
        """Count one; reasons are the same if they are up to their first colon, which no sender can choose."""
        with self._lock:
            self._counts[who, why.partition(":")[0]] += 1
            count = self._counts[who, why.partition(":")[0]]
        if str(count).strip("0") == "1":
            self._told(who, why, count)


def refusal(error: Exception) -> str:
    """Why a message was refused whose reader raised this: in potluck's words, or that it could not be read."""
    return str(error) if isinstance(error, PotluckError) else f"garbage: it cannot be read ({type(error).__name__})"
