"""The hot path without ASGI: inference routes go from the HTTP parser straight to the core.

An exchange is driven by the parser's callbacks and writes to the transport itself: no task,
no event, no message dicts. Everything else, and a hot request that was pipelined behind
another, takes the ordinary way through ASGI. `HotCycle` stands in for uvicorn's cycle of
one request, so that the parent's bookkeeping (pipelining, shutdown, disconnect) holds.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.core import Exchange
from ollama_distributed.gateway.gate import read_head
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.out import RawHeaders
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.gateway.protocol import LimitedProtocol, bounded_by
from ollama_distributed.gateway.summary import Summary

_CLOSE = (b"connection", b"close")
_MOST_WAITING_BYTES = 64 * 1024
"""Written at once, so that the transport can tell that its reader is slow."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:  # 499 has no name in the standard
        phrase = "Error"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


_STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class HotCycle:
    """One answer on the wire: the core's `Out`, and uvicorn's idea of a request in progress."""

    __slots__ = (
        "_chunked",
        "_head",
        "_pieces",
        "_pieces_bytes",
        "_protocol",
        "disconnected",
        "exchange",
        "keep_alive",
        "message_event",
        "response_complete",
        "response_started",
    )

    message_event: asyncio.Event

    def __init__(self, protocol: FastProtocol, *, keep_alive: bool, chunked: bool) -> None:
        self._protocol = protocol
        self._chunked = chunked
        self._head = b""
        self._pieces: list[bytes] = []
        self._pieces_bytes = 0
        self.keep_alive = keep_alive
        self.exchange: Exchange | None = None
        self.response_started = False
        self.response_complete = False
        self.disconnected = False
        self.message_event = protocol.no_event

    def respond(self, status: int, headers: RawHeaders, body: bytes) -> None:
        self._protocol.transport.write(self._make_head(status, headers) + body)
        self._complete()

    def start(self, status: int, headers: RawHeaders) -> None:
        if self._chunked:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        else:  # HTTP/1.0: the end of the connection ends the body
            self.keep_alive = False
        self._head = self._make_head(status, headers)

    def write(self, data: bytes) -> None:
        """What comes in one turn of the loop leaves in one write, each piece as a chunk of its own.

        Ollama sends each line so, and there are clients that take a chunk for a line.
        """
        pieces = self._pieces
        if not pieces:
            self._protocol.loop.call_soon(self._flush)
        pieces.append(data)
        self._pieces_bytes += len(data)
        if self._pieces_bytes > _MOST_WAITING_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pieces and not self.disconnected:
            self._send(b"")

    def _send(self, last: bytes) -> None:
        """What waits, as the wire has it, then `last`."""
        pieces = self._pieces
        if self._chunked:
            data = b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece])
        else:
            data = b"".join(pieces)
        pieces.clear()
        self._pieces_bytes = 0
        data = b"".join((self._head, data, last))
        self._head = b""
        if data:
            self._protocol.transport.write(data)

    def end(self) -> None:
        self._send(b"0\r\n\r\n" if self._chunked else b"")
        self._complete()

    def _make_head(self, status: int, headers: RawHeaders) -> bytes:
        self.response_started = True
        if not self.keep_alive and _CLOSE not in headers:
            headers = [*headers, _CLOSE]
        elif _CLOSE in headers:
            self.keep_alive = False
        lines = [b"%b: %b\r\n" % field for field in headers]
        return b"".join((_STATUS_LINES[status], self._protocol.default_head(), *lines, b"\r\n"))

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._protocol.finish()
        self._protocol.hot_complete(self)


class FastProtocol(LimitedProtocol):
    """`LimitedProtocol` with the short way for hot routes."""

    hot: HotPath
    no_event: asyncio.Event
    """Nobody waits for the message event of a hot cycle; one serves all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: HotCycle | None = None
        """The hot cycle that is not complete."""
        self._feeding: HotCycle | None = None
        """The hot cycle whose body the parser reads."""
        self._default: tuple[Any, bytes] = (None, b"")

    # ── parser ──────────────────────────────────────────────────────────────────────

    def on_headers_complete(self) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        busy = self.cycle is not None and not self.cycle.response_complete
        # Other methods than POST are refused anyway; HEAD has rules of its own for that.
        if busy or self.parser.get_method() != b"POST" or not self.hot.serves(path):
            self._feeding = None
            super().on_headers_complete()
            return
        self.begin_body()
        version = self.parser.get_http_version()
        cycle = HotCycle(
            self,
            keep_alive=version != "1.0" and self.parser.should_keep_alive() and not self.overload.closing,
            chunked=version != "1.0",
        )
        self.cycle = cycle  # type: ignore[assignment]  # it has what the parent uses of a cycle
        self._running = self._feeding = cycle
        head = read_head(
            "POST", path, self.headers, self.client[0] if self.client else None, self.scheme or "http"
        )
        cycle.exchange = self.hot.open(head, cycle)
        if self.stranger and not cycle.exchange.ended:
            self.met()
        if self.flow.write_paused:  # an earlier answer still waits for its reader
            cycle.exchange.pause()
        if self.expect_100_continue and not cycle.exchange.ended:
            self.transport.write(_CONTINUE)

    def on_body(self, body: bytes) -> None:
        if self._feeding is None:
            super().on_body(body)
        elif self._feeding.exchange is not None:
            self._feeding.exchange.receive(body)

    def on_message_complete(self) -> None:
        feeding, self._feeding = self._feeding, None
        if feeding is None:
            super().on_message_complete()
            return
        self.body_complete()
        if feeding.exchange is not None:
            feeding.exchange.body_complete()

    # ── transport ───────────────────────────────────────────────────────────────────

    def abandon(self) -> None:
        running, self._running = self._running, None
        if running is not None and running.exchange is not None:
            running.disconnected = True
            running.exchange.disconnected()
        super().abandon()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._running is not None and self._running.exchange is not None:
            self._running.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._running is not None and self._running.exchange is not None:
            self._running.exchange.resume()

    def refused(self, error: OllamaDistributedError, status: int, own_id: RequestId) -> None:
        self.hot.means.observe(
            Summary(
                request_id=own_id,
                method="",
                route="connection",
                status=status,
                outcome="error",
                error_code=error.code,
                took_s=0.0,
            )
        )

    # ── the cycle's side ────────────────────────────────────────────────────────────

    def hot_complete(self, cycle: HotCycle) -> None:
        cycle.exchange = None  # each holds the other: without this, only the collector frees them
        if self._running is cycle:
            self._running = None
        self.on_response_complete()

    def default_head(self) -> bytes:
        """uvicorn's own headers (the date); the server makes a new list each second."""
        fields = self.server_state.default_headers
        if self._default[0] is not fields:
            self._default = (fields, b"".join(b"%b: %b\r\n" % field for field in fields))
        return self._default[1]


def fast_protocol_class(hot: HotPath, limits: Limits, overload: Overload | None = None) -> type[FastProtocol]:
    """A protocol for `uvicorn.Config(http=...)`, with limits and a watch of its own."""
    shared = bounded_by(limits, overload or Overload())
    return type("NodeProtocol", (FastProtocol,), {**shared, "hot": hot, "no_event": asyncio.Event()})
