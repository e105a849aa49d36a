"""Connections to one server that are kept for the next request.

The one used last is used first, so that the rest grow old and are closed, by the server or when a
younger one comes back. No timer and no task: an idle connection costs nothing but its socket.
"""

from __future__ import annotations

import asyncio
import time

MOST_IDLE = 256
"""More requests at once than this begin to pay for connections."""
IDLE_S = 30.0
"""A connection that nobody used for so long is closed when another is given back."""


class Kept:
    """On one event loop; `close` it."""

    def __init__(self) -> None:
        self._idle: dict[_Idle, None] = {}
        """Oldest first."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> asyncio.Transport | None:
        """One that is open, as far as is known; the caller is its protocol from now on."""
        while self._idle:
            transport = self._idle.popitem()[0].transport
            if not transport.is_closing():
                return transport
        return None

    def give(self, transport: asyncio.Transport) -> None:
        """It has had its whole answer."""
        if self._closed or len(self._idle) >= MOST_IDLE:
            transport.abort()
            return
        now = time.monotonic()
        transport.set_protocol(idle := _Idle(self, transport, now))
        self._idle[idle] = None
        oldest = next(iter(self._idle))
        if now - oldest.since > IDLE_S:
            del self._idle[oldest]
            oldest.transport.abort()

    def lost(self, idle: _Idle) -> None:
        self._idle.pop(idle, None)

    def close(self) -> None:
        """Idempotent. What is given back from now on is closed."""
        self._closed = True
        while self._idle:
            self._idle.popitem()[0].transport.abort()


class _Idle(asyncio.Protocol):
    """Nothing may come on a connection that nobody uses; its end is noted."""

    __slots__ = ("_home", "since", "transport")

    def __init__(self, home: Kept, transport: asyncio.Transport, now: float) -> None:
        self._home = home
        self.transport = transport
        self.since = now

    def data_received(self, data: bytes) -> None:  # noqa: ARG002  # any is too much
        self._home.lost(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # nobody waits for why
        self._home.lost(self)
