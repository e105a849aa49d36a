"""WebSockets under limits: uvicorn's protocol over `websockets`, with bounds that neither has.

Both take any number of frames: 40,000 empty pings in one read keep the loop for a fifth of a second,
and empty fragments of one message are kept for ever. A client that does not read is not closed either,
as `close` waits for what it does not take. So frames are counted, what came is looked at in slices, and
who is stuck is cut by the same watch as all connections. Half private: uvicorn is pinned.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ollama_distributed.gateway.connections import Watch
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.protocol import LimitedProtocol

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState
    from websockets.frames import Frame

MOST_FRAMES_S = 200
"""Pings, fragments and messages of one client in a second: four for each message that it may send."""
MOST_FRAGMENTS = 128
"""Of one message."""
SLICE_BYTES = 4096
"""700 of the smallest frames: a few milliseconds."""
CLOSE_S = 10.0
"""For the other side to answer a close, and to take what it was sent before."""
UNSENT_BYTES = 64 * 1024
"""Above it, events wait where the oldest can be dropped."""
_POLICY = 1008

# Its lines name the path with its query at level info; our own line per request does not.
_log = logging.getLogger("ollama_distributed.gateway.websocket")
_log.setLevel(logging.WARNING)


class LimitedSocket(WebSocketsSansIOProtocol):
    """One WebSocket. Make a subclass with `socket_class` and give that to uvicorn."""

    limits: Limits
    watch: Watch

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = _log
        self._second, self._frames = 0.0, 0
        self._stuck_since: float | None = None
        """Since when it is being closed, or its reader takes nothing."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNSENT_BYTES)
        self.watch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + SLICE_BYTES])

    # ── frames ──────────────────────────────────────────────────────────────────────

    def handle_ping(self) -> None:
        if self._may():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._may():
            super().handle_pong(event)

    def handle_text(self, event: Frame) -> None:
        if self._may():
            super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        if self._may():
            super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MOST_FRAGMENTS:
            self._fail("a message in too many fragments")
        elif self._may():
            super().handle_cont(event)

    def _may(self) -> bool:
        """Whether one frame more is in order."""
        if self.close_sent:
            return False
        now = self.loop.time()
        if now - self._second >= 1.0:
            self._second, self._frames = now, 0
        self._frames += 1
        if self._frames > MOST_FRAMES_S:
            self._fail("too many frames")
            return False
        return True

    def _fail(self, reason: str) -> None:
        if self.close_sent:
            return
        self.stop_keepalive()
        self.conn.fail(_POLICY, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": _POLICY, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    # ── the watch ───────────────────────────────────────────────────────────────────

    def check_deadlines(self, now: float) -> None:
        """Called by the watch about once a second."""
        closing = self.close_sent or self.transport.is_closing()
        if not closing and self.writable.is_set():
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since >= (CLOSE_S if closing else self.limits.reader_deadline_s):
            self.transport.abort()


def socket_class(http: type[LimitedProtocol]) -> type[LimitedSocket]:
    """A protocol for `uvicorn.Config(ws=...)`, beside `http`, whose connections it takes over."""
    return type("NodeSocket", (LimitedSocket,), {"limits": http.limits, "watch": http.watch})
