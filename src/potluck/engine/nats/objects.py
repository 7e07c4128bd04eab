"""Blobs as objects of a store that is named by a URL: S3 and what speaks like it, Google, Azure, or a folder."""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from potluck.contribution import ParticipantId
from potluck.engine.nats.blobs import GiveUp, Lacking, Parts, _Growing, chunks_of
from potluck.engine.nats.bulk import Waiting, patiently
from potluck.engine.nats.subjects import CHUNK_BYTES, Names
from potluck.errors import Damaged, EngineError, Missing, MissingExtra, PotluckError, RecipeError, Refused, StorageError
from potluck.files import storing

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PIECE_BYTES = 8 * CHUNK_BYTES
IN_FLIGHT = 4
REQUEST_SECONDS = 300.0  # for a whole piece, with IN_FLIGHT of them on a slow line
RETRY_SECONDS = 20.0
LOOK_SECONDS = 0.2  # between two looks at whether to give up
ABORT_SECONDS = 2.0

_ENVIRONMENTS = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}
_CREDENTIAL = re.compile(
    r"AWS_(ACCESS_KEY_ID|WEB_IDENTITY_TOKEN_FILE|CONTAINER_CREDENTIALS_\w+_URI|SKIP_SIGNATURE)"
    r"|GOOGLE_(SERVICE_ACCOUNT(_PATH|_KEY)?|APPLICATION_CREDENTIALS|SKIP_SIGNATURE)"
    r"|AZURE_(STORAGE_\w*(KEY|TOKEN)|\w+_SECRET|FEDERATED_TOKEN_FILE|SKIP_SIGNATURE)"
)
_CONNECTION_SETTINGS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate")
_FULL = re.compile(r"os error (28|122)\b|status code: 507|QuotaExceeded|StorageFull|InsufficientStorage")
_CREDENTIALS = "credentials come from the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_T = TypeVar("_T")


class ObjectBlobs:
    """Blobs as objects ``RUN/state/HASH`` and ``RUN/upload/PARTICIPANT/HASH`` below a URL.

    Credentials are read from the environment, never from the URL, which all participants are told.

    Raises:
        MissingExtra: obstore is not installed.
        RecipeError: The URL holds credentials.
        EngineError: There can be no such store.
    """

    def __init__(self, url: str, names: Names, told: Callable[[str], None] = lambda _: None) -> None:
        self._place = _without_credentials(url)
        self._store = _store(url, self._place)
        self._names, self._told = names, told

    def put(self, owner: ParticipantId | None, digest: str, parts: Parts, give_up: GiveUp) -> None:
        """As `Blobs`: in pieces, several in flight; an object of that hash and size is left as it is."""
        key, size = self._key(owner, digest), sum(part.nbytes for part in parts)

        async def pieces() -> AsyncIterator[memoryview]:
            for chunk in chunks_of(parts):
                if give_up():
                    raise _GaveUp  # the pieces that are there are taken back
                for piece in chunk:
                    yield piece

        async def attempt() -> None:
            with suppress(Refused):  # S3 refuses to tell whether it is there to those who may not list
                if await self._size(key, give_up) == size:
                    return
            try:
                sending = self._store.put_async(key, pieces(), chunk_size=PIECE_BYTES, max_concurrency=IN_FLIGHT)
                with _plainly(self._place):
                    await _unless(give_up, sending, ABORT_SECONDS)
            except FileNotFoundError:
                raise StorageError(f"{self._place}: there is no such bucket or folder") from None

        self._patiently(attempt, give_up)

    def get(
        self,
        owner: ParticipantId | None,
        digest: str,
        size: int,
        to: Path,
        give_up: GiveUp,
        lacking: Lacking = lambda: None,
    ) -> None:
        """As `Blobs`: in pieces, several in flight; the file grows in order, and is verified as it grows."""
        key, partial = self._key(owner, digest), to.with_name(to.name + ".part")
        waiting = Waiting(give_up, lacking)
        with storing(to):
            to.parent.mkdir(parents=True, exist_ok=True)

        async def attempt() -> None:
            found = await self._size(key, give_up)
            if found is None:
                raise Missing(f"{self._place}: blob {digest[:12]} is not there")
            if found != size:
                partial.unlink(missing_ok=True)
                raise Damaged(f"blob {digest[:12]}: its content does not match its hash ({found} bytes, not {size})")
            with _Growing(partial, digest, size) as growing:
                resumed = growing.chunks > 0
                await self._fetch(key, growing, size, waiting)
                try:
                    growing.check()
                except Damaged as error:  # what was left of an earlier try may be to blame: once more without it
                    raise EngineError(str(error)) if resumed else error from None

        self._patiently(attempt, waiting)
        with storing(to):
            partial.replace(to)

    def drop(self, owner: ParticipantId | None, digest: str) -> None:
        """As `Blobs`."""

        async def attempt() -> None:
            try:
                with _plainly(self._place):
                    await self._store.delete_async(self._key(owner, digest))
            except FileNotFoundError:
                pass

        asyncio.run(attempt())

    def clear(self, owner: ParticipantId) -> None:
        """As `Blobs`: nothing, since who may write there, and how much, is set there."""

    def held(self, owner: ParticipantId | None) -> set[str]:
        """As `Blobs`."""

        async def attempt() -> set[str]:
            with _plainly(self._place):
                listed = await self._store.list(self._key(owner, "").rstrip("/")).collect_async()
            names = {str(found["path"]).rpartition("/")[2] for found in listed}
            return {name for name in names if re.fullmatch("[0-9a-f]{64}", name)}

        return asyncio.run(attempt())

    def _key(self, owner: ParticipantId | None, digest: str) -> str:
        return f"{self._names.run}/" + (f"state/{digest}" if owner is None else f"upload/{owner}/{digest}")

    async def _size(self, key: str, give_up: GiveUp) -> int | None:
        """Bytes of an object; ``None`` if there is none."""
        try:
            with _plainly(self._place):
                return int((await _unless(give_up, self._store.head_async(key)))["size"])
        except FileNotFoundError:
            return None

    async def _fetch(self, key: str, growing: _Growing, size: int, waiting: Waiting) -> None:
        """Let a file grow to its size by ranges of an object."""
        starts = iter(range(growing.chunks * CHUNK_BYTES, size, PIECE_BYTES))
        flying: deque[asyncio.Future[memoryview]] = deque()

        async def piece(start: int) -> memoryview:
            end = min(start + PIECE_BYTES, size)
            return memoryview(await self._store.get_range_async(key, start=start, end=end))

        try:
            while True:
                while len(flying) < IN_FLIGHT and (start := next(starts, None)) is not None:
                    flying.append(asyncio.ensure_future(piece(start)))
                if not flying:
                    return
                with _plainly(self._place):
                    received = await _unless(waiting, flying[0])
                waiting.came()
                flying.popleft()
                for low in range(0, received.nbytes, CHUNK_BYTES):
                    growing.add(growing.chunks, received[low : low + CHUNK_BYTES])
        except FileNotFoundError:
            raise Missing(f"{self._place}: {key.rpartition('/')[2][:12]} is not there any more") from None
        finally:
            for future in flying:
                future.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    def _patiently(self, attempt: Callable[[], Coroutine[None, None, None]], give_up: GiveUp) -> None:
        """As `patiently`, but what will not get better is raised at once."""
        final: list[PotluckError] = []

        def once() -> bool:
            try:
                asyncio.run(attempt())
            except _GaveUp:
                return False
            except Refused as error:
                final.append(error)
            return True

        patiently(once, give_up, self._told)
        if final:
            raise final[0]


