"""Closed-loop load on the gateway: requests per second, CPU per request and per chunk.

The client is a bare asyncio protocol that only counts; on the machine's other core.
"""

from __future__ import annotations

import asyncio
import time
from typing import cast

import httptools
import msgspec
import psutil


class Rate(msgspec.Struct, frozen=True):
    per_s: float
    cpu_us: float
    """CPU of the server per request (or chunk), microseconds."""


class _Connection(asyncio.Protocol):
    """Sends the same request again and again; counts answers and data chunks."""

    def __init__(self, wire: bytes, tally: list[int], ends_at: float, counted: bytes = b"data: ") -> None:
        self._wire = wire
        self._counted = counted
        self._tally = tally
        self._ends_at = ends_at
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are so by shape only
        self._send()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(self._wire)

    def data_received(self, data: bytes) -> None:
        self._tally[1] += data.count(self._counted)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._fail(RuntimeError(f"the gateway answered {status}"))
            return
        self._tally[0] += 1
        if time.perf_counter() < self._ends_at:
            asyncio.get_running_loop().call_soon(self._send)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc) if exc else self.closed.done() or self.closed.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.closed.done():
            self.closed.set_exception(error)
        self._transport.close()


class Done(msgspec.Struct, frozen=True):
    answers: int
    counted: int
    """Times that the text was in them, where the network did not cut it."""


async def offer(
    host: str, port: int, wire: bytes, connections: int, seconds: float, counted: bytes = b"data: "
) -> Done:
    """The same request on each connection, again and again, until `seconds` are over."""
    tally = [0, 0]
    loop, ends_at = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = [
        (await loop.create_connection(lambda: _Connection(wire, tally, ends_at, counted), host, port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(connection.closed for connection in made))
    return Done(*tally)


async def drive(
    host: str, port: int, path: str, body: bytes, *, pid: int, connections: int = 32, seconds: float = 4.0
) -> tuple[Rate, Rate]:
    """Requests and data chunks per second for `seconds`, and the CPU that process `pid` spent on each."""
    wire = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    server = psutil.Process(pid)
    before, started = server.cpu_times(), time.perf_counter()
    done = await offer(host, port, wire, connections, seconds)
    wall_s = time.perf_counter() - started
    after = server.cpu_times()
    cpu_us = (after.user + after.system - before.user - before.system) * 1e6

    def rate(count: int) -> Rate:
        return Rate(count / wall_s, cpu_us / max(count, 1))

    return rate(done.answers), rate(done.counted)
