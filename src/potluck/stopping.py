"""Ctrl-C and SIGTERM: first finish the round, then stop at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

RUN = "stopping after this round; once more stops at once, back at the last checkpoint"


class Stopping:
    """A context in which the first signal asks the run to stop after its round, and the second interrupts it.

    Args:
        means: What is said at the first: what it and another one mean.
    """

    def __init__(self, means: str = RUN) -> None:
        self._said, self._requested = f"\n{means}\n".encode(), False

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
        # Not through the console: the signal may have come while that was writing.
        os.write(2, self._said)
