"""HTTP/1.1 client for engines: one request a connection, callbacks, UNIX sockets, TCP or TLS.

Lean on purpose. llama-server breaks up to a fifth of the requests that reuse a connection
after a stream (DESIGN.md, trap 4), so every request says `Connection: close`; a new local
connection costs 0.1-0.2 ms. Callbacks instead of async iterators save a task switch per
chunk of the answer.

    exchange = request(UnixAddress("/run/x.sock"), "POST", "/completion", body=b"{}",
                       on_head=..., on_body=..., on_end=..., on_error=...)
    exchange.cancel()                                  # closes the connection

It knows nothing of what the bodies mean. RFC 9112.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from typing import cast

import httptools
import msgspec

from ollama_distributed.adapters.engines.intake import Intake
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
CONNECT_DEADLINE_S = 5.0
_READ_BYTES = 65_536
_SIZE_BYTES = 10
"""Of the line before a chunk; what is longer is for the parser."""


class UnixAddress(msgspec.Struct, frozen=True):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: ssl.SSLContext | None = None
    """Set: TLS, the certificate checked against `host` as the context says."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


Address = UnixAddress | TcpAddress
Headers = Mapping[str, str]
"""Names in lower case; of a repeated header the values joined by a comma."""


class Exchange(asyncio.Protocol):
    """One request and its answer. Exactly one of `on_end`, `on_error` is called, as the
    last call; none comes after `cancel()`."""

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
    ) -> None:
        self._address = address
        self._to_send = head_and_body
        self._on_head = on_head
        self._on_body = on_body
        self._on_end = on_end
        self._on_error = on_error
        self._connect_deadline_s = connect_deadline_s
        self._idle_deadline_s = idle_deadline_s

        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._in_head = True
        self._chunked = False
        self._chunk_over = False
        """The parser has read the last byte of a chunk, or of the head."""
        self._between_chunks = False
        """And nothing beyond it: what comes next begins a chunk."""
        self._informational = False
        self._ended_by_close = False
        self._paused = False
        self._intake: Intake | None = None
        self._connection = -1
        """Descriptor, where `_intake` says when it can be read."""
        self._done = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._last_byte_at = self._loop.time()
        self._connecting = self._loop.create_task(self._connect(), name=f"connect {address}")

    # ── for the caller ──────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        """Close the connection; idempotent. The peer sees it at its next read or write."""
        if not self._done:
            self._close()

    def pause(self) -> None:
        """Stop reading. At most one read (256 KiB) that is already here is still delivered."""
        self._paused = True
        if self._done:
            return
        if self._intake is not None:
            self._intake.remove(self._connection)
        elif self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        self._paused = False
        self._last_byte_at = self._loop.time()
        if self._done:
            return
        if self._intake is not None:
            self._intake.remove(self._connection)
            self._intake.add(self._connection, self._read)
        elif self._transport is not None:
            self._transport.resume_reading()

    def read_by(self, intake: Intake) -> None:
        """From now on it is read when `intake` says so; not over TLS."""
        if self._done or self._transport is None or self._intake is not None:
            return
        self._transport.pause_reading()
        self._intake = intake
        self._connection = self._transport.get_extra_info("socket").fileno()
        if not self._paused:
            intake.add(self._connection, self._read)

    # ── connecting ──────────────────────────────────────────────────────────────────

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._connect_deadline_s):
                match self._address:
                    case UnixAddress(path):
                        await self._loop.create_unix_connection(lambda: self, path)
                    case TcpAddress(host, port, tls):
                        await self._loop.create_connection(lambda: self, host, port, ssl=tls)
        except TimeoutError as exc:
            self._fail(Unavailable(f"{self._address} did not take the connection in time"), exc)
        except OSError as exc:  # ssl.SSLError is one
            self._fail(Unavailable(f"cannot connect to {self._address}: {exc.strerror or exc}"), exc)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._done:
            transport.abort()
            return
        transport.write(self._to_send)
        self._to_send = b""
        if self._paused:
            transport.pause_reading()
        self._last_byte_at = self._loop.time()
        if self._idle_deadline_s is not None:
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

    def _read(self) -> int:
        try:
            data = os.read(self._connection, _READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError as exc:
            self.connection_lost(exc)
            return 0
        if data:
            self.data_received(data)
        else:
            self.connection_lost(None)
        return len(data)

    def data_received(self, data: bytes) -> None:
        if self._done:
            return
        if self._idle_timer is not None:
            self._last_byte_at = self._loop.time()
        if self._between_chunks:
            try:
                data = self._past_whole_chunks(data)
            except Exception as exc:
                self._fail(Internal("a callback failed on an engine's answer"), exc)
            if self._done or not data:
                return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            self._between_chunks = self._chunk_over and self._chunked and data.endswith(b"\r\n")
        except httptools.HttpParserCallbackError as exc:
            self._fail(Internal("a callback failed on an engine's answer"), exc.__context__ or exc)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(EngineError(f"{self._address} answered no valid HTTP: {exc}"), exc)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(EngineError(f"{self._address} answered with a head over {MAX_HEAD_BYTES} B"))

    def _past_whole_chunks(self, data: bytes) -> bytes:
        """Deliver those that `data` begins with; the rest. A server that streams sends each token as
        a chunk of its own: they go past the parser, which waits for the size of one before and
        after them."""
        at = 0
        while not self._done:
            line_end = data.find(b"\r\n", at, at + _SIZE_BYTES)
            size = _size(data[at:line_end]) if line_end > 0 else 0
            end = line_end + 2 + size
            if size <= 0 or data[end : end + 2] != b"\r\n":
                break
            self._on_body(data[line_end + 2 : end])
            at = end + 2
        return data[at:]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done:
            return
        if self._ended_by_close and exc is None and not self._in_head:
            self._finish()
        else:
            self._fail(RunnerDied(f"{self._address} closed the connection in the middle of the answer"), exc)

    # httptools calls these while `feed_data` runs.

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._informational = True
            self._headers = {}
            return
        self._in_head = False
        self._chunked = self._chunk_over = "chunked" in self._headers.get("transfer-encoding", "")
        self._ended_by_close = "content-length" not in self._headers and not self._chunked
        if self._on_head is not None and not self._done:
            self._on_head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if not self._done:
            self._on_body(data)

    def on_chunk_header(self) -> None:
        self._chunk_over = False

    def on_chunk_complete(self) -> None:
        self._chunk_over = True

    def on_message_complete(self) -> None:
        if self._informational:
            self._informational = False
        elif not self._done:
            self._finish()

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _finish(self) -> None:
        self._close()
        self._on_end()

    def _fail(self, error: OllamaDistributedError, cause: BaseException | None = None) -> None:
        if self._done:
            return
        error.__cause__ = cause
        self._close()
        self._on_error(error)

    def _close(self) -> None:
        self._done = True
        if self._intake is not None:
            self._intake.remove(self._connection)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._transport is not None:
            # abort, not close: unsent request bytes must not keep a cancelled request alive
            self._transport.abort()
        elif self._connecting is not asyncio.current_task(self._loop):
            self._connecting.cancel()


def _size(field: bytes) -> int:
    """Of a chunk, in its first line; -1 for what is no plain number (RFC 9112 7.1)."""
    try:
        return int(field, 16)
    except ValueError:
        return -1


def request(
    address: Address,
    method: str,
    path: str,
    *,
    on_body: Callable[[bytes], None],
    on_end: Callable[[], None],
    on_error: Callable[[OllamaDistributedError], None],
    on_head: Callable[[int, Headers], None] | None = None,
    headers: Headers | None = None,
    body: bytes = b"",
    connect_deadline_s: float = CONNECT_DEADLINE_S,
    idle_deadline_s: float | None = None,
) -> Exchange:
    """Send a request; the answer comes to the callbacks, on the running loop.

    Errors: `Unavailable` (no connection), `RunnerDied` (closed half-way),
    `DeadlineExceeded` (silent for `idle_deadline_s` while not paused), `EngineError` (not
    HTTP). A status of 400 or more is no error here: it comes to `on_head`.
    """
    if not path.startswith("/") or not (method + path).isascii() or any(c <= " " for c in method + path):
        raise ValueError("method or path is not safe to send")
    host = "localhost" if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"
    fields = {"host": host, "connection": "close", "accept-encoding": "identity"}
    if body or method in ("POST", "PUT", "PATCH"):
        fields["content-type"] = "application/json"
        fields["content-length"] = str(len(body))
    for name, value in (headers or {}).items():
        if any(c in "\r\n\0" for c in name + value):
            raise ValueError(f"header {name!r} holds a control character")
        fields[name.lower()] = value
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items()) + "\r\n"
    return Exchange(
        address,
        head.encode("latin-1") + body,
        on_head=on_head,
        on_body=on_body,
        on_end=on_end,
        on_error=on_error,
        connect_deadline_s=connect_deadline_s,
        idle_deadline_s=idle_deadline_s,
    )
