"""What `deploy/` holds is accepted by those who read it, as far as they are here, and names what potluck has."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from potluck.cli import app
from potluck.engine.nats.identity import make_certificate, new_seed, public_key
from potluck.engine.nats.server import users_config
from potluck.engine.nats.subjects import COORDINATOR, Names, permissions_of

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
CONFIGS = [DEPLOY / "nats.conf", *sorted(DEPLOY.glob("cluster/*.conf"))]
BIN = Path(sys.executable).parent
SEED = re.compile(r"\bSU[A-Z2-7]{56}\b")


def check_command(words: list[str]) -> None:
    """A verb and options that the command line has, with a value for each that takes one."""
    verb = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    flags = {name: parameter.is_flag for parameter in verb.params for name in parameter.opts if name[0] == "-"}
    values = iter(words[1:])
    for word in values:
        if word.startswith("-"):
            assert word in flags, word
            assert flags[word] or not next(values).startswith("-"), word


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return parser


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


def test_compose_names_only_what_it_defines() -> None:
    content = compose()
    services = content["services"]
    assert set(services) == {"nats", "coordinator", "participant"}
    for name, service in services.items():
        assert isinstance(service["image"], str), name
        for kind in ("configs", "secrets"):
            named = [item if isinstance(item, str) else item["source"] for item in service.get(kind, [])]
            assert set(named) <= set(content[kind]), name
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source.startswith("./") or source in content["volumes"], volume
    assert all(set(item) == {"file"} for kind in ("configs", "secrets") for item in content[kind].values())


@pytest.mark.parametrize("name", ["coordinator", "participant"])
def test_compose_runs_commands_that_there_are(name: str) -> None:
    service = compose()["services"][name]
    check_command(service["command"])
    inside = {volume.split(":")[1] for volume in service["volumes"]}
    inside |= {f"/run/secrets/{secret}" for secret in service["secrets"]}
    paths = {word.rpartition("=")[2] for word in service["command"] if word.rpartition("=")[2].startswith("/")}
    assert paths <= inside


def test_there_are_no_secrets() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not SEED.search(text) and "PRIVATE KEY" not in text, path


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_what_there_is(path: Path) -> None:
    parsed = unit(path)
    assert set(parsed) - {"DEFAULT"} == {"Unit", "Service", "Install"}
    service = parsed["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).is_absolute() and service["User"] != "root"
    if Path(program).name == "potluck":
        check_command(words)
        assert service["KillMode"] == "mixed"  # else the message server is ended beside its coordinator
        assert {"130"} == set(service["SuccessExitStatus"].split())


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    text = path.read_text()
    for program in ("potluck", "nats-server"):
        text = re.sub(rf"/[a-z/]+/bin/{program}\b", str(BIN / program), text)
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if path.name.partition(".")[0].rstrip("@") in line]
    assert not said, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_server_accepts_a_configuration(path: Path, tmp_path: Path) -> None:
    names, roles = Names("0123456789ab"), ("ada", COORDINATOR, "watcher")
    users = {public_key(new_seed()): permissions_of(names, role, ("ada",)) for role in roles}
    make_certificate(tmp_path, [f"nats-{number}.example.org" for number in (1, 2, 3)])
    (tmp_path / "users.conf").write_text(users_config(users))
    text = path.read_text().replace("/etc/nats", str(tmp_path)).replace("/var/lib/nats", str(tmp_path / "store"))
    config = tmp_path / path.name
    config.write_text(text)
    command = [BIN / "nats-server", "-c", config, "-t"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for setting in ("max_payload: 1MB", "handshake_first: true", 'include "users.conf"'):
        assert setting in text
