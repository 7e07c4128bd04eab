"""Ctrl-C and SIGTERM: first finish the round, then stop at once. A thread that dies ends the run, too."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

RUN = "stopping after this round; once more stops at once, back at the last checkpoint"


class Stopping:
    """A context in which the first signal asks the run to stop after its round, and the second interrupts it.

    An exception that leaves a thread within is raised in the main thread: a run must not go on without its listener.

    Args:
        means: What is said at the first: what it and another one mean.
    """

    def __init__(self, means: str = RUN) -> None:
        self._said, self._requested = f"\n{means}\n".encode(), False
        self._died: BaseException | None = None

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._requested

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._bury)
        self._hook, threading.excepthook = threading.excepthook, self._mourn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        # Not through the console: the signal may have come while that was writing.
        os.write(2, self._said)

    def _mourn(self, death: threading.ExceptHookArgs) -> None:
        """In the thread that died: wake the main thread, whatever it waits for."""
        self._hook(death)
        if self._died is None:
            self._died = death.exc_value or death.exc_type()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def _bury(self, number: int, frame: FrameType | None) -> None:
        if self._died is not None:
            raise RuntimeError("a thread of this process died; a run cannot go on without it") from self._died
