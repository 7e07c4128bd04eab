"""NVIDIA FLARE on loopback: a provisioned server and one site with mutual TLS, and the job of ``flare_wire_app``.

The coordinator is the server's process of the job, the server what starts that. FLARE takes no digests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Processes, Report, free_port, measure, read_json

APP = Path(__file__).parent / "flare_wire_app"
ADMIN, SERVER, SITE = "admin@potluck.example", "localhost", "site-1"


def work(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    processes.roles = {
        ".server.runner_process ": "coordinator",
        ".server.server_train ": "server",
        ".app.client.": "participant",
    }
    os.environ["HOME"] = str(options.folder)  # FLARE keeps settings there
    kits = provision(options.folder, free_port())
    for name, kind in {SERVER: "server", SITE: "client"}.items():
        command = [sys.executable, "-m", f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(kits / name)]
        settings = ["secure_train=true", f"uid={name}", "org=potluck", "config_folder=config"]
        processes.start(name, [*command, "-s", f"fed_{kind}.json", "--set", *settings])
    result = options.folder / "result.json"
    session = processes.until(lambda: _session(kits))
    processes.until(lambda: session.get_connected_client_list())
    job = session.submit_job(export(options, result))
    report.take(processes.until(lambda: _found(session, job, result), every=0.5))


def provision(folder: Path, port: int) -> Path:
    """Certificates and settings of each participant; the folder that has one of theirs each."""
    builders = {"workspace.Workspace": {}, "static_file.StaticFile": {"config_folder": "config", "scheme": "grpc"}}
    builders |= {"cert.Cert": {}, "signature.Signature": {}}
    common = {"org": "potluck"}
    project = {
        "api_version": 3,
        "name": "wire",
        "description": "wire",
        "participants": [
            common | {"name": SERVER, "type": "server", "fed_learn_port": port, "admin_port": port},
            common | {"name": SITE, "type": "client"},
            common | {"name": ADMIN, "type": "admin", "role": "project_admin"},
        ],
        "builders": [{"path": f"nvflare.lighter.impl.{name}Builder", "args": args} for name, args in builders.items()],
    }
    (folder / "project.yml").write_text(json.dumps(project))  # YAML too
    command = [sys.executable, "-m", "nvflare.lighter.provision", "-p", "project.yml", "-w", "kits"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    kits = folder / "kits" / "wire" / "prod_00"
    for default in kits.glob("*/local/resources.json.default"):  # all servers of a machine would share their jobs
        default.with_suffix("").write_text(default.read_text().replace("/tmp/nvflare", str(folder / "store")))
    return kits


def export(options: argparse.Namespace, result: Path) -> str:
    """Write the job; FLARE ships the app's file with it."""
    sys.path.insert(0, str(APP))
    from flare_wire import Server, Site
    from nvflare.collab import CollabRecipe

    server = Server(options.megabytes, options.pings, options.transfers, str(result))
    CollabRecipe("wire", server=server, client=Site()).export(str(options.folder / "jobs"))
    return str(options.folder / "jobs" / "wire")


def _session(kits: Path) -> Any:
    """The administrator's, once the server is there."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    try:
        return new_secure_session(ADMIN, str(kits / ADMIN), timeout=5)
    except Exception:  # it says in many ways that nobody listens yet
        return None


def _found(session: Any, job: str, result: Path) -> Any:
    """What the job wrote, once it has."""
    status = str(session.get_job_meta(job).get("status"))
    if status.startswith("FINISHED") and status != "FINISHED:COMPLETED":
        raise RuntimeError(f"the job is {status}")
    return read_json(result)


if __name__ == "__main__":
    measure("flare", "nvflare", work)
