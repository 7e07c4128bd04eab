"""One user's connection to the server, through `nats-py` in a thread of its own, and what goes wrong with it.

It stays while the server is away: calls wait for its return as long as they are allowed to.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from potluck.engine.nats.answers import answer_in, sequence_in
from potluck.engine.nats.identity import Invite, tls_context
from potluck.engine.nats.subjects import Names
from potluck.errors import EngineError, Refused, StorageError

logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in record.getMessage())  # nats-py with TLS
PING_SECONDS = 5
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0
WORKING_SECONDS = 3.0
T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """How a user reaches the server.

    Attributes:
        urls: ``tls://`` or, on loopback only, ``nats://``.
        certificate: The one the server must show, PEM; empty to trust the system's authorities.
        seed: The user's key.
        inbox: Prefix of the subjects on which answers come.
        name: Shown in the server's log.
    """

    urls: tuple[str, ...]
    certificate: str
    seed: str
    inbox: str
    name: str

    @property
    def secure(self) -> bool:
        """Whether it is encrypted."""
        return all(url.startswith("tls://") for url in self.urls)


def access_of(invite: Invite) -> Access:
    """How whoever is invited reaches the server."""
    inbox = Names(invite.run).inbox(invite.participant)
    return Access(invite.urls, invite.certificate, invite.seed, inbox, invite.participant)


@dataclass(frozen=True)
class Delivery:
    """A message of a work queue; it comes again until it is acknowledged."""

    connection: Connection
    subject: str
    data: bytes
    receipt: str

    def done(self) -> None:
        """Acknowledge it."""
        self.connection.tell(self.receipt, b"+ACK")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep it from coming again while it is worked on."""
        over = threading.Event()

        def remind() -> None:
            while not over.wait(WORKING_SECONDS):
                self.connection.tell(self.receipt, b"+WPI")

        reminder = threading.Thread(target=remind, name="potluck-working", daemon=True)
        reminder.start()
        try:
            yield
        finally:
            over.set()


