"""One whole answer of an engine over HTTP.

status, value = await fetch_json(address, "GET", "/health", deadline_s=1.0)
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.http import Address, Headers, Route
from ollama_distributed.adapters.engines.kept import Kept
from ollama_distributed.base.errors import DeadlineExceeded, EngineError, OllamaDistributedError

MAX_JSON_BYTES = 256 * 1024 * 1024
"""Body of one buffered answer: 2,048 embeddings of 4,096 numbers are 180 MB of JSON."""


class Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes


async def fetch(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Headers | None = None,
    body: bytes = b"",
    deadline_s: float,
    max_bytes: int = MAX_JSON_BYTES,
    kept: Kept | None = None,
) -> Answer:
    """One whole answer. Cancel-safe: a cancelled wait closes the connection. `kept`: connections
    that may be used again.

    Raises:
        OllamaDistributedError: as `request`; `DeadlineExceeded` after `deadline_s`;
            `EngineError` for a body over `max_bytes`.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    chunks: list[bytes] = []
    status_and_headers: list[tuple[int, dict[str, str]]] = []
    size = 0

    def on_body(data: bytes) -> None:
        nonlocal size
        size += len(data)
        if size > max_bytes:
            exchange.cancel()
            on_error(EngineError(f"{address} answered {path} with more than {max_bytes} B"))
        else:
            chunks.append(data)

    def on_error(error: OllamaDistributedError) -> None:
        if not ended.done():
            ended.set_exception(error)

    has_body = bool(body) or method in ("POST", "PUT", "PATCH")
    exchange = Route(address, method, path, headers, body=has_body, kept=kept).send(
        body,
        on_head=lambda status, fields: status_and_headers.append((status, dict(fields))),
        on_body=on_body,
        on_end=lambda: None if ended.done() else ended.set_result(None),
        on_error=on_error,
        connect_deadline_s=deadline_s,
    )
    try:
        async with asyncio.timeout(deadline_s):
            await ended
    except TimeoutError as exc:
        raise DeadlineExceeded(f"{address} did not answer {path} within {deadline_s:g} s") from exc
    finally:
        exchange.cancel()
        if ended.done() and not ended.cancelled():
            ended.exception()  # mark as seen when the deadline won the race
    status, fields = status_and_headers[-1]
    return Answer(status, fields, b"".join(chunks))


async def fetch_json(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Headers | None = None,
    body: Any = None,
    deadline_s: float,
    max_bytes: int = MAX_JSON_BYTES,
    kept: Kept | None = None,
) -> tuple[int, Any]:
    """As `fetch`, with `body` (None: none) and the answer as JSON values.

    Raises:
        EngineError: the answer is not JSON.
    """
    answer = await fetch(
        address,
        method,
        path,
        headers=headers,
        body=b"" if body is None else msgspec.json.encode(body),
        deadline_s=deadline_s,
        max_bytes=max_bytes,
        kept=kept,
    )
    try:
        return answer.status, msgspec.json.decode(answer.body) if answer.body else None
    except msgspec.DecodeError as exc:
        raise EngineError(f"{address} answered {path} with status {answer.status} and no JSON") from exc
