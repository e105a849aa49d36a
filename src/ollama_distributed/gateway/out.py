"""Where an answer goes, and the headers that any answer may need."""

from __future__ import annotations

import functools
from typing import Protocol

from ollama_distributed.gateway.dialects.contract import ErrorResponse

RawHeaders = list[tuple[bytes, bytes]]

STREAM_HEADERS: RawHeaders = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""No cache may keep an answer that is read as it grows, and nginx may not hold it back."""


class Out(Protocol):
    """Where an answer goes; called on the event loop, never blocks."""

    def respond(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """A whole answer; `headers` hold its Content-Length."""
        ...

    def start(self, status: int, headers: RawHeaders) -> None:
        """The head of a streamed answer."""
        ...

    def write(self, data: bytes) -> None: ...

    def end(self) -> None: ...


_FAILOVERS = b"x-ollama-failovers"
_LEFT = (
    name
    for what in ("requests", "tokens")
    for part in ("limit", "remaining", "reset")
    for name in (f"x-ratelimit-{part}-{what}", f"anthropic-ratelimit-{what}-{part}")
)
_EXPOSED = ", ".join(
    (
        *("x-request-id", "request-id", "x-ollama-node", "x-ollama-route", "x-ollama-failovers"),
        *("x-queue-position", "x-queue-eta", "retry-after", "x-should-retry"),
        *_LEFT,
    )
).encode()
"""Headers of ours that scripts of other origins may read."""


def id_headers(request_id: str, *, anthropic: bool) -> RawHeaders:
    """Which request this answers; clients of Anthropic's read it by another name than all others."""
    value = request_id.encode("ascii")
    named: RawHeaders = [(b"x-request-id", value)]
    return [*named, (b"request-id", value)] if anthropic else named


def with_moves(headers: RawHeaders, moves: int) -> RawHeaders:
    """How often the answer went on at another node because its own was lost."""
    return [one for one in headers if one[0] != _FAILOVERS] + [(_FAILOVERS, b"%d" % moves)]


def cors_headers(origin: str) -> RawHeaders:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"origin"),
    ]


@functools.lru_cache(maxsize=256)
def node_header(node: str) -> tuple[tuple[bytes, bytes], ...]:
    """Which node answered; nothing for a name that a header cannot carry."""
    if not (node and node.isascii() and node.isprintable()):
        return ()
    return ((b"x-ollama-node", node.encode("ascii")),)


@functools.lru_cache(maxsize=64)
def route_header(reason: str) -> tuple[bytes, bytes]:
    """Why that node answered, in a word; empty: there was no choice."""
    return (b"x-ollama-route", (reason or "only").encode("ascii"))


def error_response_headers(rendered: ErrorResponse, *, close: bool) -> RawHeaders:
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in rendered.headers]
    if close:
        headers.append((b"connection", b"close"))
    return headers
