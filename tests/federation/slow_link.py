"""A TCP relay that makes every site's line to the server slow; a program of its own.

It stands between the sites and the server and relays bytes without looking at them, so mutual TLS
passes through unchanged. All connections of one site (one source address) share that site's line.
Each direction delays by half a round trip and lets through no more than the line's rate. There is
no loss: TCP towards either side is local.

It reads one JSON object per line from its input: ``{"round_trip": seconds, "rate": bytes per
second}``, or ``{}`` for an unhindered line. It answers each with the bytes that it has relayed
since the last one: ``{site's address: {"up": bytes, "down": bytes}}``. It ends with its input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from dataclasses import dataclass, field

CHUNK_BYTES = 16384
BURST_SECONDS = 0.01
"""Depth of the token bucket: what a late timer may catch up."""
BUFFER_BYTES = 131072
"""Of the kernel, per socket: a router's queue, not a warehouse."""
CHUNKS_IN_FLIGHT = 64


@dataclass
class Line:
    """What all lines are like at present."""

    round_trip: float = 0.0
    rate: float = float("inf")


class Direction:
    """One direction of one site's line; bytes wait until those before them have left."""

    def __init__(self, line: Line) -> None:
        self.relayed = 0
        self._line, self._free_at, self._turn = line, 0.0, asyncio.Lock()

    async def send(self, size: int) -> float:
        """Wait until the line takes ``size`` bytes; returns when their last one arrives."""
        now = asyncio.get_running_loop().time
        async with self._turn:
            await asyncio.sleep(max(0.0, self._free_at - now()))
            self._free_at = max(self._free_at, now() - BURST_SECONDS) + size / self._line.rate
            arrival = max(self._free_at, now()) + self._line.round_trip / 2
        self.relayed += size
        return arrival


@dataclass
class Site:
    """The line of one site."""

    up: Direction
    down: Direction


@dataclass
class Relay:
    """Relays every connection to ``target``."""

    target: tuple[str, int]
    line: Line = field(default_factory=Line)
    sites: dict[str, Site] = field(default_factory=dict)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection of a site."""
        address = writer.get_extra_info("peername")[0]
        site = self.sites.setdefault(address, Site(Direction(self.line), Direction(self.line)))
        await asyncio.sleep(self.line.round_trip)  # TCP's own handshake
        onward: asyncio.StreamWriter | None = None
        try:
            back, onward = await asyncio.open_connection(sock=await self._dial())
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, onward, site.up))
                both.create_task(_pump(back, writer, site.down))
        except* OSError:
            pass  # either side has gone: so does the connection
        finally:
            for end in (writer, onward):
                if end:
                    end.close()

    async def _dial(self) -> socket.socket:
        dialled = _socket()
        dialled.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(dialled, self.target)
        except OSError:
            dialled.close()
            raise
        return dialled

    def take_counts(self) -> dict[str, dict[str, int]]:
        """Bytes relayed since the last call."""
        counts = {}
        for address, site in self.sites.items():
            counts[address] = {"up": site.up.relayed, "down": site.down.relayed}
            site.up.relayed = site.down.relayed = 0
        return counts


def _socket() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
) -> None:
    flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_IN_FLIGHT)

    async def land() -> None:
        now = asyncio.get_running_loop().time
        while True:
            arrival, chunk = await flying.get()
            await asyncio.sleep(max(0.0, arrival - now()))
            if not chunk:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()

    async def launch() -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await flying.put((await direction.send(len(chunk)), chunk))
        await flying.put((await direction.send(0), b""))

    async with asyncio.TaskGroup() as both:
        both.create_task(land())
        both.create_task(launch())


async def serve(listen: tuple[str, int], relay: Relay) -> None:
    """Relay until the input ends."""
    door = _socket()
    door.bind(listen)
    server = await asyncio.start_server(relay.connect, sock=door)
    async with server:
        while order := await asyncio.to_thread(sys.stdin.readline):
            asked = Line(**json.loads(order))
            relay.line.round_trip, relay.line.rate = asked.round_trip, asked.rate
            sys.stdout.write(json.dumps(relay.take_counts()) + "\n")
            sys.stdout.flush()


def _address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    chosen = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(chosen.listen, Relay(chosen.to)))
