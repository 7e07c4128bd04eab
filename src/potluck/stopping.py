"""Ctrl-C and SIGTERM: first finish the round, then stop at once. A thread that fails ends the run, too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from potluck.errors import Interrupted

RUN = "stopping after this round; once more stops at once, back at the last checkpoint"


class Stopping:
    """A context in which the first signal asks the run to stop after its round, and the second interrupts it.

    An exception that leaves a thread within is raised in the main thread: a run must not go on without its listener.

    Args:
        means: What is said at the first: what it and another one mean.
    """

    def __init__(self, means: str = RUN) -> None:
        self._said, self._requested = f"\n{means}\n".encode(), False
        self._failure: BaseException | None = None

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._requested

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._raise_failure)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
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

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """In the thread that failed: wake the main thread, whatever it waits for."""
        self._hook(failed)
        if self._failure is None:
            self._failure = failed.exc_value or failed.exc_type()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def _raise_failure(self, number: int, frame: FrameType | None) -> None:
        if self._failure is not None:
            raise RuntimeError("a thread of this process failed; a run cannot go on without it") from self._failure


@contextmanager
def resumable(hint: str, means: str = RUN, at_once: str = "back at the last checkpoint") -> Iterator[Stopping]:
    """Where Ctrl-C and SIGTERM end in how to go on.

    Args:
        means: What is said at the first signal.
        at_once: What the second one meant.
    """
    try:
        with Stopping(means) as stopping:
            yield stopping
    except Interrupted as stop:
        raise Interrupted(str(stop), hint) from None
    except KeyboardInterrupt:
        raise Interrupted(f"at once: {at_once}", hint) from None
