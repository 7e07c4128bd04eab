"""Addresses as people write them: with or without scheme and port, IPv6 with or without brackets."""

from __future__ import annotations

from ipaddress import IPv6Address

PORT = 4222


def split_address(text: str, port: int = PORT) -> tuple[str, int]:
    """Host and port of ``HOST``, ``HOST:PORT``, ``ADDRESS``, ``[ADDRESS]`` or ``[ADDRESS]:PORT``.

    Args:
        port: If the text names none; what is an IPv6 address without brackets as a whole, names none.

    Raises:
        ValueError: It is none of them.
    """
    if _is_ipv6(text):
        return text, port
    host, colon, number = text.rpartition(":")
    if (text.startswith("[") and text.endswith("]")) or not colon:
        host, number = text, str(port)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    named = bool(bare) and not set(bare) & set(" /@[]") and (":" not in bare or _is_ipv6(bare))
    if not named or not (number.isascii() and number.isdigit() and len(number) < 6 and 0 < int(number) < 65536):
        raise ValueError(f"{text}: write HOST:PORT; an IPv6 address with a port as [ADDRESS]:PORT")
    return bare, int(number)


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, as in URLs and in a server's configuration."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_url(text: str, scheme: str, port: int = PORT) -> str:
    """``SCHEME://HOST:PORT`` of an address that may name each of them.

    Raises:
        ValueError: It is no address, or its scheme is neither ``tls`` nor ``nats``.
    """
    named, slashes, rest = text.rpartition("://")
    if slashes and named not in ("tls", "nats"):
        raise ValueError(f"{text}: write tls://HOST:PORT")
    return f"{named or scheme}://{join_address(*split_address(rest.rstrip('/'), port))}"


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True