class _GaveUp(Exception):
    """``give_up`` said so."""


async def _unless(give_up: GiveUp, awaited: Awaitable[_T], grace: float = 0.0) -> _T:
    """What is awaited, unless ``give_up`` says so first; it may then end by itself, for so many seconds."""
    future = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait({future}, timeout=LOOK_SECONDS))[0]:
            if give_up():
                await asyncio.wait({future}, timeout=grace)
                raise _GaveUp
        return future.result()
    finally:
        future.cancel()
        await asyncio.gather(future, return_exceptions=True)


def _store(url: str, place: str) -> ObjectStore:
    """The store of a URL; of its answers nothing is known yet.

    Raises:
        MissingExtra: obstore is not installed.
        EngineError: The URL is of no kind that is known, or the environment holds no credentials for it.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise MissingExtra(f"{place}: needs the library `obstore`", "pip install 'potluck[store]'") from None
    scheme = urlsplit(url).scheme
    try:
        if scheme == "file":
            return from_url(url, mkdir=True)
        if scheme not in _ENVIRONMENTS:
            raise ValueError("no such kind of store")
        own = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENTS[scheme] + "_")}
        if not any(
            value and _CREDENTIAL.fullmatch(name) for name, value in own.items()
        ):  # else this machine's are sought
            raise ValueError("no credentials in the environment")
        retries = {"max_retries": 5, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
        return from_url(  # type: ignore[call-overload, no-any-return]
            url, client_options=_connection_options(_ENVIRONMENTS[scheme]), retry_config=retries
        )
    except (BaseError, ValueError, OSError) as error:
        hint = "name one such as s3://bucket/prefix, gs://bucket/prefix or file:///folder; " + _CREDENTIALS
        raise EngineError(f"{place}: cannot be used as a store ({_said(error)})", hint) from None


def _connection_options(environment: str) -> dict[str, str]:
    """How long a request may take, and what the environment says of connections: that would be forgotten otherwise."""
    found = {name: os.environ.get(f"{environment}_{name.upper()}", "") for name in _CONNECTION_SETTINGS}
    return {"timeout": f"{REQUEST_SECONDS:.0f}s"} | {name: value for name, value in found.items() if value}


def _without_credentials(url: str) -> str:
    """The URL as it may be shown.

    Raises:
        RecipeError: It holds credentials.
    """
    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.password is not None or parts.query:
        raise RecipeError(f"engine.blobs {place}: holds credentials, which all participants would see", _CREDENTIALS)
    return place


@contextmanager
def _plainly(place: str) -> Iterator[None]:
    """Say in one sentence what a store answered; `FileNotFoundError` stays what it is."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError, ValueError) as error:
        said = _said(error)
        if _FULL.search(str(error)):
            raise StorageError(f"{place}: the store is full ({said})", "free some space there") from None
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        if refused or re.search(r"os error (1|13|30)\b", str(error)):
            raise Refused(f"{place}: the store does not allow this ({said})", _CREDENTIALS) from None
        raise EngineError(f"{place}: {said}") from None


def _said(error: Exception) -> str:
    """The gist of an error: no addresses and no bodies of answers, which may hold parts of credentials."""
    text = str(error)
    status = re.search(r"status code: (\d{3}[A-Za-z -]*)", text)
    if status:
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        return status[1].strip() + (f", {code[1]}" if code else "")
    line = text.partition("\n")[0].rpartition(" - ")[2]
    if "builder error" in line:
        return "the address cannot be used; one of plain http needs AWS_ALLOW_HTTP=true"
    return re.sub(r"\S*(://|[?=])\S*", "...", line).strip()[:200] or type(error).__name__
