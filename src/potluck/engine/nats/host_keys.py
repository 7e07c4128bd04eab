"""What a host keeps of a run beside its records: keys, invites, certificate, the server's folder.

::

    host/  run.json          the run's identity on the server, everybody's public key
           coordinator.key   0600
           invites/NAME.toml 0600, one for each participant, and one for a watcher who may only look
           server/           configuration, certificate, log and store of the message server
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from potluck.engine.nats.addresses import server_url
from potluck.engine.nats.connection import Access
from potluck.engine.nats.identity import (
    Invite,
    fingerprint,
    is_public_key,
    load_invite,
    make_certificate,
    new_seed,
    public_key,
    read_or_make_seed,
    save_invite,
    write_secret,
)
from potluck.engine.nats.server import LOOPBACK, ServerSettings
from potluck.engine.nats.subjects import COORDINATOR, Names, Permissions, permissions_of
from potluck.errors import EngineError, InviteError
from potluck.untrusted import checked, load_json

WATCHER = "watcher"
CERTIFICATE = "certificate"
_SPARE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the server is.

    Attributes:
        host, port: Where it listens, if it is ours.
        advertised: Hosts by which participants reach it.
        secure: With TLS.
        url: Of a server that is not ours; then ``certificate`` may pin what it shows.
    """

    host: str = "127.0.0.1"
    port: int = 4222
    advertised: tuple[str, ...] = ()
    secure: bool = True
    url: str = ""
    certificate: Path | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """What participants dial."""
        scheme = "tls" if self.secure else "nats"
        if self.url:
            return (server_url(self.url, scheme),)
        hosts = self.advertised or (self.host if self.host not in ("0.0.0.0", "::") else "127.0.0.1",)
        return tuple(server_url(host, scheme, self.port) for host in hosts)


@dataclass(frozen=True)
class Premises:
    """The keys of a run, and how its people reach the server.

    Attributes:
        keys: Public keys by role: the participants, ``coordinator``, ``watcher``.
    """

    folder: Path
    names: Names
    participants: tuple[str, ...]
    keys: Mapping[str, str]
    seed: str
    place: Place
    certificate: str

    @property
    def invites(self) -> dict[str, Path]:
        """Invite files by participant."""
        return {name: self.folder / "invites" / f"{name}.toml" for name in self.participants}

    @property
    def users(self) -> dict[str, Permissions]:
        """Everybody's permissions by public key."""
        return {key: permissions_of(self.names, role, self.participants) for role, key in self.keys.items()}

    def access(self) -> Access:
        """The coordinator's way to the server; to one of ours it goes straight, not by what participants dial."""
        place = self.place
        if not place.url:
            host = "127.0.0.1" if place.host in ("0.0.0.0", "::") else place.host
            place = replace(place, host=host, advertised=())
        return Access(place.urls, self.certificate, self.seed, self.names.inbox(COORDINATOR), COORDINATOR)

    def server_settings(self, storage: int) -> ServerSettings:
        """What our server's configuration says."""
        return ServerSettings(
            host=self.place.host,
            port=self.place.port,
            folder=self.folder / "server",
            users=self.users,
            secure=self.place.secure,
            storage=storage + _SPARE_BYTES,
        )


def open_premises(
    folder: Path,
    recipe: str,
    participants: Sequence[str],
    place: Place,
    own_keys: Mapping[str, str],
    rotate: Sequence[str] = (),
) -> Premises:
    """Make a run's keys and invites, or load those it has.

    Args:
        folder: ``host`` in the run folder.
        recipe: The recipe's name, for the invites.
        own_keys: Public keys of participants who have made their own: their invites hold no key.
        rotate: Roles whose keys are made anew, and ``certificate``.

    Raises:
        InviteError: A key is none, or a role is not known.
        StorageError: The folder cannot be written.
    """
    roles = (*participants, WATCHER, COORDINATOR)
    for role in (*own_keys, *(set(rotate) - {CERTIFICATE})):
        if role not in roles:
            raise InviteError(f"nobody is called {role!r}", f"there are {', '.join(roles)}, and {CERTIFICATE}")
    wrong = next((name for name, key in own_keys.items() if not is_public_key(key)), None)
    if wrong is not None:
        raise InviteError(f"the key of {wrong} is not a public key", "`potluck join --make-key FILE` prints one")
    if not place.url and not place.secure and place.host not in LOOPBACK:
        raise EngineError(f"{place.host}: without TLS a server listens on loopback only")
    _forget(folder, rotate)
    seed = read_or_make_seed(folder / "coordinator.key")
    names = Names(_run_of(folder))
    certificate = _certificate(folder, place)
    keys = {COORDINATOR: public_key(seed)}
    for role in (*participants, WATCHER):
        path = folder / "invites" / f"{role}.toml"
        kept = load_invite(path).seed if path.exists() else ""
        own = own_keys.get(role, _own_key(folder, role))
        invite = Invite(
            run=names.run,
            recipe=recipe,
            participant=role,
            urls=place.urls,
            coordinator=keys[COORDINATOR],
            certificate=certificate,
            fingerprint=fingerprint(certificate) if certificate else "",
            seed="" if own else kept or new_seed(),
            public=own,
        )
        save_invite(invite, path)
        keys[role] = own or public_key(invite.seed)
    write_secret(folder / "run.json", json.dumps({"run": names.run, "keys": keys}, indent=1))
    return Premises(folder, names, tuple(participants), keys, seed, place, certificate)


def _forget(folder: Path, rotate: Sequence[str]) -> None:
    for role in rotate:
        if role == CERTIFICATE:
            for name in ("certificate.pem", "certificate.key"):
                (folder / "server" / name).unlink(missing_ok=True)
        elif role == COORDINATOR:
            (folder / "coordinator.key").unlink(missing_ok=True)
        else:
            (folder / "invites" / f"{role}.toml").unlink(missing_ok=True)


class _Known(BaseModel):
    run: str
    keys: dict[str, str]


def _known(folder: Path) -> _Known | None:
    """The run's identity and keys, as they were kept.

    Raises:
        InviteError: They are damaged.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        return checked(_Known, load_json(path))
    except (OSError, ValueError) as error:
        hint = "restore it; or delete it: then everybody needs a new invite"
        raise InviteError(f"{path}: damaged ({error})", hint) from None


def _run_of(folder: Path) -> str:
    known = _known(folder)
    return secrets.token_hex(6) if known is None else known.run


def _own_key(folder: Path, role: str) -> str:
    """The public key that a participant gave in an earlier session, if its invite holds no seed."""
    path = folder / "invites" / f"{role}.toml"
    if not path.exists() or load_invite(path).seed:
        return ""
    known = _known(folder)
    return "" if known is None else known.keys.get(role, "")


def _certificate(folder: Path, place: Place) -> str:
    if place.url:
        return place.certificate.read_text(encoding="ascii") if place.certificate is not None else ""
    if not place.secure:
        return ""
    hosts = {urlsplit(url).hostname or "" for url in place.urls} | {"127.0.0.1", "localhost"}
    return make_certificate(folder / "server", sorted(hosts))
