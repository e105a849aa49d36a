"""Answers that tell changes as they happen: server-sent events (WHATWG HTML 9.2).

Each ends with its client, and with the node: a stop must not wait for whoever watches. The
source holds what a slow reader has not taken, so it must keep the newest only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

import anyio
import structlog
from starlette.responses import StreamingResponse

from ollama_distributed.base.errors import QueueFull
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.asgi import Receive, Scope, Send
from ollama_distributed.gateway.dialects.sse import CONTENT_TYPE
from ollama_distributed.gateway.errors import as_ours, seed_error_body
from ollama_distributed.gateway.out import STREAM_HEADERS

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")

MOST_WATCHERS = 64
"""Of one node at once: a browser page and a script or two per operator."""
HEARTBEAT_S = 15.0
"""A comment goes out after so long a silence: proxies cut connections that are idle for a minute,
and a client that is gone is noticed by it."""
STEP_S = 0.5
"""How soon a stream sees that the node shuts down."""
_HEARTBEAT = b": still here\n\n"


class Watchers:
    """Whoever watches this node now. `ready`: False once it shuts down."""

    def __init__(
        self, ready: Callable[[], bool], *, most: int = MOST_WATCHERS, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self.count = 0
        self._ready = ready
        self._most = most
        self._heartbeat_s = heartbeat_s

    def stream(
        self, source: AsyncIterator[T], encode: Callable[[T], bytes], request_id: RequestId
    ) -> StreamingResponse:
        """Raises `QueueFull` when too many watch already."""
        if self.count >= self._most:
            raise QueueFull(f"{self._most} clients watch this node already; ask another node")
        return _EventStream(self, self._events(source, encode, request_id))

    async def _events(
        self, source: AsyncIterator[T], encode: Callable[[T], bytes], request_id: RequestId
    ) -> AsyncGenerator[bytes]:
        silent_s = 0.0
        coming = _next(source)
        try:
            while self._ready():
                done, _ = await asyncio.wait({coming}, timeout=min(STEP_S, self._heartbeat_s))
                if done:
                    yield encode(coming.result())
                    silent_s = 0.0
                    coming = _next(source)
                    continue
                silent_s += min(STEP_S, self._heartbeat_s)
                if silent_s >= self._heartbeat_s:
                    yield _HEARTBEAT
                    silent_s = 0.0
        except StopAsyncIteration:
            return
        except Exception as exc:  # the status line is gone: the error is the last event
            error = as_ours(exc)
            if error is not exc:
                log.exception("gateway.watch_broke", request_id=request_id)
            yield b"event: error\ndata: " + seed_error_body(error, request_id) + b"\n\n"
        finally:
            # Shielded: a client that left has cancelled this task, and the source must still be closed.
            with anyio.CancelScope(shield=True):
                await _closed(source, coming)


def _next(source: AsyncIterator[T]) -> asyncio.Task[T]:
    async def step() -> T:
        return await anext(source)

    return asyncio.create_task(step(), name="next event of a watch")


async def _closed(source: AsyncIterator[T], coming: asyncio.Task[T]) -> None:
    coming.cancel()
    await asyncio.wait({coming})  # the source can only be closed once nobody waits for its next item
    if not coming.cancelled():
        coming.exception()  # of an item that nobody is left to hear of
    if (close := getattr(source, "aclose", None)) is not None:
        await close()


class _EventStream(StreamingResponse):
    """Counts itself among the watchers while it runs; ends its source however it ends."""

    def __init__(self, watchers: Watchers, events: AsyncGenerator[bytes]) -> None:
        headers = {name.decode("ascii"): value.decode("ascii") for name, value in STREAM_HEADERS}
        super().__init__(events, headers=headers, media_type=CONTENT_TYPE)
        self._watchers = watchers
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watchers.count += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watchers.count -= 1
            await self._events.aclose()
