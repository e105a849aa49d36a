"""Connections to one server that are kept for the next request.

The one used last is used first, so that the rest grow old and are closed, by the server or when a
younger one comes back. No timer and no task: an idle connection costs nothing but its socket.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

MOST_IDLE = 256
"""More requests at once than this begin to pay for connections."""
IDLE_S = 30.0
"""A connection that nobody used for so long is closed when another is given back."""


class User(Protocol):
    """Who uses a connection (`exchange.Exchange`)."""

    def connected(self, connection: Connection) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class Connection(asyncio.Protocol):
    """Serves one user after the other. It stays the protocol of its transport: to take another one,
    uvloop stops to read and begins anew, which are two calls of the kernel."""

    __slots__ = ("_home", "since", "transport", "user")

    transport: asyncio.Transport
    """Once it is connected."""

    def __init__(self, user: User) -> None:
        self.user: User | None = user
        """None: it is kept."""
        self._home: Kept | None = None
        self.since = 0.0
        """When it was kept, by a monotonic clock."""

    def rest(self, home: Kept, now: float) -> None:
        self.user, self._home, self.since = None, home, now

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's
        self.transport = transport
        if self.user is not None:
            self.user.connected(self)

    def data_received(self, data: bytes) -> None:
        user = self.user
        if user is not None:
            user.data_received(data)
        else:  # nothing may come on a connection that nobody uses
            self._forgotten()
            self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        user, self.user = self.user, None
        if user is not None:
            user.connection_lost(exc)
        else:
            self._forgotten()

    def _forgotten(self) -> None:
        if self._home is not None:
            self._home.lost(self)


class Kept:
    """On one event loop; `close` it."""

    def __init__(self) -> None:
        self._idle: dict[Connection, None] = {}
        """Oldest first."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> Connection | None:
        """One that is open, as far as is known; the caller is its user from now on."""
        while self._idle:
            connection = self._idle.popitem()[0]
            if not connection.transport.is_closing():
                return connection
        return None

    def give(self, connection: Connection) -> None:
        """It has had its whole answer."""
        now = time.monotonic()
        connection.rest(self, now)
        if self._closed or len(self._idle) >= MOST_IDLE:
            connection.transport.abort()
            return
        self._idle[connection] = None
        oldest = next(iter(self._idle))
        if now - oldest.since > IDLE_S:
            del self._idle[oldest]
            oldest.transport.abort()

    def lost(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Idempotent. What is given back from now on is closed."""
        self._closed = True
        while self._idle:
            self._idle.popitem()[0].transport.abort()
