"""Requests that come when they come, whatever became of those before: an open loop (Poisson).

The client is asyncio over bare sockets with kept connections; it times each request from the moment
that it is written, so a slow client would count against the server, never for it.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable
from typing import cast

import httptools
import msgspec

_SAID = re.compile(rb'"content":"[^"]')
PATIENCE_S = 60.0
"""After the last request, for those that still run."""


class Seen(msgspec.Struct):
    """Of one request."""

    began_s: float
    """By `time.perf_counter`."""
    status: int = 0
    """0: it was broken off."""
    retry_after: str = ""
    first_s: float = 0.0
    """Until the first word of the answer."""
    took_s: float = 0.0


class _Connection(asyncio.Protocol):
    """Carries one request after the other."""

    def __init__(self, free: list[_Connection]) -> None:
        self._free = free
        self._parser = httptools.HttpResponseParser(self)
        self._seen: Seen | None = None
        self._done: Callable[[Seen], None] = lambda _: None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, wire: bytes, seen: Seen, done: Callable[[Seen], None]) -> None:
        self._seen, self._done = seen, done
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(wire)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and self._seen is not None:
            self._seen.retry_after = value.decode()

    def on_body(self, body: bytes) -> None:
        seen = self._seen
        if seen is not None and not seen.first_s and _SAID.search(body):
            seen.first_s = time.perf_counter() - seen.began_s

    def on_message_complete(self) -> None:
        if self._seen is not None:
            self._seen.status = self._parser.get_status_code()
            keeps = self._parser.should_keep_alive()
            self._end()
            if keeps:
                self._free.append(self)
            else:
                self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # its request says so
        self.lost = True
        if self._seen is not None:
            self._end()

    def _end(self) -> None:
        seen, self._seen = self._seen, None
        assert seen is not None
        seen.took_s = time.perf_counter() - seen.began_s
        self._done(seen)


class Stream:
    """One caller's requests. `wire`: makes the bytes of the next one."""

    def __init__(self, host: str, port: int, wire: Callable[[], bytes], chance: random.Random) -> None:
        self._host, self._port = host, port
        self._wire = wire
        self._chance = chance
        self._free: list[_Connection] = []
        self._running: set[asyncio.Task[None]] = set()
        self._open = 0
        self._all_done = asyncio.Event()
        self.seen: list[Seen] = []

    async def run(self, per_s: float, seconds: float) -> list[Seen]:
        """Requests at random moments, so many a second; returns when all have ended."""
        ends_at = next_at = time.perf_counter()
        ends_at += seconds
        while next_at < ends_at:
            next_at += self._chance.expovariate(per_s)
            if (pause_s := next_at - time.perf_counter()) > 0:
                await asyncio.sleep(pause_s)
            self._begin()
        async with asyncio.timeout(PATIENCE_S):
            while self._open:
                self._all_done.clear()
                await self._all_done.wait()
        for connection in self._free:
            connection.transport.close()
        self._free.clear()
        return self.seen

    async def closed(self, clients: int, seconds: float) -> list[Seen]:
        """So many clients, each of which asks again when it has its answer."""
        ends_at = time.perf_counter() + seconds

        def again(_: Seen) -> None:
            if time.perf_counter() < ends_at:
                asyncio.get_running_loop().call_soon(self._begin, again)

        for _ in range(clients):
            self._begin(again)
        await asyncio.sleep(seconds)
        async with asyncio.timeout(PATIENCE_S):
            while self._open:
                self._all_done.clear()
                await self._all_done.wait()
        return self.seen

    def _begin(self, then: Callable[[Seen], None] = lambda _: None) -> None:
        seen = Seen(time.perf_counter())
        self._open += 1

        def done(one: Seen) -> None:
            self._open -= 1
            self.seen.append(one)
            self._all_done.set()
            then(one)

        while self._free:
            connection = self._free.pop()
            if not connection.lost:
                connection.ask(self._wire(), seen, done)
                return
        task = asyncio.get_running_loop().create_task(self._dial(seen, done))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _dial(self, seen: Seen, done: Callable[[Seen], None]) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._free), self._host, self._port
            )
        except OSError:
            seen.took_s = time.perf_counter() - seen.began_s
            done(seen)
            return
        connection.ask(self._wire(), seen, done)
