"""The hot path behind plain ASGI: for tests, and for any server but our own protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ollama_distributed.gateway.connections import met
from ollama_distributed.gateway.core import Exchange
from ollama_distributed.gateway.gate import Head, read_head
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.out import RawHeaders

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def scope_head(scope: Scope) -> Head:
    client = scope.get("client")
    return read_head(
        scope["method"], scope["path"], scope["headers"], client[0] if client else None, scope["scheme"]
    )


class _Outbox:
    """Collects what the exchange writes until `send` takes it; pauses it when too much waits."""

    def __init__(self, most: int) -> None:
        self.exchange: Exchange | None = None
        self.head: tuple[int, RawHeaders] | None = None
        self.chunks: list[bytes] = []
        self.waiting = 0
        self.done = False
        """The exchange has written its last byte."""
        self.closed = False
        """That byte has been sent."""
        self.wake = asyncio.Event()
        self._most = most
        self._paused = False

    def respond(self, status: int, headers: RawHeaders, body: bytes) -> None:
        self.head = (status, headers)
        self.chunks.append(body)
        self.done = True
        self.wake.set()

    def start(self, status: int, headers: RawHeaders) -> None:
        self.head = (status, headers)

    def write(self, data: bytes) -> None:
        self.chunks.append(data)
        self.waiting += len(data)
        if self.waiting > self._most and not self._paused and self.exchange is not None:
            self._paused = True
            self.exchange.pause()
        self.wake.set()

    def end(self) -> None:
        self.done = True
        self.wake.set()

    def ready(self) -> bool:
        return bool(self.chunks) or (self.done and not self.closed)

    def idle(self) -> bool:
        """Nothing will come any more: all was sent, or the client went away."""
        if self.closed:
            return True
        return self.exchange is not None and self.exchange.ended and not self.done

    def take(self) -> list[bytes]:
        """Each is a chunk of its own on the wire, as in `fast.py`."""
        pieces, self.chunks = self.chunks, []
        return pieces

    def sent(self) -> None:
        """Everything taken so far has left."""
        if not self.chunks:
            self.waiting = 0
            if self._paused and self.exchange is not None:
                self._paused = False
                self.exchange.resume()


async def serve_hot(path: HotPath, scope: Scope, receive: Receive, send: Send) -> None:
    """Run one HTTP request on the hot path, start to end."""
    out = _Outbox(path.means.gate.limits.stream_buffer_bytes)
    exchange = path.open(scope_head(scope), out)
    out.exchange = exchange
    if not exchange.ended:
        met(scope)
    watcher: asyncio.Task[None] | None = None
    try:
        await _read_body(exchange, receive)
        while not out.idle():
            if not out.ready():
                if watcher is None:
                    watcher = asyncio.create_task(_watch(exchange, out, receive))
                await out.wake.wait()
            out.wake.clear()
            await _flush(out, send)
    finally:
        exchange.disconnected()
        out.exchange = None  # each holds the other: without this, only the collector frees them
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


async def _flush(out: _Outbox, send: Send) -> None:
    """Send what is there."""
    if not out.ready():
        return
    if out.head is not None:
        status, headers = out.head
        out.head = None
        await send({"type": "http.response.start", "status": status, "headers": headers})
    # Taken and judged together: what comes while `send` waits belongs to the next message.
    pieces, out.closed = out.take(), out.done
    *before, last = pieces or [b""]
    for piece in before:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": last, "more_body": not out.closed})
    out.sent()


async def _read_body(exchange: Exchange, receive: Receive) -> None:
    while not exchange.ended:
        message = await receive()
        if message["type"] == "http.disconnect":
            exchange.disconnected()
            return
        exchange.receive(message.get("body", b""))
        if not message.get("more_body", False):
            exchange.body_complete()
            return


async def _watch(exchange: Exchange, out: _Outbox, receive: Receive) -> None:
    """Waits for the client to go away while an answer is made."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.disconnected()
    out.wake.set()
