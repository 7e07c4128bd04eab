"""Blobs as objects, in a folder and on an S3 server on the loopback device."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from potluck.engine.nats.objects import PIECE_BYTES, ObjectBlobs
from potluck.engine.nats.subjects import CHUNK_BYTES, Names
from potluck.errors import EngineError, MissingExtra, RecipeError, Refused, StorageError

localbucket = pytest.importorskip("localbucket")
pytest.importorskip("obstore")

RUN = "0a1b2c"
ADA, BOB = "ada", "bob.2"
SECRET = "a-secret-of-the-test"


def never() -> bool:
    return False


def after(looks: int) -> Callable[[], bool]:
    """Gives up at the look after so many."""
    left = iter(range(looks))
    return lambda: next(left, None) is None


@dataclass
class Watch:
    """What a server was asked, and what it shall answer instead of what it would."""

    asked: list[tuple[str, str, str]] = field(default_factory=list)
    instead: Callable[[str, str], tuple[HTTPStatus, str] | None] = lambda method, path: None

    def ranges(self) -> list[tuple[int, int]]:
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", span) for method, _, span in self.asked if method == "GET"]
        return sorted((int(span[1]), int(span[2])) for span in found if span)

    def of(self, method: str, part: str = "") -> int:
        return sum(method == asked and part in path for asked, path, _ in self.asked)


class Handler(localbucket.S3Handler):  # type: ignore[misc, name-defined]
    watch: Watch

    def _dispatch(self, action: Any) -> None:
        self.watch.asked.append((self.command, self.path, self.headers.get("Range", "")))
        answer = self.watch.instead(self.command, self.path)
        if answer is None:
            super()._dispatch(action)
        elif answer[0] == HTTPStatus.SERVICE_UNAVAILABLE:
            self.close_connection = True  # without a word
        else:
            self.close_connection = True
            self._send_error(localbucket.S3Error(answer[0], answer[1], f"no, {SECRET}"))

    def _post_request(self, bucket: str, key: str) -> None:
        if "delete" not in self.query:
            super()._post_request(bucket, key)
            return
        names = re.findall(r"<Key>(.*?)</Key>", self._read_body().decode())
        for name in names:
            self._object_path(bucket, name).unlink(missing_ok=True)
        deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
        self._send_xml(ElementTree.fromstring(f"<DeleteResult>{deleted}</DeleteResult>"))


@dataclass
class Store:
    """A store: where it is, and the folder in which its objects lie as files."""

    url: str
    folder: Path
    watch: Watch

    def blobs(self, told: Callable[[str], None] = lambda _: None) -> ObjectBlobs:
        return ObjectBlobs(self.url, Names(RUN), told)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    root = tmp_path / "served"
    (root / "bucket").mkdir(parents=True)
    watch = Watch()
    handler = type("Watched", (Handler,), {"data_root": root, "watch": watch})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    settings = {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield Store("s3://bucket/some/prefix", root / "bucket" / "some" / "prefix" / RUN, watch)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store", tmp_path / "store" / RUN, Watch())


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue("folder" if request.param == "file" else "s3")


def blob(size: int) -> tuple[str, list[memoryview], bytes]:
    """A blob of many parts of unlike sizes, some of them empty."""
    content = random.Random(size).randbytes(size)
    cuts = sorted([0, 0, min(size, 5), size // 3, size // 3, size // 2, size])
    parts = [memoryview(content)[low:high] for low, high in pairwise(cuts)]
    return hashlib.sha256(content).hexdigest(), parts, content


BIG = 20 * (1 << 20) + 7


def test_what_is_put_can_be_got(store: Store, tmp_path: Path) -> None:
    blobs = store.blobs()
    for size in (0, 1, 1000, PIECE_BYTES, BIG):
        digest, parts, content = blob(size)
        owners = ((None, "state"), (ADA, f"upload/{ADA}"), (BOB, f"upload/{BOB}"))
        for owner, place in owners if size < PIECE_BYTES else owners[:1]:
            to = tmp_path / "incoming" / f"{place.replace('/', '-')}-{size}"
            blobs.put(owner, digest, parts, never)
            assert (store.folder / place / digest).read_bytes() == content
            blobs.get(owner, digest, size, to, never)
            assert to.read_bytes() == content
            assert not to.with_name(to.name + ".part").exists()


def test_everybody_has_a_place_of_its_own(store: Store, tmp_path: Path) -> None:
    blobs = store.blobs()
    assert blobs.held(None) == blobs.held(ADA) == set()
    (mine, parts, _), (shared, others, _) = blob(10), blob(11)
    blobs.put(ADA, mine, parts, never)
    blobs.put(ADA, shared, others, never)
    blobs.put("ada2", shared, others, never)
    blobs.put(None, shared, others, never)
    assert (blobs.held(ADA), blobs.held("ada2"), blobs.held(None)) == ({mine, shared}, {shared}, {shared})
    blobs.drop(ADA, shared)
    blobs.drop(ADA, shared)  # twice is once
    assert (blobs.held(ADA), blobs.held("ada2"), blobs.held(None)) == ({mine}, {shared}, {shared})
    with pytest.raises(EngineError, match="gave up"):
        blobs.get(BOB, mine, 10, tmp_path / "other", after(3))


def test_what_is_there_is_not_sent_again(store: Store) -> None:
    digest, parts, _ = blob(1000)
    store.blobs().put(None, digest, parts, never)
    before = (store.folder / "state" / digest).stat()
    store.watch.asked.clear()
    store.blobs().put(None, digest, parts, never)
    assert (store.folder / "state" / digest).stat() == before
    assert {method for method, _, _ in store.watch.asked} <= {"HEAD"}


def test_an_object_of_another_size_is_replaced(store: Store) -> None:
    digest, parts, content = blob(1000)
    (store.folder / "state").mkdir(parents=True)
    (store.folder / "state" / digest).write_bytes(content[:-1])
    store.blobs().put(None, digest, parts, never)
    assert (store.folder / "state" / digest).read_bytes() == content


def test_a_transfer_goes_on_where_it_was_left(store: Store, tmp_path: Path) -> None:
    digest, parts, content = blob(BIG)
    store.blobs().put(None, digest, parts, never)
    to = tmp_path / "got"
    to.with_name("got.part").write_bytes(content[: 3 * CHUNK_BYTES + 100])
    store.blobs().get(None, digest, BIG, to, never)
    assert to.read_bytes() == content
    if store.watch.asked:
        ranges = store.watch.ranges()
        assert ranges[0][0] == 3 * CHUNK_BYTES and ranges[-1][1] == BIG - 1
        assert sum(high - low + 1 for low, high in ranges) == BIG - 3 * CHUNK_BYTES


def test_a_wrong_beginning_is_fetched_again(store: Store, tmp_path: Path) -> None:
    digest, parts, content = blob(3 * CHUNK_BYTES)
    store.blobs().put(None, digest, parts, never)
    to = tmp_path / "got"
    to.with_name("got.part").write_bytes(bytes(2 * CHUNK_BYTES))
    told: list[str] = []
    store.blobs(told.append).get(None, digest, len(content), to, never)
    assert to.read_bytes() == content
    assert len(told) == 1 and "does not match its hash" in told[0]


@pytest.mark.parametrize("change", [lambda content: bytes(len(content)), lambda content: content[:-1]])
def test_a_damaged_object_is_not_taken(store: Store, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    digest, parts, content = blob(2 * CHUNK_BYTES)
    store.blobs().put(ADA, digest, parts, never)
    (store.folder / "upload" / ADA / digest).write_bytes(change(content))
    to = tmp_path / "incoming" / "got"
    to.parent.mkdir()
    with pytest.raises(EngineError, match="does not match its hash"):
        store.blobs().get(ADA, digest, len(content), to, never)
    assert list(to.parent.iterdir()) == []


def test_a_missing_blob_is_waited_for(store: Store, tmp_path: Path) -> None:
    digest, parts, content = blob(1000)
    told: list[str] = []
    with pytest.raises(EngineError, match=r"gave up.* is not there"):
        store.blobs(told.append).get(None, digest, 1000, tmp_path / "got", after(4))
    looks = iter(range(9))

    def there_by_now() -> bool:
        if next(looks) == 2:
            store.blobs().put(None, digest, parts, never)
        return False

    elsewhere = threading.Thread(target=store.blobs().get, args=(None, digest, 1000, tmp_path / "got", there_by_now))
    elsewhere.start()
    elsewhere.join()
    assert (tmp_path / "got").read_bytes() == content
    assert told == []


def test_giving_up_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    digest, parts, _ = blob(BIG)
    with pytest.raises(EngineError, match="gave up"):
        store.blobs().put(None, digest, parts, after(10))
    with pytest.raises(EngineError, match="gave up"):
        store.blobs().put(None, digest, parts, lambda: True)
    assert store.blobs().held(None) == set()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_several_pieces_are_under_way(s3: Store, tmp_path: Path) -> None:
    digest, parts, _ = blob(BIG)
    together = threading.Barrier(3, timeout=20)

    def instead(method: str, path: str) -> None:
        if "partNumber" in path or (method == "GET" and digest in path):
            together.wait()  # passes only when three are there

    s3.watch.instead = instead
    s3.blobs().put(None, digest, parts, never)
    s3.blobs().get(None, digest, BIG, tmp_path / "got", never)
    assert (s3.watch.of("PUT", "partNumber"), len(s3.watch.ranges())) == (3, 3)


def test_broken_connections_are_made_anew(s3: Store, tmp_path: Path) -> None:
    digest, parts, content = blob(BIG)
    breaks = {("PUT", "partNumber=2"), ("GET", digest), ("HEAD", digest)}

    def instead(method: str, path: str) -> tuple[HTTPStatus, str] | None:
        for wanted in list(breaks):
            if method == wanted[0] and wanted[1] in path:
                breaks.discard(wanted)
                return HTTPStatus.SERVICE_UNAVAILABLE, ""
        return None

    s3.watch.instead = instead
    s3.blobs().put(ADA, digest, parts, never)
    s3.blobs().get(ADA, digest, BIG, tmp_path / "got", never)
    assert (tmp_path / "got").read_bytes() == content
    assert not breaks


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        (HTTPStatus.FORBIDDEN, "AccessDenied", Refused, "does not allow this"),
        (HTTPStatus.UNAUTHORIZED, "InvalidAccessKeyId", Refused, "does not allow this"),
        (HTTPStatus.FORBIDDEN, "QuotaExceeded", StorageError, "the store is full"),
        (HTTPStatus.BAD_REQUEST, "XMinioStorageFull", StorageError, "the store is full"),
    ],
)
def test_a_store_that_says_no_is_not_asked_again(
    s3: Store, status: HTTPStatus, code: str, kind: type[EngineError], says: str
) -> None:
    digest, parts, _ = blob(BIG)
    s3.watch.instead = lambda method, path: (status, code) if method in ("PUT", "POST") else None
    with pytest.raises(kind, match=says) as caught:
        s3.blobs().put(ADA, digest, parts, never)
    assert code in str(caught.value) and "\n" not in str(caught.value)
    assert "s3://bucket/some/prefix" in str(caught.value)
    assert SECRET not in str(caught.value) and "somebody" not in str(caught.value)


def test_who_may_only_write_can_put(s3: Store) -> None:
    digest, parts, content = blob(1000)
    s3.watch.instead = lambda method, path: (HTTPStatus.FORBIDDEN, "AccessDenied") if method == "HEAD" else None
    s3.blobs().put(ADA, digest, parts, never)
    assert (s3.folder / "upload" / ADA / digest).read_bytes() == content


def test_a_bucket_that_is_not_there(s3: Store) -> None:
    digest, parts, _ = blob(10)
    with pytest.raises(StorageError, match="no such bucket"):
        ObjectBlobs("s3://other/x", Names(RUN)).put(None, digest, parts, never)


def test_a_folder_that_may_not_be_written() -> None:
    with pytest.raises(EngineError, match=r"file:///proc/potluck.* cannot be used as a store"):
        ObjectBlobs("file:///proc/potluck", Names(RUN))


@pytest.mark.parametrize("url", ["nowhere://bucket", "http://host/x", "just text", "s3://", "file://relative/x"])
def test_what_is_no_store(url: str, s3: Store) -> None:
    with pytest.raises(EngineError, match="cannot be used as a store"):
        ObjectBlobs(url, Names(RUN))


@pytest.mark.parametrize("url", [f"s3://me:{SECRET}@bucket/x", f"https://host/x?sig={SECRET}"])
def test_a_url_holds_no_credentials(url: str) -> None:
    with pytest.raises(RecipeError, match="holds credentials") as caught:
        ObjectBlobs(url, Names(RUN))
    assert SECRET not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "az://account/x"])
def test_credentials_are_sought_in_the_environment_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(EngineError, match="no credentials in the environment") as caught:
        ObjectBlobs(url, Names(RUN))
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def test_plain_http_must_be_wanted(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(EngineError, match="AWS_ALLOW_HTTP"):
        s3.blobs().held(None)
    assert s3.watch.asked == []


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(MissingExtra) as caught:
        ObjectBlobs("s3://bucket/x", Names(RUN))
    assert "potluck[store]" in caught.value.hint
