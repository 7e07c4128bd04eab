"""Pings and transfers by Flower's Message API, asked for by the ServerApp and answered by the ClientApp.

Tensors are NumPy arrays: every message starts a process for the ClientApp, and importing PyTorch there would count.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

TENSORS = 16
client, server = ClientApp(), ServerApp()


@client.query("ping")
def ping(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@client.query("transfer")
def transfer(message: Message, context: Context) -> Message:
    """Other values go back: Flower would not send the same again."""
    tensors = _unpacked(message.content)
    arrived = time.time()
    for tensor in tensors.values():
        tensor += 1
    times = ConfigRecord({"arrived": arrived, "left": time.time()})
    return Message(RecordDict({"tensors": _packed(tensors), "times": times}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    found: dict[str, list[float]] = {"ping_ms": [], "transfer_seconds": [], "down_seconds": [], "up_seconds": []}
    for number in range(int(settings["pings"])):
        begin = time.time()
        _ask(grid, nodes[0], "query.ping", RecordDict({"number": ConfigRecord({"number": number})}))
        found["ping_ms"].append(1000 * (time.time() - begin))
    size = int(settings["megabytes"]) * 1_000_000 // 4 // TENSORS
    for number in range(int(settings["transfers"])):
        random = np.random.default_rng(number)
        tensors = {f"w{i}": random.random(size, np.float32) for i in range(TENSORS)}
        begin = time.time()
        reply = _ask(grid, nodes[0], "query.transfer", RecordDict({"tensors": _packed(tensors)}))
        back = _unpacked(reply)
        end, times = time.time(), reply.config_records["times"]
        if not all(np.array_equal(back[name], tensor + 1) for name, tensor in tensors.items()):
            raise ValueError("other values came back")
        found["transfer_seconds"].append(end - begin)
        found["down_seconds"].append(times["arrived"] - begin)
        found["up_seconds"].append(end - times["left"])
    path = Path(str(settings["result"]))
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)


def _packed(tensors: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})


def _unpacked(content: RecordDict) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in content.array_records["tensors"].items()}


def _ask(grid: Grid, node: int, kind: str, content: RecordDict) -> RecordDict:
    """Ask for the reply without a pause: Flower's `send_and_receive` looks every three seconds."""
    sent = list(grid.push_messages([Message(content, dst_node_id=node, message_type=kind, ttl=3600.0)]))
    del content
    while not (replies := list(grid.pull_messages(sent))):
        time.sleep(0.02)
    if replies[0].has_error():
        raise RuntimeError(str(replies[0].error))
    return replies[0].content
