"""Ctrl-C and SIGTERM: first finish the round, then stop at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class Stopping:
    """A context in which the first signal asks the run to stop after its round, and the second interrupts it.

    Args:
        say: Told what will happen, once, at the first signal.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._requested = False

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._requested

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        self._say("stopping after this round; once more stops at once and goes back to the last checkpoint")
