"""Large payloads, named by the SHA-256 of their content: where they lie, and how they come and go."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from potluck.contribution import ParticipantId
from potluck.engine.nats.bulk import RING, Bulks, Waiting, patiently
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.subjects import CHUNK_BYTES, Names
from potluck.errors import Damaged
from potluck.files import storing

GiveUp = Callable[[], bool]
Lacking = Callable[[], None]
Parts = Sequence[memoryview]


class Blobs(Protocol):
    """A store of blobs: the coordinator's are for all, a participant's for the coordinator.

    ``owner`` is the participant that sends a blob, or ``None`` for one of the coordinator's.
    """

    def put(self, owner: ParticipantId | None, digest: str, parts: Parts, give_up: GiveUp) -> None:
        """Store a blob; what of it is there already need not travel again.

        Raises:
            StorageError: The store is full.
            EngineError: It could not be stored before ``give_up``.
        """

    def get(
        self,
        owner: ParticipantId | None,
        digest: str,
        size: int,
        to: Path,
        give_up: GiveUp,
        lacking: Lacking = lambda: None,
    ) -> None:
        """Fetch a blob into a file, which then has that size and hash; what an earlier try left is used.

        Args:
            lacking: Called every few seconds in which nothing came: the server may have lost it.

        Raises:
            EngineError: It is not there, is not what it should be, or did not come before ``give_up``.
        """

    def drop(self, owner: ParticipantId | None, digest: str) -> None:
        """Forget a blob that nobody needs any more; if it is being stored anew, that one stays."""

    def clear(self, owner: ParticipantId) -> None:
        """Forget what a participant sent unasked, if the store is ours to bound; nothing of it may be awaited."""

    def held(self, owner: ParticipantId | None) -> set[str]:
        """Hashes of the blobs that are there, whole or in part; only the coordinator may ask."""


class JetStreamBlobs:
    """Blobs as messages of at most 1 MiB in a stream, one subject for each chunk."""

    def __init__(self, connection: Connection, names: Names, told: Callable[[str], None] = lambda _: None) -> None:
        self._connection, self._names, self._told = connection, names, told
        self._bulks = Bulks(connection.access)
        self._last: dict[tuple[ParticipantId | None, str], int] = {}  # place in the stream of each blob's last chunk
        connection.closes.append(self._bulks.close)

    def put(self, owner: ParticipantId | None, digest: str, parts: Parts, give_up: GiveUp) -> None:
        """As `Blobs`: chunks that the server has confirmed are not sent again after a break."""
        missing = dict.fromkeys(range(chunk_count(sum(part.nbytes for part in parts))))

        def attempt() -> bool:
            with self._bulks.one(give_up) as bulk:
                waiting = ((n, chunk) for n, chunk in enumerate(chunks_of(parts)) if n in missing)
                for number in bulk.put(lambda n: self._subject(owner, f"{digest}.{n}"), waiting):
                    missing.pop(number, None)
                    if give_up():
                        return False
                self._last[owner, digest] = bulk.last
            return not missing

        patiently(attempt, give_up, self._told)

    def get(
        self,
        owner: ParticipantId | None,
        digest: str,
        size: int,
        to: Path,
        give_up: GiveUp,
        lacking: Lacking = lambda: None,
    ) -> None:
        """As `Blobs`: the file grows chunk by chunk, and is verified as it grows."""
        partial, waiting = to.with_name(to.name + ".part"), Waiting(give_up, lacking)
        with storing(to):
            to.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> bool:
            with (
                self._bulks.one(give_up) as bulk,
                _Growing(partial, digest, size) as growing,
                ThreadPoolExecutor(1, "potluck-hash") as hasher,  # hashing and writing leave the socket alone
            ):
                stream = self._names.states if owner is None else self._names.uploads(owner)
                numbers = range(growing.chunks, chunk_count(size))
                subject = lambda n: self._names.direct(stream, self._subject(owner, f"{digest}.{n}"))  # noqa: E731
                behind: deque[Future[None]] = deque()
                for number, chunk in bulk.get(subject, numbers, waiting):
                    waiting.came()
                    behind.append(hasher.submit(growing.add, number, chunk))
                    if len(behind) == RING - 1:
                        behind.popleft().result()
                    if give_up():
                        return False
                for future in behind:
                    future.result()
                growing.check()
                self._last[owner, digest] = bulk.last
            return True

        patiently(attempt, waiting, self._told)
        with storing(to):
            partial.replace(to)

    def drop(self, owner: ParticipantId | None, digest: str) -> None:
        """As `Blobs`."""
        stream = self._names.states if owner is None else self._names.uploads(owner)
        wanted: dict[str, Any] = {"filter": self._subject(owner, f"{digest}.*")}
        if last := self._last.pop((owner, digest), 0):
            wanted["seq"] = last + 1  # what has been stored anew since then stays
        self._connection.api(f"STREAM.PURGE.{stream}", wanted)

    def clear(self, owner: ParticipantId) -> None:
        """As `Blobs`: all that lies there."""
        self._connection.api(f"STREAM.PURGE.{self._names.uploads(owner)}", {}, patience=5.0)

    def held(self, owner: ParticipantId | None) -> set[str]:
        """As `Blobs`."""
        stream = self._names.states if owner is None else self._names.uploads(owner)
        found: set[str] = set()
        wanted = {"subjects_filter": self._subject(owner, ">")}
        answer = self._connection.api(f"STREAM.INFO.{stream}", wanted)
        for subject in answer["state"].get("subjects") or {}:
            found.add(subject.split(".")[-2])
        return found

    def _subject(self, owner: ParticipantId | None, rest: str) -> str:
        return self._names.state(rest) if owner is None else self._names.upload(owner, rest)


class _Growing:
    """A file that grows by chunks in order, and the hash of what it holds; it goes on where it was left."""

    def __init__(self, path: Path, digest: str, size: int) -> None:
        self._path, self._digest, self._size = path, digest, size
        self._early: dict[int, bytes] = {}
        self._hash = hashlib.sha256()
        with storing(path):
            self._file = path.open("r+b" if path.exists() else "w+b")
            self.chunks = min(os.fstat(self._file.fileno()).st_size, size) // CHUNK_BYTES
            for _ in range(self.chunks):
                self._hash.update(self._file.read(CHUNK_BYTES))
            self._file.truncate(self.chunks * CHUNK_BYTES)

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, chunk: memoryview) -> None:
        """Append a chunk, or hold it until those before it are there."""
        if number != self.chunks:
            self._early[number] = bytes(chunk)
            return
        self._append(chunk)
        while self.chunks in self._early:
            self._append(memoryview(self._early.pop(self.chunks)))

    def check(self) -> None:
        """Hold the whole file to its name.

        Raises:
            EngineError: It is another; it is removed, so that it can come again.
        """
        self._file.flush()
        if self._hash.hexdigest() != self._digest or os.fstat(self._file.fileno()).st_size != self._size:
            self._path.unlink(missing_ok=True)
            raise Damaged(f"blob {self._digest[:12]}: its content does not match its hash")

    def _append(self, chunk: memoryview) -> None:
        expected = min(CHUNK_BYTES, self._size - self.chunks * CHUNK_BYTES)
        if chunk.nbytes != expected:
            raise Damaged(f"blob {self._digest[:12]}: chunk {self.chunks} has {chunk.nbytes} bytes, not {expected}")
        with storing(self._path):
            self._file.write(chunk)
        self._hash.update(chunk)
        self.chunks += 1


def chunk_count(size: int) -> int:
    """Chunks of a blob."""
    return -(-size // CHUNK_BYTES)


def chunks_of(parts: Parts) -> Iterator[list[memoryview]]:
    """A blob's parts as chunks, each in as many pieces as it touches parts; nothing is copied."""
    chunk: list[memoryview] = []
    room = CHUNK_BYTES
    for part in parts:
        view = part.cast("B")
        while view.nbytes:
            piece, view = view[:room], view[room:]
            chunk.append(piece)
            room -= piece.nbytes
            if not room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk
