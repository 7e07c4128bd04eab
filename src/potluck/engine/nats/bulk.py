"""Chunks of large blobs to and from a stream, many in flight, over a socket of its own.

`nats-py` moves large messages at a third of this speed for three times the processor time: each passes several buffers
in Python. What follows is only as much of the protocol as chunks need: CONNECT, PUB, SUB, MSG and HMSG.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from potluck.engine.nats.answers import sequence_in
from potluck.engine.nats.connection import CONNECT_SECONDS, Access
from potluck.engine.nats.identity import public_key, sign, tls_context
from potluck.errors import Damaged, EngineError, Missing
from potluck.untrusted import loads

PUTS_IN_FLIGHT = 8
GETS_IN_FLIGHT = 6  # each is a MiB of the server's memory
IDLE_SECONDS = 15.0  # the server drops whoever does not answer its pings
RING = 4
STALL_SECONDS = 20.0
LACKING_SECONDS = 5.0
LOOK_SECONDS = 0.5
_BUFFER = 1 << 16


class Bulk:
    """A blocking connection for chunks.

    Raises:
        EngineError: The server cannot be reached.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._inbox = f"{access.inbox}.{secrets.token_hex(8)}"  # other threads' answers are not ours
        self.flying = 0  # requests without their answer
        self.last = 0  # the highest place in the stream of a chunk that went or came
        self._buffer, self._low, self._high = memoryview(bytearray(_BUFFER)), 0, 0
        problem = "no address"
        for url in access.urls:
            try:
                self._socket = self._dial(url)
                return
            except (OSError, ssl.SSLError, EOFError, ValueError, TypeError, KeyError) as error:
                problem = f"{url}: {error}"
        raise EngineError(f"cannot be reached ({problem})")

    def __enter__(self) -> Bulk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def interrupt(self) -> None:
        """End what another thread waits for: it sees the connection broken."""
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(self._socket.fileno())) as twin:
            twin.shutdown(socket.SHUT_RDWR)

    def put(self, subject: Callable[[int], str], chunks: Iterator[tuple[int, list[memoryview]]]) -> Iterator[int]:
        """Store chunks, each under the subject of its number.

        Yields:
            The numbers of those that the server has, as it says so.

        Raises:
            StorageError: The server's store is full.
            EngineError, OSError: The connection broke.
        """
        for number, parts in chunks:
            size = sum(part.nbytes for part in parts)
            head = f"PUB {subject(number)} {self._inbox}.{number} {size}\r\n".encode()
            self._socket.sendall(head)
            for part in parts:
                self._socket.sendall(part)
            self._socket.sendall(b"\r\n")
            self.flying += 1
            if self.flying == PUTS_IN_FLIGHT:
                self.flying -= 1
                yield self._stored()
        for _ in range(self.flying):
            self.flying -= 1
            yield self._stored()

    def get(
        self, direct: Callable[[int], str], numbers: Sequence[int], give_up: Callable[[], bool]
    ) -> Iterator[tuple[int, memoryview]]:
        """Fetch chunks by number, in any order; one that is not there yet is waited for: its sender may be at it.

        Yields:
            Number and content; a chunk's memory holds until `RING` more have come.

        Raises:
            Missing: A chunk did not come before ``give_up``.
            EngineError, OSError: The connection broke.
        """
        ring = [memoryview(bytearray(0))] * RING
        todo, got, pause = deque(numbers), 0, 0.0
        while todo or self.flying:
            while todo and self.flying < (1 if pause else GETS_IN_FLIGHT):
                number = todo.popleft()
                self._socket.sendall(f"PUB {direct(number)} {self._inbox}.{number} 0\r\n\r\n".encode())
                self.flying += 1
            number, headers, size = self._message()
            if len(ring[got % RING]) < size + 2:
                ring[got % RING] = memoryview(bytearray(size + 2))
            body = ring[got % RING]
            self._exactly(body[: size + 2])
            self.flying -= 1
            if size and b"NATS/1.0 4" not in headers and b"NATS/1.0 5" not in headers:
                got, pause = got + 1, 0.0
                self.last = max(self.last, int(headers.partition(b"Nats-Sequence: ")[2].partition(b"\r")[0] or 0))
                yield number, body[:size]
                continue
            todo.appendleft(number)
            if not self.flying:
                if give_up():
                    raise Missing(f"chunk {number} is not there")
                pause = min(2 * pause, 0.25) or 0.005
                time.sleep(pause)

    def _stored(self) -> int:
        number, headers, size = self._message()
        body = memoryview(bytearray(size + 2))
        self._exactly(body)
        if b"NATS/1.0 503" in headers:
            raise EngineError("the server has no such stream now")
        self.last = max(self.last, sequence_in(body[:size], f"chunk {number}"))
        return number

    def _message(self) -> tuple[int, bytes, int]:
        """The next message's number, headers, and the size of what follows."""
        while True:
            line = self._line()
            words = line.split()
            if words[0] == b"MSG":
                return int(words[1].rpartition(b".")[2]), b"", int(words[-1])
            if words[0] == b"HMSG":
                headers = bytearray(int(words[-2]))
                self._exactly(memoryview(headers))
                return int(words[1].rpartition(b".")[2]), bytes(headers), int(words[-1]) - len(headers)
            if words[0] == b"PING":
                self._socket.sendall(b"PONG\r\n")
            elif words[0] == b"-ERR":
                raise EngineError(line.decode(errors="replace"))

    def _dial(self, url: str) -> socket.socket:
        address = urlsplit(url)
        plain = socket.create_connection((address.hostname or "", address.port or 4222), CONNECT_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.settimeout(STALL_SECONDS)
        if self._access.secure:
            self._socket = tls_context(self._access.certificate).wrap_socket(plain, server_hostname=address.hostname)
        else:
            self._socket = plain
        about = loads(self._line().removeprefix(b"INFO "))
        signature = (
            base64.urlsafe_b64encode(sign(self._access.seed, str(about["nonce"]).encode())).rstrip(b"=").decode()
        )
        hello: dict[str, Any] = {
            "verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1,
            "lang": "potluck", "version": "1", "name": f"{self._access.name} chunks",
            "nkey": public_key(self._access.seed), "sig": signature,
        }  # fmt: skip
        self._socket.sendall(f"CONNECT {json.dumps(hello)}\r\nSUB {self._inbox}.* 1\r\nPING\r\n".encode())
        while (line := self._line()) != b"PONG":
            if line.startswith(b"-ERR"):
                raise ValueError(line.decode(errors="replace"))
        return self._socket

    def _line(self) -> bytes:
        while True:
            text = bytes(self._buffer[self._low : self._high])
            end = text.find(b"\r\n")
            if end >= 0:
                self._low += end + 2
                return text[:end]
            self._fill()

    def _fill(self) -> None:
        if self._low:
            rest = bytes(self._buffer[self._low : self._high])
            self._buffer[: len(rest)] = rest
            self._low, self._high = 0, len(rest)
        if self._high == len(self._buffer):
            raise EngineError("the server sent a line without end")
        got = self._socket.recv_into(self._buffer[self._high :])
        if not got:
            raise EOFError("the server closed the connection")
        self._high += got

    def _exactly(self, target: memoryview) -> None:
        have = min(len(target), self._high - self._low)
        target[:have] = self._buffer[self._low : self._low + have]
        self._low += have
        while have < len(target):
            got = self._socket.recv_into(target[have:])
            if not got:
                raise EOFError("the server closed the connection")
            have += got


class Bulks:
    """Connections for chunks that are kept for a while: making one takes four journeys.

    Args:
        access: Whose they are.
    """

    def __init__(self, access: Access) -> None:
        self._access, self._lock = access, threading.Lock()
        self._idle: list[tuple[Bulk, float]] = []

    @contextmanager
    def one(self, give_up: Callable[[], bool]) -> Iterator[Bulk]:
        """A connection for one transfer; it is kept if the transfer came to its end, and broken if that is given up."""
        with self._lock:
            bulk, since = self._idle.pop() if self._idle else (None, 0.0)
        if bulk is not None and time.monotonic() - since > IDLE_SECONDS:
            bulk.close()
            bulk = None
        bulk = bulk or Bulk(self._access)
        try:
            with _interrupted(bulk, give_up):
                yield bulk
        except BaseException:
            bulk.close()
            raise
        if bulk.flying or give_up():
            bulk.close()
            return
        with self._lock:
            self._idle.append((bulk, time.monotonic()))

    def close(self) -> None:
        """Close those that are kept."""
        with self._lock:
            for bulk, _ in self._idle:
                bulk.close()
            self._idle.clear()


@contextmanager
def _interrupted(bulk: Bulk, give_up: Callable[[], bool]) -> Iterator[None]:
    """Break a connection soon after ``give_up`` says so, however long the socket would wait."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if give_up():
                bulk.interrupt()
                return

    watcher = threading.Thread(target=look, name="potluck-give-up", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # it must not break what comes next on this connection


class Waiting:
    """Whether to give up, and what is done about it while nothing comes.

    Args:
        lacking: Called after every `LACKING_SECONDS` in which nothing came.
    """

    def __init__(self, give_up: Callable[[], bool], lacking: Callable[[], None]) -> None:
        self._give_up, self._lacking, self._since = give_up, lacking, time.monotonic()

    def came(self) -> None:
        """Note that something came."""
        self._since = time.monotonic()

    def __call__(self) -> bool:
        """Whether to give up."""
        if time.monotonic() - self._since > LACKING_SECONDS:
            self._lacking()
            self.came()
        return self._give_up()


def patiently(attempt: Callable[[], bool], give_up: Callable[[], bool], told: Callable[[str], None]) -> None:
    """Try until ``attempt`` says it is done; a broken connection is made anew, from where the last one came to.

    Raises:
        Damaged: What came is not what was announced.
        EngineError: ``give_up`` said so, with what went wrong last.
    """
    problem, said = "there was no time", ""
    while not give_up():
        try:
            if attempt():
                return
        except Damaged:
            raise
        except (EngineError, OSError, EOFError) as error:
            problem = str(error) or type(error).__name__
            if not isinstance(error, Missing) and problem != said:
                told(f"a transfer broke: {problem}; going on")
                said = problem
            time.sleep(0.2)
    raise EngineError(f"gave up: {problem}")
