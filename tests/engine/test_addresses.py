"""Addresses as people write them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from potluck.engine.nats.addresses import server_url, split_address

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("run.example.org", "tls://run.example.org:4222"),
        ("run.example.org:443", "tls://run.example.org:443"),
        ("tls://10.0.0.1:4222/", "tls://10.0.0.1:4222"),
        ("2001:db8::1", "tls://[2001:db8::1]:4222"),
        ("[2001:db8::1]", "tls://[2001:db8::1]:4222"),
        ("nats://[::1]:7", "nats://[::1]:7"),
        ("tls://::1", "tls://[::1]:4222"),
    ],
)
def test_what_is_left_out_is_added(text: str, url: str) -> None:
    assert server_url(text, "tls") == url == server_url(url, "nats")


@pytest.mark.parametrize(
    "text", ["", ":4222", "host:", "host:0", "host:65536", "host:٣", "a:b:1", "[::1", "u@h:1", "x/y"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(text)


def test_a_run_over_ipv6(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    """Listening, advertised and dialled at an address that is written bare."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
    (ada, *_) = tables["participants"]
    recipe = potluck.recipe(
        {**tables, "participants": [ada]}, rounds={"count": 1, "local_steps": 1}, engine={"kind": "nats"}
    )
    run = ("--set", f"records.folder={tmp_path / 'run'}", "--listen", f"[::1]:{port}", "--advertise", "::1", "--json")
    host = potluck.start("host", recipe, *run)
    invite = tmp_path / "run" / "host" / "invites" / "ada.toml"
    while not (invite.exists() and "server:" in host.err.read_text()):
        assert not host.ends_within(0.05), host.err.read_text()
    assert f'"tls://[::1]:{port}"' in invite.read_text()
    said = potluck("join", "--invite", invite, "--data", ada["source"]["path"], "--json").out
    assert json.loads(said)["ended"] == "the run is finished" and host.wait().code == 0
