"""One kept-alive connection to another node: HTTP/1.1 over mutual TLS, one call at a time.

The pool opens it, checks who is there and lends it to a `Call`; when the answer is complete
and the connection still good it goes back. A call that is cancelled takes its connection
along: that is how the other node learns of it. RFC 9112.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools
import msgspec
import structlog

from ollama_distributed.adapters.peers.wire import FRAMES_TYPE
from ollama_distributed.base.errors import Internal, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 16 * 1024
MAX_REFUSAL_BYTES = 64 * 1024
"""What the listener itself answers, when it does not let the call through."""
WRITE_BYTES = 256 * 1024
"""Of a large body at once: TLS works on each piece without a pause."""


class Call(Protocol):
    """Who uses the link. The last of these calls is exactly one of `ended`, `broke`."""

    message: bytes
    """Head and body of the request."""

    def opening(self, task: asyncio.Task[None]) -> None:
        """A connection is being made; cancelling the task ends that."""
        ...

    def taken(self, link: Link) -> None:
        """This is its connection from now on; the request goes out at once."""
        ...

    def heard(self, data: bytes) -> None:
        """A piece of the answer's frames."""
        ...

    def ended(self) -> None:
        """The answer is complete."""
        ...

    def broke(self, error: OllamaDistributedError, *, answered: bool, reused: bool) -> None:
        """No answer, or only a part. `answered`: a byte of it came. `reused`: on this
        connection there were calls before."""
        ...


class Home(Protocol):
    """Where links live; the pool."""

    def free(self, link: Link) -> None:
        """It can take the next call."""
        ...

    def gone(self, link: Link) -> None: ...


class _Listeners(msgspec.Struct):
    """A refusal by the listener in front of the door (`cluster/identity/wire.py`)."""

    error: str = ""
    code: str = ""


class Link(asyncio.Protocol):
    def __init__(self, home: Home, node: NodeId, now: float) -> None:
        self.node = node
        self.opened_at = now
        self.quiet_since = now
        """When a byte came last, or when it became free."""
        self.paused = False
        self.calls = 0
        self._home = home
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._unsent: memoryview | None = None
        self._full = False
        """The transport takes no more for now."""
        self._answered = False
        self._frames = False
        self._head_bytes = 0
        self._in_head = True
        self._refusal = bytearray()
        self._closed = False

    # ── for the pool ────────────────────────────────────────────────────────────────

    @property
    def busy(self) -> bool:
        return self._call is not None

    @property
    def open(self) -> bool:
        return not (self._closed or self._transport is None or self._transport.is_closing())

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    def begin(self, call: Call) -> None:
        """Send the call's request; its answer goes to it."""
        assert self._transport is not None
        self._call = call
        self.calls += 1
        self._answered = self._frames = False
        self._head_bytes = 0
        self._in_head = True
        self._refusal.clear()
        self.quiet_since = self._loop.time()
        if len(call.message) <= WRITE_BYTES:
            self._transport.write(call.message)
        else:
            self._unsent = memoryview(call.message)
            self._send_more()

    def cut(self, error: OllamaDistributedError) -> None:
        """End the connection; a call on it fails with `error`."""
        self._fail(error)

    def close(self) -> None:
        """End the connection without a word to its call: it was cancelled, or there is none."""
        self._call = None
        self._shut()

    def pause(self) -> None:
        """Stop reading. At most one read (256 KiB) that is already here is still delivered."""
        self.paused = True
        if self.open and self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        self.paused = False
        self.quiet_since = self._loop.time()
        if self.open and self._transport is not None:
            self._transport.resume_reading()

    # ── transport ───────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._closed:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send_more()

    def _send_more(self) -> None:
        """The rest of a large body, as fast as the other side takes it."""
        unsent, transport = self._unsent, self._transport
        if unsent is None or transport is None or self._closed or self._full:
            return
        transport.write(unsent[:WRITE_BYTES])
        self._unsent = rest = unsent[WRITE_BYTES:] if len(unsent) > WRITE_BYTES else None
        self.quiet_since = self._loop.time()
        if rest is not None and not self._full:
            self._loop.call_soon(self._send_more)  # else `resume_writing` says when

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        if self._call is None:
            self._shut()  # a word that nobody asked for: not a connection to trust
            return
        self.quiet_since = self._loop.time()
        self._answered = True
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as failure:
            cause = failure.__context__ or failure
            if not isinstance(cause, OllamaDistributedError):
                log.exception("peers.callback_failed", node=self.node, exc_info=cause)
                cause = Internal("a callback failed on another node's answer; the log has it")
            self._fail(cause)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as failure:
            self._fail(Unavailable(f"node {self.node} answered no valid HTTP: {failure}"))
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self._closed:
            self._fail(Unavailable(f"node {self.node} answered with a head that is too long"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        why = f" ({exc})" if exc is not None else ""
        self._fail(Unavailable(f"node {self.node} closed the connection{why}"))

    # ── httptools calls these while `feed_data` runs ────────────────────────────────

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._frames = value == FRAMES_TYPE.encode()

    def on_headers_complete(self) -> None:
        self._in_head = False

    def on_body(self, data: bytes) -> None:
        if self._call is None:
            return
        if self._frames:
            self._call.heard(data)
        elif len(self._refusal) < MAX_REFUSAL_BYTES:
            self._refusal += data

    def on_message_complete(self) -> None:
        call = self._call
        if call is None:
            return
        if not self._frames:
            self._fail(self._listeners_refusal())
            return
        keeps = self._parser.should_keep_alive() and self._unsent is None
        self._call = None
        self.quiet_since = self._loop.time()
        if keeps and self.open:
            if self.paused:
                self.resume()
            self._home.free(self)
        else:
            self._shut()
        call.ended()

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _listeners_refusal(self) -> Unavailable:
        """Not the door answered but what is in front of it: it does not let this node in."""
        status = self._parser.get_status_code()
        try:
            text = msgspec.json.decode(self._refusal, type=_Listeners).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            text = ""
        return Unavailable(f"node {self.node} did not take the call (status {status}): {text or 'no reason'}")

    def _fail(self, error: OllamaDistributedError) -> None:
        call, self._call = self._call, None
        self._shut()
        if call is not None:
            call.broke(error, answered=self._answered, reused=self.calls > 1)

    def _shut(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unsent = None
        if self._transport is not None:
            # abort, not close: unsent bytes must not keep a cancelled call alive
            self._transport.abort()
        self._home.gone(self)
