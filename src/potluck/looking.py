"""Looking at a run from outside: who is there, and what keeps somebody from joining."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.text import Text

from potluck.engine.nats.about import participants_of
from potluck.engine.nats.bulk import Bulk
from potluck.engine.nats.connection import Access, Connection, access_of
from potluck.engine.nats.host_keys import WATCHER
from potluck.engine.nats.identity import Invite, load_invite, own_invite, tls_context
from potluck.engine.nats.presence import Members
from potluck.engine.nats.signs import read_progress
from potluck.engine.nats.subjects import CHUNK_BYTES, COORDINATOR, Names
from potluck.errors import EngineError, InviteError, PotluckError, Refused
from potluck.terminal import results

Found = dict[str, Any]
_BANDWIDTH_CHUNKS = 8
_SILENCE_SECONDS = 30.0
_CLOCK_SECONDS = 60.0
_DISK_BYTES = 1 << 30


def server_status(path: Path) -> Found:
    """How far a hosted run is, and who is there, as its message server says.

    Args:
        path: The watcher's invite.

    Raises:
        InviteError: It is not the watcher's.
        EngineError: The server cannot be reached.
    """
    invite = load_invite(path)
    if invite.participant != WATCHER:
        raise InviteError(f"{path}: is {invite.participant}'s; only the watcher's may look", "ask for watcher.toml")
    names = Names(invite.run)
    with closing(Connection(access_of(invite))) as connection:
        connection.open(5.0)
        found = connection.last(names.direct(f"KV_{names.members}", names.member(COORDINATOR)))
        progress = _progress(found[0]) if found is not None else {}
        about = connection.last(names.direct(names.states, names.about))
        participants = participants_of(about[0], invite.coordinator) if about is not None else []
        members = Members(connection, names, participants, silence=_SILENCE_SECONDS)
        members.look()
        return {
            "run": invite.run,
            "recipe": invite.recipe,
            "coordinator": progress,
            "participants": {name: members.facts(name) for name in participants},
        }


def examine_access(invite_path: Path, key: Path | None, folder: Path) -> Found:
    """Try everything that joining needs, one after the other, until something stands in the way.

    Raises:
        InviteError: The invite or the key cannot be used.
    """
    invite = own_invite(invite_path, key)
    access, names = access_of(invite), Names(invite.run)
    findings: list[dict[str, Any]] = []

    def test(what: str, trial: Callable[[], str]) -> bool:
        try:
            findings.append({"test": what, "ok": True, "found": trial(), "hint": ""})
        except (PotluckError, OSError) as error:
            hint = getattr(error, "hint", "")
            findings.append({"test": what, "ok": False, "found": str(error), "hint": hint})
        return bool(findings[-1]["ok"])

    test("disk", lambda: _disk(folder))
    if test("reachability", lambda: _reach(invite)) and test("TLS", lambda: _tls(invite)):
        with closing(Connection(access)) as connection:
            if test("key", lambda: _key(connection)):
                test("permissions", lambda: _permissions(connection, names, invite.participant))
                test("clock", lambda: _clock(connection, names, invite.participant))
                test("bandwidth", lambda: _bandwidth(access, names, invite.participant))
    return {"ok": all(finding["ok"] for finding in findings), "findings": findings}


def show_findings(found: Found) -> None:
    """What the doctor found, one line each."""
    console = results()
    for finding in found["findings"]:
        mark = ("ok  ", "green") if finding["ok"] else ("NOT ", "red")
        console.print(Text.assemble(mark, f" {finding['test']}: {finding['found']}"))
        if finding["hint"]:
            console.print(f"     {finding['hint']}", style="dim")


def _progress(data: bytes) -> dict[str, Any]:
    try:
        return read_progress(data)
    except ValueError:
        return {}


def _disk(folder: Path) -> str:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < _DISK_BYTES:
        raise EngineError(f"{free / 1e9:.1f} GB free at {place}", "make room: state and shared weights are kept there")
    return f"{free / 1e9:.0f} GB free at {place}"


def _reach(invite: Invite) -> str:
    import socket

    for url in invite.urls:
        address = urlsplit(url)
        began = time.monotonic()
        try:
            with socket.create_connection((address.hostname or "", address.port or 4222), 5.0):
                return f"{url} answers in {1e3 * (time.monotonic() - began):.0f} ms"
        except OSError as error:
            hint = "is the address right, and is outgoing TCP to this port allowed by your firewall?"
            problem = EngineError(f"{url}: {error}", hint)
    raise problem


def _tls(invite: Invite) -> str:
    import socket
    import ssl

    if not invite.secure:
        return "none: on this machine only"
    address = urlsplit(invite.urls[0])
    try:
        with (
            socket.create_connection((address.hostname or "", address.port or 4222), 5.0) as plain,
            tls_context(invite.certificate).wrap_socket(plain, server_hostname=address.hostname) as secure,
        ):
            return f"{secure.version()}, the certificate is the one of the invite"
    except ssl.SSLError as error:
        hint = "the server shows another certificate: is it the right server? A new invite may be needed"
        raise EngineError(f"{address.hostname}: {error.reason or error}", hint) from None


def _key(connection: Connection) -> str:
    connection.open(5.0)
    return f"accepted, {1e3 * connection.ping():.1f} ms to the server and back"


def _permissions(connection: Connection, names: Names, name: str) -> str:
    connection.last(names.direct(names.states, names.about), patience=5.0)
    try:
        connection.store(names.member(COORDINATOR), b"{}", patience=3.0)
    except Refused:
        return "may read what the run is about, and is refused what is not its own"
    except EngineError as error:
        raise EngineError(f"whether it is refused what is not its own could not be told: {error}") from None
    raise EngineError(
        f"{name} may write what is the coordinator's", "the server's users are not those of `potluck host`"
    )


def _clock(connection: Connection, names: Names, name: str) -> str:
    """When the server says that it stored something just now."""
    subject = names.upload(name, f"{'0' * 64}.0")
    connection.store(subject, b"now", patience=5.0)
    found = connection.last(names.direct(names.uploads(name), subject), patience=5.0)
    if found is None:
        raise EngineError("what was stored a moment ago is not there")
    stamp = datetime.fromisoformat(f"{found[1]['Nats-Time-Stamp'][:19]}+00:00")
    ahead = (datetime.now(UTC) - stamp).total_seconds()
    if abs(ahead) > _CLOCK_SECONDS:
        raise EngineError(f"{ahead:.0f} s ahead of the server", "set the clock: certificates and logs depend on it")
    return f"within {abs(ahead) + 1:.0f} s of the server's"


def _bandwidth(access: Access, names: Names, name: str) -> str:
    chunk = memoryview(bytes(CHUNK_BYTES))
    chunks = ((number, [chunk]) for number in range(_BANDWIDTH_CHUNKS))
    began = time.monotonic()
    with Bulk(access) as bulk:
        stored = sum(1 for _ in bulk.put(lambda n: names.upload(name, f"{'0' * 64}.{n}"), chunks))
    return f"{8e-6 * stored * CHUNK_BYTES / (time.monotonic() - began):.0f} Mbit/s up"
