"""Where a library lies: a folder, or an object store named by a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from potluck.errors import MissingExtra, RecipeError, StorageError
from potluck.files import storing

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ENVIRONMENTS = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}
_CREDENTIALS = "credentials come from the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_CREDENTIAL = re.compile(
    r"AWS_(ACCESS_KEY_ID|WEB_IDENTITY_TOKEN_FILE|CONTAINER_CREDENTIALS_\w+_URI|SKIP_SIGNATURE)"
    r"|GOOGLE_(SERVICE_ACCOUNT(_PATH|_KEY)?|APPLICATION_CREDENTIALS|SKIP_SIGNATURE)"
    r"|AZURE_(STORAGE_\w*(KEY|TOKEN)|\w+_SECRET|FEDERATED_TOKEN_FILE|SKIP_SIGNATURE)"
)
_CONNECTION_SETTINGS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate")
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=20)}
_REQUEST_SECONDS = 300  # for a whole file
_MAX_LISTED = 1_000_000


class Storage(Protocol):
    """Named contents, each there in full or not at all.

    Attributes:
        place: What people call it; shows no credentials.
    """

    place: str

    def read(self, name: str, most: int) -> bytes | None:
        """A content of at most so many bytes; ``None`` if there is none.

        Raises:
            StorageError: It is larger, or the place cannot be read.
        """

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        """Keep a content; if it must be ``new``, whether it was.

        Raises:
            StorageError: The place is full or cannot be written.
        """

    def remove(self, name: str) -> None:
        """Forget a content, which may be gone already.

        Raises:
            StorageError: The place cannot be written.
        """

    def listed(self, folder: str) -> dict[str, str]:
        """Everything below a folder, with a stamp that changes when the content does.

        Raises:
            StorageError: The place cannot be read.
        """


def storage_at(place: str) -> Storage:
    """A folder, or a store such as ``s3://bucket/prefix``, ``gs://…`` or ``az://…``.

    Raises:
        MissingExtra: obstore is not installed.
        StorageError: There can be no such store.
        RecipeError: The URL holds credentials.
    """
    return Objects(place) if "://" in place else Files(Path(place))


class Files:
    """A `Storage` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.place, self.folder = str(folder), folder

    def read(self, name: str, most: int) -> bytes | None:
        """As `Storage`."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # it takes as much at once
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
        return _bounded(str(path), content, most)

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        """As `Storage`; a new one is linked to its name, which only one of several processes can do."""
        path = self.folder / name
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if not new:
                    partial.replace(path)
                    return True
                os.link(partial, path)
                return True
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """As `Storage`; folders that it leaves empty go, too."""
        path = self.folder / name
        with storing(path):
            path.unlink(missing_ok=True)
        for parent in path.relative_to(self.folder).parents:
            try:
                (self.folder / parent).rmdir()
            except OSError:  # not empty, or gone already
                break

    def listed(self, folder: str) -> dict[str, str]:
        """As `Storage`."""
        found = {}
        try:
            for path in (self.folder / folder).rglob("*"):
                if path.is_file() and not path.name.endswith(".partial"):
                    about = path.stat()
                    found[path.relative_to(self.folder).as_posix()] = f"{about.st_mtime_ns}-{about.st_size}"
        except FileNotFoundError:  # removed while we looked
            return self.listed(folder)
        except OSError as error:
            raise StorageError(f"{self.place}: cannot be read ({error.strerror})") from None
        return found


class Objects:
    """A `Storage` in an object store; credentials are read from the environment, never from the URL.

    Raises:
        MissingExtra: obstore is not installed.
        StorageError: There can be no such store.
        RecipeError: The URL holds credentials.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if "@" in parts.netloc or parts.query:
            raise RecipeError(f"{self.place}: the URL holds credentials, which others may see", _CREDENTIALS)
        self._store = _opened(url, self.place)

    def read(self, name: str, most: int) -> bytes | None:
        """As `Storage`."""
        try:
            with self._plainly():
                found = self._store.get(name)
                if found.meta["size"] > most:
                    raise StorageError(f"{self.place}/{name}: {found.meta['size']} bytes, at most {most} are expected")
                return _bounded(f"{self.place}/{name}", bytes(found.bytes()), most)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        """As `Storage`."""
        from obstore.exceptions import AlreadyExistsError

        try:
            with self._plainly():
                # A condition goes with the whole content only, not with one that is sent in parts.
                self._store.put(
                    name, content, mode="create" if new else "overwrite", use_multipart=False if new else None
                )
        except AlreadyExistsError:
            return False
        except FileNotFoundError:
            raise StorageError(f"{self.place}: there is no such bucket") from None
        return True

    def remove(self, name: str) -> None:
        """As `Storage`."""
        try:
            with self._plainly():
                self._store.delete(name)
        except FileNotFoundError:
            pass

    def listed(self, folder: str) -> dict[str, str]:
        """As `Storage`."""
        found: dict[str, str] = {}
        try:
            with self._plainly():
                for batch in self._store.list(folder):
                    found |= {str(one["path"]): f"{one['e_tag']}-{one['size']}" for one in batch}
                    if len(found) > _MAX_LISTED:
                        raise StorageError(f"{self.place}: holds more than {_MAX_LISTED} objects")
        except FileNotFoundError:
            raise StorageError(f"{self.place}: there is no such bucket") from None
        return found

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Say in one sentence what the store answered, without the bodies of answers, which may hold secrets."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (FileNotFoundError, AlreadyExistsError):
            raise
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise StorageError(f"{self.place}: the store does not allow this ({_said(error)})", _CREDENTIALS) from None
        except (BaseError, OSError) as error:
            raise StorageError(f"{self.place}: {_said(error)}") from None


