"""All connections of one listener: how many there may be, from where, and one timer for their deadlines.

Who holds many connections and says on none of them who it is must not be able to take all places: once
half of them are taken, an address has a few for strangers (`Limits.strangers`). A connection is a
stranger's until a request on it has passed the gate. Knows no requests.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.overload import Overload

MET = "ollama_distributed.met"
"""Of a scope's `extensions`, while its connection is a stranger's: to be called once it is not."""
SLICE = 32
"""Connections that are looked at in one turn of the loop: to refuse so many takes three milliseconds."""
_DESCRIPTOR_SHARE = 0.8
"""Of the process's file descriptors; the rest is for models, runners and logs."""
_SUBNET_BITS = 64
"""Of IPv6: what one customer has at least (RFC 6177)."""


def origin_of(host: str) -> str:
    """Who is behind an address, as far as it says; "" for this machine, where proxies are."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a UNIX socket's
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            whole = ipaddress.ip_network((address, _SUBNET_BITS), strict=False)
            return "" if address.is_loopback else str(whole)
        address = address.ipv4_mapped
    return "" if address.is_loopback else str(address)


def met(scope: Mapping[str, Any]) -> None:
    """Who asks has passed the gate."""
    tell = scope.get("extensions", {}).get(MET)
    if tell is not None:
        tell()


class Watched(Protocol):
    """A connection: `LimitedProtocol`, or the WebSocket that it became."""

    loop: asyncio.AbstractEventLoop

    def check_deadlines(self, now: float) -> None: ...


class Watch:
    """Counts the connections of one app and checks their deadlines with one timer."""

    def __init__(self, limits: Limits, overload: Overload | None = None) -> None:
        self._overload = overload or Overload()
        self._most = _most_connections(limits)
        self._most_strangers = limits.strangers
        self._connections: set[Watched] = set()
        self._strangers: dict[Watched, str] = {}
        self._origins: Counter[str] = Counter()
        """Of strangers."""
        self._timer: asyncio.TimerHandle | None = None
        shortest = min(
            limits.header_deadline_s, limits.body_rate_window_s, limits.reader_deadline_s, limits.idle_s
        )
        self._interval_s = min(1.0, shortest / 10)

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Watched, origin: str = "") -> bool:
        """False: there are too many already, or no memory for one more from elsewhere. `origin`: of a
        stranger; "" for who needs not say who it is."""
        taken = len(self._connections)
        if taken >= self._most or (origin and self._overload.dropping):
            return False
        if origin:
            if taken >= self._most // 2 and self._origins[origin] >= self._most_strangers:
                return False
            self._strangers[connection] = origin
            self._origins[origin] += 1
        self._connections.add(connection)
        if self._timer is None:
            self._arm(connection.loop)
        return True

    def knows(self, connection: Watched) -> None:
        """It is no stranger's any more. Idempotent."""
        origin = self._strangers.pop(connection, "")
        if origin:
            self._origins[origin] -= 1
            if not self._origins[origin]:
                del self._origins[origin]

    def holds(self, connection: Watched) -> bool:
        """Whether it is looked at: one that came when there were too many is not."""
        return connection in self._connections

    def remove(self, connection: Watched) -> None:
        self.knows(connection)
        self._connections.discard(connection)
        if not self._connections and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._interval_s, self._check, loop)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._arm(loop)
        self._check_some(loop, list(self._connections))

    def _check_some(self, loop: asyncio.AbstractEventLoop, left: list[Watched]) -> None:
        """Who came together is late together: some are cut, then others have the loop."""
        now = loop.time()
        for connection in left[-SLICE:]:
            if connection in self._connections:
                connection.check_deadlines(now)
        del left[-SLICE:]
        if left:
            loop.call_soon(self._check_some, loop, left)


def _most_connections(limits: Limits) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits.connections
    return min(limits.connections, max(1, int(soft * _DESCRIPTOR_SHARE)))
