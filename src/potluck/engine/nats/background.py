"""Background threads whose exceptions are reported."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Background:
    """Threads that do what they are given; an exception in one goes to ``threading.excepthook``, as of any thread.

    Args:
        count: Of threads.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "potluck-helper")

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Do something soon."""
        self._pool.submit(_reporting, work, *arguments)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _reporting(work: Callable[..., object], *arguments: Any) -> None:
    try:
        work(*arguments)
    except Exception:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