def _opened(url: str, place: str) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise MissingExtra(f"{place}: needs the library `obstore`", "pip install 'potluck[store]'") from None
    scheme = urlsplit(url).scheme
    try:
        if scheme not in _ENVIRONMENTS:
            raise ValueError("no such kind of store")
        prefix = _ENVIRONMENTS[scheme] + "_"
        own = {name for name, value in os.environ.items() if value and name.startswith(prefix)}
        if not any(map(_CREDENTIAL.fullmatch, own)):  # else this machine's are sought, for long
            raise ValueError("no credentials in the environment")
        # What the environment says of connections is forgotten unless it is handed on.
        said = {name: os.environ.get(prefix + name.upper(), "") for name in _CONNECTION_SETTINGS}
        options = {"timeout": f"{_REQUEST_SECONDS}s"} | {name: value for name, value in said.items() if value}
        return from_url(url, client_options=options, retry_config=_RETRIES)  # type: ignore[call-overload, no-any-return]
    except (BaseError, ValueError, OSError) as error:
        hint = "name a folder, or one such as s3://bucket/prefix, gs://bucket/prefix or az://account/x; " + _CREDENTIALS
        raise StorageError(f"{place}: cannot be used as a store ({_said(error)})", hint) from None


def _said(error: Exception) -> str:
    """The gist of an error: no addresses and no bodies of answers."""
    text = str(error)
    status = re.search(r"status code: (\d{3}[A-Za-z -]*)", text)
    if status:
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        return status[1].strip() + (f", {code[1]}" if code else "")
    line = text.partition("\n")[0].rpartition(" - ")[2]
    if "builder error" in line:
        return "the address cannot be used; one of plain http needs AWS_ALLOW_HTTP=true"
    return re.sub(r"\S*(://|[?=])\S*", "...", line).strip()[:200] or type(error).__name__


def _bounded(name: str, content: bytes, most: int) -> bytes:
    if len(content) > most:
        raise StorageError(f"{name}: larger than the {most} bytes that are expected at most")
    return content
