"""One request to an engine and its answer, on a connection of its own or on one that was kept.

Knows nothing of what the bodies mean; `http.py` makes the requests. RFC 9112.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import httptools

from ollama_distributed.adapters.engines.addresses import (
    Address,
    Headers,
    TcpAddress,
    UnixAddress,
    headers_of,
)
from ollama_distributed.adapters.engines.dial import Ahead, dialled
from ollama_distributed.adapters.engines.intake import Intake
from ollama_distributed.adapters.engines.kept import Connection, Kept
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    EngineError,
    Internal,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
)

MAX_HEAD_BYTES = 65_536
"""Status line and headers of an answer; real ones stay under 1 KiB."""
_SIZE_BYTES = 10
"""Of the line before a chunk; what is longer is for the parser."""
LEAVE_S = 1.0
"""For the last bytes of an answer, so that its connection can be kept."""
_CODING_LENGTH, _LENGTH_LENGTH = len(b"transfer-encoding"), len(b"content-length")


class Exchange:
    """One request and its answer. Exactly one of `on_end`, `on_error` is called, as the
    last call; none comes after `cancel()` and `leave()`."""

    __slots__ = (
        "_address",
        "_ahead",
        "_between_chunks",
        "_chunk_over",
        "_chunked",
        "_complete",
        "_connect_deadline_s",
        "_connecting",
        "_connection",
        "_descriptor",
        "_dialled",
        "_done",
        "_ended_by_close",
        "_fields",
        "_head_bytes",
        "_idle_deadline_s",
        "_idle_timer",
        "_in_head",
        "_informational",
        "_intake",
        "_kept",
        "_last_byte_at",
        "_leaving",
        "_on_body",
        "_on_end",
        "_on_error",
        "_on_head",
        "_parser",
        "_paused",
        "_reused",
        "_to_send",
        "_transport",
        "_unsent",
        "status",
    )

    def __init__(
        self,
        address: Address,
        head_and_body: bytes,
        *,
        on_head: Callable[[int, Headers], None] | None,
        on_body: Callable[[bytes], None],
        on_end: Callable[[], None],
        on_error: Callable[[OllamaDistributedError], None],
        connect_deadline_s: float,
        idle_deadline_s: float | None,
        kept: Kept | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """`kept`: connections that may be used again. `ahead`: without them, one that may be open already."""
        self._address = address
        self._to_send = self._unsent = head_and_body
        """All, while it may have to go out again; and what is not on its way."""
        self._on_head = on_head
        self._on_body = on_body
        self._on_end = on_end
        self._on_error = on_error
        self._connect_deadline_s = connect_deadline_s
        self._idle_deadline_s = idle_deadline_s
        self._kept = kept
        self._ahead = ahead

        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        """Of the connection, until that is lost or given back."""
        self.status = 0
        """Of the answer, once its head is here."""
        self._chunk_over = False
        """The parser has read the last byte of a chunk, or of the head."""
        self._informational = False
        self._paused = False
        self._intake: Intake | None = None
        self._descriptor = -1
        """Descriptor, where `_intake` says when it can be read."""
        self._done = False
        self._leaving: asyncio.TimerHandle | None = None
        """The caller has what it wanted; the connection is kept if the rest comes before this."""
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._dialled: socket.socket | None = None
        """Until it has a transport."""
        self._begin()
        connection = kept.take() if kept is not None else None
        self._reused = connection is not None
        if connection is None:
            self._connect_anew()
        else:
            connection.user = self
            self.connected(connection)

    def _begin(self) -> None:
        """Of an answer nothing was read."""
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        """None: it is over."""
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._in_head = True
        self._chunked = False
        self._between_chunks = False
        """The parser read the end of a chunk and nothing beyond it: what comes next begins one."""
        self._ended_by_close = False
        self._complete = False
        """All of it was read."""

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Asked for where it is needed: to ask takes a call of the kernel."""
        return asyncio.get_running_loop()

    def _connect_anew(self) -> None:
        self._unsent = self._to_send
        if type(self._address) is UnixAddress:
            self._dialled, self._unsent, self._reused = dialled(
                self._address.path, self._to_send, self._ahead
            )
            self._ahead = None
        self._connecting = self._loop.create_task(self._connect(), name=f"connect {self._address}")

    # ── for the caller ──────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        """Close the connection; idempotent. The peer sees it at its next read or write."""
        if not self._done:
            self._close()

    def leave(self) -> None:
        """Nothing more is wanted of an answer that is about to end; idempotent. A connection that
        can be kept is kept when the end is there, any other is closed."""
        if self._done:
            return
        if self._kept is None or self._paused:
            self._close()
            return
        self._done = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._leaving = self._loop.call_later(LEAVE_S, self._close)

    def pause(self) -> None:
        """Stop reading. At most one read (256 KiB) that is already here is still delivered."""
        self._paused = True
        if self._done:
            return
        if self._intake is not None:
            self._intake.remove(self._descriptor)
        elif self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        self._paused = False
        if self._idle_timer is not None:
            self._last_byte_at = self._loop.time()
        if self._done:
            return
        if self._intake is not None:
            self._intake.remove(self._descriptor)
            self._intake.add(self._descriptor, self.data_received, self._cut)
        elif self._transport is not None:
            self._transport.resume_reading()

    def read_by(self, intake: Intake) -> None:
        """From now on it is read when `intake` says so; not over TLS."""
        if self._done or self._transport is None or self._intake is not None:
            return
        self._transport.pause_reading()
        self._intake = intake
        self._descriptor = self._transport.get_extra_info("socket").fileno()
        if not self._paused:
            intake.add(self._descriptor, self.data_received, self._cut)

    # ── connecting ──────────────────────────────────────────────────────────────────

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._connect_deadline_s):
                match self._address:
                    case UnixAddress(path):
                        made, self._dialled = self._dialled, None
                        where = path if made is None else None
                        await self._loop.create_unix_connection(lambda: Connection(self), where, sock=made)
                    case TcpAddress(host, port, tls):
                        await self._loop.create_connection(lambda: Connection(self), host, port, ssl=tls)
        except TimeoutError as exc:
            self._fail(Unavailable(f"{self._address} did not take the connection in time"), exc)
        except OSError as exc:  # ssl.SSLError is one
            self._fail(Unavailable(f"cannot connect to {self._address}: {exc.strerror or exc}"), exc)

    def connected(self, connection: Connection) -> None:
        self._connection = connection
        self._transport = transport = connection.transport
        if self._done:
            transport.abort()
            return
        transport.write(self._unsent)
        self._unsent = b""
        if not self._reused:
            self._to_send = b""
        if self._paused:
            transport.pause_reading()
        if self._idle_deadline_s is not None:
            self._last_byte_at = self._loop.time()
            self._idle_timer = self._loop.call_later(self._idle_deadline_s, self._check_idle)

    def _check_idle(self) -> None:
        """One timer that moves itself: a timer per chunk would cost more than the chunk."""
        assert self._idle_deadline_s is not None
        now = self._loop.time()
        if self._paused:
            self._last_byte_at = now
        left_s = self._last_byte_at + self._idle_deadline_s - now
        if left_s > 0:
            self._idle_timer = self._loop.call_later(left_s, self._check_idle)
        else:
            self._fail(DeadlineExceeded(f"{self._address} sent nothing for {self._idle_deadline_s:g} s"))

    # ── reading ─────────────────────────────────────────────────────────────────────

    def _cut(self, exc: OSError | None) -> None:
        """Its end was read here: the transport, which does not read, does not know."""
        transport = self._transport
        self.connection_lost(exc)
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None:
            return
        if self._idle_timer is not None:
            self._last_byte_at = self._loop.time()
        if self._between_chunks:
            try:
                data = self._past_whole_chunks(data)
            except Exception as exc:
                self._fail(Internal("a callback failed on an engine's answer"), exc)
            if (self._done and self._leaving is None) or not data:
                return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            parser.feed_data(data)
            self._between_chunks = self._chunk_over and self._chunked and data.endswith(b"\r\n")
        except httptools.HttpParserCallbackError as exc:
            self._fail(Internal("a callback failed on an engine's answer"), exc.__context__ or exc)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(EngineError(f"{self._address} answered no valid HTTP: {exc}"), exc)
        if self._complete:
            self._finish()
        elif self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(EngineError(f"{self._address} answered with a head over {MAX_HEAD_BYTES} B"))

    def _past_whole_chunks(self, data: bytes) -> bytes:
        """Deliver those that `data` begins with, together; the rest. A server that streams sends each
        token as a chunk of its own: they go past the parser, which waits for the size of one before
        and after them."""
        at, length = 0, len(data)
        parts: list[bytes] = []
        try:
            while at < length:
                begin = data.index(b"\r\n", at, at + _SIZE_BYTES) + 2
                end = begin + int(data[at:begin], 16)
                if end <= begin or data[end : end + 2] != b"\r\n":
                    break
                parts.append(data[begin:end])
                at = end + 2
        except ValueError:
            pass  # no line with a size (RFC 9112 7.1): the parser finds what it is
        if parts and not self._done:
            self._on_body(parts[0] if len(parts) == 1 else b"".join(parts))
        return data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done:
            self._transport = None
            self._close()
        elif self._ended_by_close and exc is None and not self._in_head:
            self._transport = None
            self._finish()
        elif self._reused and self._in_head and not self._head_bytes:
            # The server closed it while it lay idle: not a byte of an answer, so it goes out again.
            self._reused, self._transport = False, None
            self._begin()
            self._connect_anew()
        else:
            self._fail(RunnerDied(f"{self._address} closed the connection in the middle of the answer"), exc)

    # httptools calls these while `feed_data` runs.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self._parser is None:  # the caller cancelled, and there is more in what was read
            return
        self.status = status = self._parser.get_status_code()
        self._to_send = b""
        fields, self._fields = self._fields, []
        if 100 <= status < 200:
            self._informational = True
            return
        self._in_head = False
        sized = self._chunked = False
        for name, value in fields:
            size = len(name)
            if size == _CODING_LENGTH and name.lower() == b"transfer-encoding":
                self._chunked = b"chunked" in value.lower()
            elif size == _LENGTH_LENGTH and name.lower() == b"content-length":
                sized = True
        self._chunk_over = self._chunked
        self._ended_by_close = not (sized or self._chunked)
        if self._on_head is not None and not self._done:
            self._on_head(status, headers_of(fields))

    def on_body(self, data: bytes) -> None:
        if not self._done:
            self._on_body(data)

    def on_chunk_header(self) -> None:
        self._chunk_over = False

    def on_chunk_complete(self) -> None:
        self._chunk_over = True

    def on_message_begin(self) -> None:
        if self._complete:  # more than was asked for: not a connection to trust
            self._kept = None

    def on_message_complete(self) -> None:
        if self._informational:
            self._informational = False
            return
        self._complete = True
        if self._parser is not None and self._kept is not None and not self._parser.should_keep_alive():
            self._kept = None

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _finish(self) -> None:
        done = self._done
        if done and self._leaving is None:
            return
        if self._kept is not None and self._complete:
            self._keep(self._kept)
        else:
            self._close()
        if not done:
            self._on_end()

    def _keep(self, kept: Kept) -> None:
        """The connection takes the next request."""
        transport, self._transport = self._transport, None
        connection, self._connection = self._connection, None
        self._connecting = None  # it may still be about to return, and a cancelled one closes what it made
        if transport is not None and connection is not None:
            if self._intake is not None:
                self._intake.remove(self._descriptor)
            if self._intake is not None or self._paused:
                transport.resume_reading()
            kept.give(connection)
        self._close()

    def _fail(self, error: OllamaDistributedError, cause: BaseException | None = None) -> None:
        if self._done:
            self._close()
            return
        error.__cause__ = cause
        self._close()
        self._on_error(error)

    def _close(self) -> None:
        self._done = True
        # It holds this in its turn: all that a request was would be left to the collector.
        self._parser = None
        if self._intake is not None:
            self._intake.remove(self._descriptor)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self._transport is not None:
            # abort, not close: unsent request bytes must not keep a cancelled request alive
            self._transport.abort()
        elif self._connecting is not None and self._connecting is not asyncio.current_task(self._loop):
            self._connecting.cancel()
            if self._dialled is not None:  # it had not begun
                self._dialled.close()
