"""Answers of work that takes its time: a line for each step as NDJSON, or only the last.

The work ends with its client: when the connection goes, `statuses` is closed at once. With
`ready` it ends with the node too, since a pull may take longer than a stop may wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.catalog.wire import CreateStatus
from ollama_distributed.gateway.asgi import Receive, Scope, Send
from ollama_distributed.gateway.errors import as_ours, ollama_error_body
from ollama_distributed.gateway.out import STREAM_HEADERS
from ollama_distributed.gateway.routes.table import json_response

STEP_S = 0.5
"""How soon the work sees that the node shuts down."""
_SUCCESS = CreateStatus(status="success")


async def progress(
    statuses: AsyncIterator[Any], request: Request, *, stream: bool, ready: Callable[[], bool] = lambda: True
) -> Response:
    """Status lines as NDJSON, or only the last. An error before the first has its status."""
    lines = _until(statuses, ready)
    if not stream:
        return json_response(await _last(lines, request))
    try:
        first = await anext(lines)
    except StopAsyncIteration:
        first = _SUCCESS
    return _Lines(first, lines)


async def _until(statuses: AsyncIterator[Any], ready: Callable[[], bool]) -> AsyncGenerator[Any]:
    coming = _next(statuses)
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=STEP_S)
            if done:
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                coming = _next(statuses)
            if not ready():
                raise Unavailable("the node is shutting down; ask again to go on")
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)  # its source can only be closed at rest
        if (close := getattr(statuses, "aclose", None)) is not None:
            await close()


def _next(statuses: AsyncIterator[Any]) -> asyncio.Task[Any]:
    async def step() -> Any:
        return await anext(statuses)

    return asyncio.create_task(step(), name="next status")


async def _last(lines: AsyncGenerator[Any], request: Request) -> Any:
    """
    Raises:
        ClientDisconnect: the client went away; the work is over.
    """

    async def run() -> Any:
        last: Any = _SUCCESS
        async for status in lines:
            last = status
        return last

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.create_task(run()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.wait({work, leaving})
        await lines.aclose()


class _Lines(StreamingResponse):
    def __init__(self, first: Any, rest: AsyncGenerator[Any]) -> None:
        headers = {name.decode("ascii"): value.decode("ascii") for name, value in STREAM_HEADERS}
        super().__init__(_encoded(first, rest), headers=headers, media_type="application/x-ndjson")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()


async def _encoded(first: Any, rest: AsyncGenerator[Any]) -> AsyncIterator[bytes]:
    yield msgspec.json.encode(first) + b"\n"
    try:
        async for status in rest:
            yield msgspec.json.encode(status) + b"\n"
    except Exception as exc:  # the status line is gone: the error is the last line
        yield ollama_error_body(as_ours(exc)) + b"\n"
