"""Flower's deployment runtime on loopback: a SuperLink, a SuperNode, and the app of ``flower_wire_app``.

The coordinator is the ServerApp, the server the SuperLink. Neither TLS nor authentication is on, and the SuperLink
keeps its state in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers._wire import Processes, Report, free_port, listens, measure, read_json

HOST = "127.0.0.1"
APP = Path(__file__).parent / "flower_wire_app"


def work(options: argparse.Namespace, processes: Processes, report: Report) -> None:
    port, node_port = free_port(), free_port()
    processes.roles = {
        "/flwr-serverapp ": "coordinator",
        "/flower-superlink ": "server",
        "/flower-supernode ": "participant",
        f"--runtime-api-address {HOST}:{port} ": "server",  # each starts what starts the app's processes
        f"--runtime-api-address {HOST}:{node_port} ": "participant",
    }
    binaries = Path(sys.executable).parent
    os.environ |= {"PATH": f"{binaries}:{os.environ['PATH']}", "FLWR_HOME": str(options.folder)}
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    common = ["--insecure", "--host", HOST, "--disable-runtime-dependency-installation"]
    processes.start("superlink", [f"{binaries}/flower-superlink", *common, "--port", str(port)])
    processes.until(lambda: listens(port))
    node = ["--insecure", "--superlink", f"{HOST}:{port}", "--host", HOST, "--port", str(node_port)]
    processes.start("supernode", [f"{binaries}/flower-supernode", *node])
    sizes = {"megabytes": options.megabytes, "pings": options.pings, "transfers": options.transfers}
    report.take(processes.until(submit(port, options.folder / "result.json", sizes), every=0.5))


def submit(port: int, result: Path, sizes: dict[str, int]) -> Callable[[], Any]:
    """Start the app; who calls the answer gets its result once it is there."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.typing import SuperLinkConnection
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
    from flwr.supercore.fab import Fab

    connection = SuperLinkConnection(name="loopback", address=f"{HOST}:{port}", insecure=True)
    client, content = init_http_client_from_connection(connection), build_fab_from_disk(APP)
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    settings = user_config_to_proto({**sizes, "result": str(result)})
    started = client.StartRun(StartRunRequest(fab=fab, override_config=settings))

    def found() -> Any:
        status = client.ListRuns(ListRunsRequest(run_id=started.run_id)).run_dict[started.run_id].status
        if status.status == "finished" and status.sub_status != "completed":
            raise RuntimeError(f"the app's run {status.sub_status}: {status.details}")
        return read_json(result)

    return found


if __name__ == "__main__":
    measure("flower", "flwr", work)
