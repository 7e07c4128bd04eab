"""A TCP proxy in the place of a slow, long link that can be cut.

``python -m tests.machines.shaping --listen HOST:PORT --to HOST:PORT --mbit 20 --latency-ms 50`` says ``ready`` when it
listens. Each direction has a token bucket of its own, which all connections share, and delays by the latency; a new
connection costs a round trip, as its handshake would. SIGUSR1 cuts the link and SIGUSR1 again mends it: in between no
byte passes and no end of a connection is told, as with an unplugged cable. SIGTERM ends it; then it prints the bytes
that went each way as JSON. What it holds is bounded: by the link's own capacity, and by a window where the rate is
not limited. It loses nothing, and so knows no slow start: where the kernel can, let the kernel delay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import time
from collections.abc import Sequence

PIECE = 1 << 14
BURST = 1 << 15
WINDOW = 1 << 22


class Link:
    """One direction of the cable.

    Args:
        rate: Bytes a second; 0 for no limit.
        latency: Seconds that each byte travels.
        whole: Set while the cable is not cut.
    """

    def __init__(self, rate: float, latency: float, whole: asyncio.Event) -> None:
        self.rate, self.latency, self.whole = rate, latency, whole
        self.bytes, self._free = 0, 0.0
        self.pieces = max(2, int((rate * latency if rate else WINDOW) / PIECE) + 2)

    async def take(self, size: int) -> float:
        """Wait until so many bytes have left; returns when they arrive."""
        now = time.monotonic()
        if self.rate:
            self._free = max(self._free, now - BURST / self.rate) + size / self.rate
            await asyncio.sleep(self._free - now)
        self.bytes += size
        return time.monotonic() + self.latency

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Everything from one socket to another, until its end."""
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(self.pieces)
        landing = asyncio.create_task(self._land(flying, writer))
        try:
            piece = b"-"
            while piece and not landing.done():
                await self.whole.wait()
                piece = await reader.read(PIECE)
                await self.whole.wait()
                await flying.put((await self.take(len(piece)), piece))
            await landing
        finally:
            landing.cancel()

    async def _land(self, flying: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            arrives, piece = await flying.get()
            await asyncio.sleep(arrives - time.monotonic())
            await self.whole.wait()
            if not piece:
                writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()


class Cable:
    """Both directions, and the connections over them."""

    def __init__(self, to: tuple[str, int], rate: float, latency: float) -> None:
        self._to, self.whole = to, asyncio.Event()
        self.whole.set()
        self.up, self.down = Link(rate, latency, self.whole), Link(rate, latency, self.whole)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side has ended it."""
        try:
            await asyncio.sleep(2 * self.up.latency)
            await self.whole.wait()
            there, back = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.create_task(self.up.carry(reader, back)), asyncio.create_task(self.down.carry(there, writer))]
        try:
            for side in (writer, back):
                side.transport.set_write_buffer_limits(PIECE)
                side.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(*ways)
        except OSError:
            await self.whole.wait()  # a reset is not heard through a cut
        finally:
            for way in ways:
                way.cancel()
            for side in (writer, back):
                side.transport.abort()

    def switch(self) -> None:
        """Cut the cable, or mend it."""
        if self.whole.is_set():
            self.whole.clear()
        else:
            self.whole.set()
        print(json.dumps({"whole": self.whole.is_set()}), flush=True)


async def serve(listen: tuple[str, int], to: tuple[str, int], rate: float, latency: float) -> dict[str, int]:
    """Carry connections until SIGTERM; the bytes that went each way."""
    cable, over, loop = Cable(to, rate, latency), asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, cable.switch)
    loop.add_signal_handler(signal.SIGTERM, over.set)
    await asyncio.start_server(cable.connect, *listen, limit=PIECE)
    print("ready", flush=True)
    await over.wait()
    return {"up_bytes": cable.up.bytes, "down_bytes": cable.down.bytes}


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` as a socket wants it."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Carry TCP connections over a slow, long link.")
    parser.add_argument("--listen", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--mbit", type=float, default=0.0, help="of each direction; 0 for no limit")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="one way")
    options = parser.parse_args(arguments)
    rate, latency = options.mbit * 1e6 / 8, options.latency_ms / 1e3
    print(json.dumps(asyncio.run(serve(options.listen, options.to, rate, latency))), flush=True)


if __name__ == "__main__":
    main()
