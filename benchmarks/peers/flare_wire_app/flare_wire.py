"""Pings and transfers by FLARE's Collab API: the server calls the one site, whose process lives as long as the job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from nvflare.collab import collab

TENSORS = 16
Tensors = dict[str, torch.Tensor]


class Site:
    @collab.publish
    def ping(self, number: int) -> int:
        return number

    @collab.publish
    def transfer(self, tensors: Tensors) -> tuple[Tensors, float, float]:
        arrived = time.time()
        for tensor in tensors.values():
            tensor.add_(1)
        return tensors, arrived, time.time()


class Server:
    def __init__(self, megabytes: int, pings: int, transfers: int, result: str) -> None:
        self.megabytes, self.pings, self.transfers, self.result = megabytes, pings, transfers, result

    @collab.main
    def main(self) -> None:
        site = collab.clients[0](timeout=3600)
        found: dict[str, list[float]] = {"ping_ms": [], "transfer_seconds": [], "down_seconds": [], "up_seconds": []}
        for number in range(self.pings):
            begin = time.time()
            site.ping(number)
            found["ping_ms"].append(1000 * (time.time() - begin))
        size = self.megabytes * 1_000_000 // 4 // TENSORS
        for number in range(self.transfers):
            torch.manual_seed(number)
            tensors = {f"w{i}": torch.rand(size) for i in range(TENSORS)}
            begin = time.time()
            back, arrived, left = site.transfer(tensors)
            end = time.time()
            if not all(torch.equal(back[name], tensor + 1) for name, tensor in tensors.items()):
                raise ValueError("other values came back")
            found["transfer_seconds"].append(end - begin)
            found["down_seconds"].append(arrived - begin)
            found["up_seconds"].append(end - left)
        path = Path(self.result)
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").rename(path)