class Connection:
    """A connection that outlives its sockets.

    Args:
        access: Whose it is.
        told: Told when it is lost, back or refused something, in words for a log; called in another thread.

    Attributes:
        closes: What else ends with it.
    """

    def __init__(self, access: Access, told: Callable[[str], None] = lambda _: None) -> None:
        self.access, self._told = access, told
        self._violations: list[str] = []
        self._closed = False
        self.closes: list[Callable[[], None]] = []
        self._nats: Nats | None = None
        self._inboxes: dict[str, tuple[Nats, Subscription]] = {}
        self._loop = asyncio.new_event_loop()
        self._connecting = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="potluck-nats", daemon=True)
        self._thread.start()

    def open(self, patience: float) -> None:
        """Connect, trying for so many seconds.

        Raises:
            Refused: The server does not know the key.
            EngineError: It cannot be reached, or shows another certificate.
        """
        until = time.monotonic() + patience
        while True:
            try:
                self._run(self._connect(), CONNECT_SECONDS + 2)
                return
            except (EngineError, TimeoutError) as error:
                problem = error if isinstance(error, EngineError) else EngineError("no answer")
            if isinstance(problem, Refused) or time.monotonic() > until:
                raise type(problem)(f"{', '.join(self.access.urls)}: {problem}", _HINTS[type(problem)]) from None
            time.sleep(0.2)

    @property
    def away(self) -> bool:
        """Whether the server is known to be away."""
        return self._nats is None or not self._nats.is_connected

    def close(self) -> None:
        """Leave, and end the thread."""
        if self._closed:
            return
        self._closed = True
        for also in self.closes:
            also()
        future = asyncio.run_coroutine_threadsafe(self._leave(), self._loop)
        try:
            future.result(5)
        except TimeoutError:
            self._told("the connection could not be closed in order")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()

    def store(
        self,
        subject: str,
        data: bytes,
        patience: float = 60.0,
        after: int | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> int:
        """Put a message into a stream, and wait until the server has it.

        Args:
            after: Only if the subject's last message has this sequence number; 0 if it has none.
            give_up: Whether to wait no longer.

        Returns:
            Its number in the stream.

        Raises:
            Outrun: It has another.
            StorageError: The stream or the server's disk stayed full.
            Refused: This key may not.
            EngineError: The server did not take it in time.
        """
        until, said = time.monotonic() + patience, False
        once = {"Nats-Msg-Id": secrets.token_hex(12)}  # however often it is sent, it is stored once
        if after is not None:
            once["Nats-Expected-Last-Subject-Sequence"] = str(after)
        while True:
            try:
                message = self._request(subject, data, until - time.monotonic(), once, give_up)
                return sequence_in(message.data, f"storing {subject}")
            except StorageError:
                if time.monotonic() > until or give_up():
                    raise
                if not said:
                    self._told("the server's store is full; trying again")
                said = True
                time.sleep(1.0)

    def api(self, verb: str, body: Any = None, patience: float = 30.0) -> dict[str, Any]:
        """Ask JetStream to do something, such as ``STREAM.INFO.name``.

        Raises:
            EngineError: It does not; the message says why.
        """
        data = b"" if body is None else json.dumps(body).encode()
        return answer_in(self._request(f"$JS.API.{verb}", data, patience).data, verb)

    def last(
        self, direct: str, patience: float = 30.0, give_up: Callable[[], bool] = lambda: False
    ) -> tuple[bytes, dict[str, str]] | None:
        """The last message of a subject, with its headers; ``None`` if there is none.

        Args:
            direct: From ``Names.direct``.
        """
        message = self._request(direct, b"", patience, give_up=give_up)
        headers = dict(message.headers or {})
        return None if headers.get("Status") else (message.data, headers)

    def take(self, asked: str, wait: float) -> Delivery | None:
        """The next message of a consumer; ``None`` if none comes within ``wait`` seconds, or the server is away.

        Args:
            asked: From ``Names.next``.
        """
        body = json.dumps({"batch": 1, "expires": int(wait * 1e9)}).encode()
        try:
            message = self._run(self._pull(asked, body, wait + 2), wait + 3)
        except (EngineError, TimeoutError, nats.errors.Error, OSError):
            time.sleep(0.1)  # the server is away
            return None
        if status := (message.headers or {}).get("Status"):
            if status not in ("404", "408"):
                time.sleep(0.1)
            return None
        return Delivery(self, message.subject, message.data, message.reply)

    def tell(self, subject: str, data: bytes) -> None:
        """Publish without waiting; lost if the server is away."""

        async def publish() -> None:
            if self._nats is not None and self._nats.is_connected:
                await self._nats.publish(subject, data)

        if not self._closed:
            with suppress(EngineError):
                self._begin(publish())

    def ping(self) -> float:
        """Seconds to the server and back.

        Raises:
            EngineError: It is away.
        """
        began = time.monotonic()
        if self._nats is None:
            raise EngineError("not connected")
        try:
            self._run(self._nats.flush(int(ANSWER_SECONDS)), ANSWER_SECONDS + 1)
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise EngineError(f"the server does not answer ({str(error) or type(error).__name__})") from None
        return time.monotonic() - began

    def _request(
        self,
        subject: str,
        data: bytes,
        patience: float,
        headers: dict[str, str] | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Msg:
        """Ask, again and again while the server is away."""
        until = time.monotonic() + patience
        while not self._closed:
            seen = len(self._violations)
            wait = max(0.05, min(ANSWER_SECONDS, until - time.monotonic()))
            try:
                return self._run(self._ask(subject, data, wait, headers), wait + 1)
            except Refused:
                raise
            except (EngineError, TimeoutError, nats.errors.Error, OSError) as error:
                problem = str(error) or type(error).__name__
            if refusal := next((v for v in self._violations[seen:] if f'"{subject}"'.lower() in v.lower()), ""):
                raise Refused(refusal, _HINTS[Refused])
            if time.monotonic() >= until or give_up():
                raise EngineError(
                    f"{', '.join(self.access.urls)}: {subject}: no answer ({problem})", _HINTS[EngineError]
                )
            time.sleep(0.1)
        raise EngineError("the connection is closed")

    async def _ask(self, subject: str, data: bytes, wait: float, headers: dict[str, str] | None) -> Msg:
        return await (await self._there()).request(subject, data, timeout=wait, headers=headers)

    async def _pull(self, asked: str, body: bytes, wait: float) -> Msg:
        """Ask a consumer; what it delivers keeps its own subject, and so needs an inbox of its own."""
        connection = await self._there()
        if (inbox := self._inboxes.get(asked)) is None or inbox[0] is not connection:
            inbox = (connection, await connection.subscribe(connection.new_inbox()))
            self._inboxes[asked] = inbox
        await connection.publish(asked, body, reply=inbox[1].subject)
        return await inbox[1].next_msg(timeout=wait)

    async def _there(self) -> Nats:
        async with self._connecting:
            if self._nats is None or self._nats.is_closed:
                await self._connect()
        assert self._nats is not None
        return self._nats

    async def _connect(self) -> None:
        """Try each address once; nats-py alone would go on for minutes where nobody listens."""
        connection = Nats()
        failed: list[Exception] = []

        async def on_error(error: Exception) -> None:
            await self._on_error(error)
            failed.append(error)
            if self._nats is not connection and len(failed) >= len(self.access.urls):
                raise error

        try:
            await connection.connect(
                list(self.access.urls),
                name=self.access.name,
                nkeys_seed_str=self.access.seed,
                tls=tls_context(self.access.certificate) if self.access.secure else None,
                tls_handshake_first=self.access.secure,
                inbox_prefix=self.access.inbox,
                connect_timeout=int(CONNECT_SECONDS),
                ping_interval=PING_SECONDS,
                max_outstanding_pings=3,
                allow_reconnect=False,  # a closed one is replaced when it is next needed
                error_cb=on_error,
                disconnected_cb=self._on_lost,
            )
        except Exception as error:  # whatever sockets, TLS and the library raise
            error = failed[-1] if failed else error
            problem = str(error) or type(error).__name__
            if "authorization" in problem.lower():
                raise Refused("the server does not know this key") from None
            raise EngineError(f"cannot be reached ({problem.partition(chr(10))[0]})") from None
        if self._nats is not None:
            self._told("connected again")
        self._nats = connection

    async def _leave(self) -> None:
        if self._nats is not None and not self._nats.is_closed:
            await self._nats.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        future = self._begin(work)
        try:
            return future.result(timeout)
        except (asyncio.CancelledError, concurrent.futures.CancelledError):
            raise EngineError("the connection is closed") from None
        except TimeoutError:
            future.cancel()
            raise

    def _begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Let the loop do something; it may be closed at any time by another thread."""
        try:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            pass
        work.close()
        raise EngineError("the connection is closed")

    async def _on_error(self, error: Exception) -> None:
        text = str(error)
        if "permissions violation" in text.lower():
            self._violations.append(text.replace("nats: ", ""))
            self._told(text)

    async def _on_lost(self) -> None:
        if not self._closed:
            self._told("the server is away")


_HINTS: dict[type[EngineError], str] = {
    EngineError: "is the server running, and its port open from here? `potluck doctor` looks closer",
    Refused: "ask the coordinator for an invite, or look whether it is of this run",
}
