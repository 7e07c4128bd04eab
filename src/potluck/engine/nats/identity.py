"""Who is who: NKeys, signatures, the server's certificate, and the invite that a participant gets.

A seed is a secret: it is written to files of mode 0600, and appears in no log, event or message.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nacl.exceptions
import nacl.signing
import nkeys
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from potluck.engine.nats.addresses import server_url
from potluck.errors import InviteError
from potluck.files import storing
from potluck.untrusted import load_toml

SIGNATURE_BYTES = 64
_MAX_INVITE_BYTES = 64 << 10
CERTIFICATE_DAYS = 3650
_NAME, _RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"), re.compile(r"[0-9a-f]{12}")


def new_seed() -> str:
    """The seed of a new key."""
    return str(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())


def public_key(seed: str) -> str:
    """The public key that belongs to a seed; it begins with U.

    Raises:
        InviteError: It is no seed.
    """
    return str(_pair(seed).public_key.decode())


def sign(seed: str, data: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes."""
    return bytes(_pair(seed).sign(data))


def signed_by(public: str, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of ``data`` by the holder of ``public``."""
    try:
        nacl.signing.VerifyKey(_raw(public)).verify(data, signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError):
        return False
    return True


def is_public_key(text: str) -> bool:
    """Whether a text is the public key of a user."""
    try:
        return text.startswith("U") and len(_raw(text)) == 32
    except (ValueError, TypeError):
        return False


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_or_make_seed(path: Path) -> str:
    """The seed in a file, which is made if there is none.

    Raises:
        InviteError: The file holds something else.
        StorageError: It cannot be written.
    """
    if not path.exists():
        write_secret(path, new_seed() + "\n")
    try:
        seed = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InviteError(f"{path}: the key cannot be read ({error})") from None
    try:
        public_key(seed)
    except InviteError:
        raise InviteError(f"{path}: not a key; delete it to have a new one made") from None
    return seed


def make_certificate(folder: Path, hosts: Sequence[str]) -> str:
    """A self-signed certificate for a server, ``certificate.pem`` and ``certificate.key``, kept if they are there.

    Participants trust this one certificate and no authority.

    Returns:
        The certificate, PEM.
    """
    certificate, key = folder / "certificate.pem", folder / "certificate.key"
    if not (certificate.exists() and key.exists()):
        secret = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "potluck")])
        now = datetime.now(UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(secret.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))  # clocks differ
            .not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(secret, hashes.SHA256())
        )
        form = serialization.PrivateFormat.PKCS8
        private = secret.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        write_secret(key, private.decode())
        write_secret(certificate, built.public_bytes(serialization.Encoding.PEM).decode())
    return certificate.read_text(encoding="ascii")


def fingerprint(certificate: str) -> str:
    """SHA-256 of a certificate in PEM.

    Raises:
        InviteError: It is none.
    """
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    except ValueError:
        raise InviteError("the invite's certificate cannot be read") from None


@dataclass(frozen=True, kw_only=True)
class Invite:
    """What a participant needs to join a run.

    Attributes:
        run, recipe: The run's identity on the server, and the recipe's name.
        participant: Who is invited.
        urls: Where the server is.
        certificate, fingerprint: The one certificate that the server may show, PEM, and its SHA-256; empty for a
            server whose certificate an authority of the system vouches for, or without TLS.
        coordinator: The coordinator's public key: tasks are signed with it.
        seed: The participant's key; empty if it has made its own ...
        public: ... of which this is the public half, as the coordinator was told.
    """

    run: str
    recipe: str
    participant: str
    urls: tuple[str, ...]
    coordinator: str
    certificate: str = ""
    fingerprint: str = ""
    seed: str = ""
    public: str = ""

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return all(url.startswith("tls://") for url in self.urls)


def save_invite(invite: Invite, path: Path) -> None:
    """Write an invite, readable by its owner only."""
    write_secret(path, tomli_w.dumps({**asdict(invite), "urls": list(invite.urls)}, multiline_strings=True))


def load_invite(path: Path) -> Invite:
    """Read an invite.

    Raises:
        InviteError: It cannot be read, is not one, or its certificate is not the one it names.
    """
    try:
        facts = load_toml(path, most_bytes=_MAX_INVITE_BYTES)
        _check_invite(path, facts)
        invite = Invite(**{**facts, "urls": tuple(facts["urls"])})
        texts = [v for k, v in asdict(invite).items() if k != "urls"] + list(invite.urls)
    except FileNotFoundError:
        raise InviteError(f"{path}: there is no such invite", "the coordinator's host wrote one for you") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InviteError(f"{path}: not an invite ({error})") from None
    if not all(isinstance(text, str) for text in texts) or not is_public_key(invite.coordinator) or not invite.urls:
        raise InviteError(f"{path}: not an invite: it is damaged")
    try:
        for url in invite.urls:
            server_url(url, "tls")
    except ValueError as error:
        raise InviteError(f"{path}: not an invite: {error}") from None
    if not (_NAME.fullmatch(invite.participant) and _NAME.fullmatch(invite.recipe) and _RUN.fullmatch(invite.run)):
        raise InviteError(f"{path}: not an invite: its names are none")
    if invite.certificate and fingerprint(invite.certificate) != invite.fingerprint:
        raise InviteError(f"{path}: its certificate is not the one it names", "ask the coordinator for a new invite")
    return invite


def _check_invite(path: Path, facts: Mapping[str, object]) -> None:
    """Say what another file is, and what an invite lacks."""
    marks = {"version": "a recipe", "participants": "a recipe", "extends": "a recipe", "source": "a participant's part"}
    if other := next((what for key, what in marks.items() if key in facts), ""):
        hint = "`potluck host RECIPE` writes an invite for each participant: RUN/host/invites/NAME.toml"
        raise InviteError(f"{path}: it is {other}, not an invite", hint)
    lacks = {field.name for field in fields(Invite) if field.default is MISSING} - facts.keys()
    if lacks:
        raise InviteError(f"{path}: not an invite: it has no {', '.join(sorted(lacks))}")


def own_invite(path: Path, key: Path | None) -> Invite:
    """An invite with the participant's key in it: its own, or that of a file.

    Raises:
        InviteError: It holds no key and none is named, it holds one already, or the key is somebody else's.
    """
    invite = load_invite(path)
    if key is None:
        if not invite.seed:
            raise InviteError(f"{path}: holds no key", "name the file that `potluck join --make-key` wrote: --key FILE")
        return invite
    if invite.seed:
        raise InviteError(f"{path}: holds a key already", "leave out --key")
    if not key.exists():
        raise InviteError(f"{key}: there is no such key", "`potluck join --make-key FILE` wrote it")
    seed = read_or_make_seed(key)
    if invite.public not in ("", public_key(seed)):
        raise InviteError(
            f"{key}: not the key of {invite.participant} that the coordinator was given",
            f"name that one; or have this one put in its place: `potluck host ... --key {invite.participant}="
            f"{public_key(seed)}`",
        )
    return replace(invite, seed=seed)


def tls_context(certificate: str) -> ssl.SSLContext:
    """Trust in one certificate, or in the system's authorities if it is empty.

    A certificate that is itself the trust needs no name: what counts is who holds its key.
    """
    if not certificate:
        return ssl.create_default_context()
    context = ssl.create_default_context(cadata=certificate)
    context.check_hostname = False
    return context


def _pair(seed: str) -> nkeys.KeyPair:
    try:
        return nkeys.from_seed(bytearray(seed.encode()))
    except Exception:  # the library raises many kinds, and none may show the seed
        raise InviteError("not a key: a seed begins with SU and has 58 characters") from None


def _raw(public: str) -> bytes:
    """The 32 bytes of a public key: base32 of a prefix, the key and a checksum."""
    decoded = base64.b32decode(public + "=" * (-len(public) % 8))
    return decoded[1:-2]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
