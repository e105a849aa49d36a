"""HTTP/1.1 under limits: uvicorn's protocol with deadlines, head limits and a connection cap.

uvicorn 0.54 has no deadline for a head or a body, takes a head of any size and lets a slow
reader hold its slot for ever (`reference/security.md`, 3). This subclass adds what is
missing; all connections share one timer, so a request costs no timer of its own. The class
it extends is half private: uvicorn is pinned to one minor version.

A connection is in one phase at a time:

    idle -> head -> body -> answering -> idle
    any  -> lingering -> closed

and each phase has its own deadline. Parser errors (two lengths, a length and chunks, bad
syntax) are 400 and the end of the connection. Who is refused while it still sends would
see a reset in place of the answer if the socket were closed at once, so the connection
lingers: our side is shut, what comes is dropped, within bounds.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ollama_distributed.base.errors import (
    HeadersTooLarge,
    Malformed,
    OllamaDistributedError,
    RequestTimeout,
    Unavailable,
)
from ollama_distributed.base.events import PATH as SOCKET_PATH
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.connections import MET, Watch, origin_of
from ollama_distributed.gateway.errors import render_seed
from ollama_distributed.gateway.gate import request_id
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.overload import Overload

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

_UPLOADS = (b"/api/blobs/", b"/api/v1/bundles", b"/v1/files")
"""Bodies of any length: no total deadline, only the rate."""


class Phase(enum.Enum):
    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWERING = enum.auto()
    LINGERING = enum.auto()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Make a subclass with `protocol_class` and give that to uvicorn."""

    limits: Limits
    watch: Watch
    overload = Overload()
    """Where nobody measures, nothing is given up."""
    counts_strangers = False
    """Where nobody has shown a certificate before the first request."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.phase = Phase.HEAD
        self._since = 0.0
        """When the phase began."""
        self._head_bytes = 0
        self._head_size = 0
        self._refusal: OllamaDistributedError | None = None
        self._window_start = 0.0
        self._window_bytes = 0
        self._upgrading = False
        """What the parser reads asks for a WebSocket, and gets one."""
        self._asgi_cycle: RequestResponseCycle | None = None
        """The last that was started: `cycle` may be one that waits behind it."""
        self._cycle_transport: Any = _CycleTransport(self)
        self._slow_since: float | None = None
        self._slow_unsent = 0
        self.stranger = False
        """No request has passed the gate yet, and one should."""

    # ── transport ───────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # the port is TCP's
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.stream_buffer_bytes)
        self._since = self.loop.time()
        origin = origin_of(self.client[0]) if self.counts_strangers and self.client else ""
        self.stranger = bool(origin)
        if not self.watch.add(self, origin):
            self.refuse(Unavailable("too many connections; try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.remove(self)
        self.abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused: what still comes is not read
        if self.phase is Phase.LINGERING:
            self._window_bytes += len(data)
            if self._window_bytes > self.limits.linger_bytes:
                self.transport.close()
            return
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEAD)
        elif self.phase is Phase.BODY:
            self._window_bytes += len(data)
        in_head = self.phase is Phase.HEAD
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.refuse(self._refusal or Malformed("the request is not valid HTTP/1.1"))
            return
        except httptools.HttpParserUpgrade:
            if self._upgrading:
                self.watch.remove(self)
                self.handle_websocket_upgrade()
                return
            # An offer (h2c) that we leave unanswered, as RFC 9110 7.8 allows. The parser
            # stops there, so the connection ends with this answer.
            if self.cycle is not None:
                self.cycle.keep_alive = False
        if in_head and self.phase is Phase.HEAD:  # one field may come in many pieces
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.header_bytes:
                self.refuse(self._too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow_since = self.loop.time()
        self._slow_unsent = self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._slow_since = None

    # ── parser ──────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if self.is_over():  # pipelined behind what ended the connection: stop the parser
            raise Malformed("the connection ended with the answer before this request")
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._upgrading = False
        self._enter(Phase.HEAD)
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head_size += len(url)
        if self._head_size > self.limits.header_bytes:
            self._refuse_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As the parent, in one call a field, with the limits."""
        self._head_size += len(name) + len(value) + 4
        if self.phase is not Phase.HEAD:  # a trailer: counted, but never a header (RFC 9110 6.5.1)
            if self._head_size > self.limits.header_bytes:
                self._refuse_head()
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        headers = self.headers
        headers.append((name, value))
        if self._head_size > self.limits.header_bytes or len(headers) > self.limits.header_fields:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._upgrading = self.parser.should_upgrade() and self._wants_socket()
        self.begin_body()
        self._make_scope()
        super().on_headers_complete()
        if not self._upgrading:
            self.cycle.transport = self._cycle_transport
            if self.overload.closing:
                self.cycle.keep_alive = False

    def _make_scope(self) -> None:
        """The parent makes it as a message begins; the short way of hot routes needs none."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        if self.stranger:
            scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # a TypedDict, with our own extension
            scope["extensions"] = {**scope.get("extensions", {}), MET: self.met}

    def met(self) -> None:
        """A request of this connection has passed the gate. Idempotent."""
        self.stranger = False
        self.watch.knows(self)

    def _wants_socket(self) -> bool:
        """At the one path that has them, and not behind a request that is not answered yet."""
        return (
            super()._should_upgrade()
            and self.url.partition(b"?")[0] == SOCKET_PATH.encode("ascii")
            and self.parser.get_method() == b"GET"
            and (self.cycle is None or self.cycle.response_complete)
        )

    def _should_upgrade(self) -> bool:
        return self._upgrading

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self.body_complete()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._asgi_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """As the parent, but the watch keeps the idle deadline: no timer for each request."""
        self.server_state.total_requests += 1
        if self.is_over():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self.phase is Phase.ANSWERING:
            self._enter(Phase.IDLE)

    def begin_body(self) -> None:
        self._enter(Phase.BODY)
        self._window_start = self._since
        self._window_bytes = 0

    def body_complete(self) -> None:
        if self.phase is Phase.LINGERING:  # it was all here: nothing is left to wait for
            self.transport.close()
            return
        # The answer may be complete already: a refusal does not wait for the body.
        self._enter(Phase.IDLE if self.cycle.response_complete else Phase.ANSWERING)

    # ── the end ─────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        """End the connection once what was written has left."""
        if self.is_over():
            return
        if self.phase in (Phase.IDLE, Phase.ANSWERING) or not self.watch.holds(self):
            self.transport.close()
            return
        self.abandon()
        self._enter(Phase.LINGERING)
        self._window_bytes = 0
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def abandon(self) -> None:
        """What runs for this connection has no reader any more. Idempotent."""
        cycle = self._asgi_cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    def is_over(self) -> bool:
        """Nothing more may be written."""
        return self.phase is Phase.LINGERING or self.transport.is_closing()

    # ── limits ──────────────────────────────────────────────────────────────────────

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._since = self.loop.time()
        self._head_bytes = 0

    def _refuse_head(self) -> NoReturn:
        """Stop the parser; `data_received` answers."""
        self._refusal = self._too_large()
        raise self._refusal

    def _too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"the request head is larger than {self.limits.header_bytes} bytes "
            f"or {self.limits.header_fields} fields"
        )

    def check_deadlines(self, now: float) -> None:
        """Called by the watch about once a second."""
        limits = self.limits
        if self._slow_since is not None:
            self._check_reader(now)
            return
        waited = now - self._since
        if self.phase is Phase.HEAD:
            if waited > limits.header_deadline_s:
                self.refuse(RequestTimeout("the request head took too long"))
        elif self.phase is Phase.BODY:
            self._check_body(now, waited)
        elif (self.phase is Phase.IDLE and (waited > limits.idle_s or self.overload.closing)) or (
            self.phase is Phase.LINGERING and waited > limits.linger_s
        ):
            self.transport.close()

    def _check_body(self, now: float, waited: float) -> None:
        limits = self.limits
        if self.flow.read_paused:  # we are the slow side
            self._since = self._window_start = now
            self._window_bytes = 0
            return
        if waited > limits.body_deadline_s and not self.url.startswith(_UPLOADS):
            self.refuse(RequestTimeout("the request body took too long"))
        elif now - self._window_start >= limits.body_rate_window_s:
            if self._window_bytes < limits.body_rate_bytes_s * limits.body_rate_window_s:
                self.refuse(RequestTimeout("the request body comes too slowly"))
            self._window_start, self._window_bytes = now, 0

    def _check_reader(self, now: float) -> None:
        """Cut a client that takes less than the least rate; its generation is cancelled."""
        assert self._slow_since is not None
        if now - self._slow_since < self.limits.reader_deadline_s:
            return
        unsent = self.transport.get_write_buffer_size()
        least = self.limits.body_rate_bytes_s * self.limits.reader_deadline_s
        if self._slow_unsent - unsent < least:
            self.transport.abort()
            return
        self._slow_since, self._slow_unsent = now, unsent

    def refuse(self, error: OllamaDistributedError) -> None:
        """Answer with an error if no answer has begun, and close."""
        if self.is_over():
            return
        own_id = request_id({})
        rendered = render_seed(error, own_id)
        self.refused(error, rendered.status, own_id)
        if not self.answer_began():
            self.transport.write(
                b"".join(
                    (
                        STATUS_LINE.get(rendered.status, b"HTTP/1.1 400 Bad Request\r\n"),
                        b"content-type: application/json; charset=utf-8\r\n",
                        b"x-content-type-options: nosniff\r\n",
                        b"content-length: %d\r\nconnection: close\r\n\r\n" % len(rendered.body),
                        rendered.body,
                    )
                )
            )
        self.finish()

    def refused(self, error: OllamaDistributedError, status: int, own_id: RequestId) -> None:
        """Hook: this connection ends with an error that no request's own log line tells."""

    def answer_began(self) -> bool:
        """Whether bytes of an answer that is not complete have left."""
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete


class _CycleTransport:
    """What uvicorn's cycle of one request writes to; its close goes through `finish`."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: LimitedProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        if not self._protocol.is_over():
            self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.is_over()

    def close(self) -> None:
        self._protocol.finish()


def protocol_class(limits: Limits, overload: Overload | None = None) -> type[LimitedProtocol]:
    """A protocol for `uvicorn.Config(http=...)`, with limits and a watch of its own."""
    return type("NodeProtocol", (LimitedProtocol,), bounded_by(limits, overload or Overload()))


def bounded_by(limits: Limits, overload: Overload) -> dict[str, Any]:
    """What the connections of one listener share."""
    return {
        "limits": limits,
        "overload": overload,
        "watch": Watch(limits, overload),
        "counts_strangers": True,
    }
