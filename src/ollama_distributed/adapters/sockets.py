"""Listening sockets, options of connections between nodes, and how an app hears of their end."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

BACKLOG = 2048
"""Connections that wait to be accepted; the kernel's own limit is often 4096."""
CALLER_UNHEARD_S = 3.0
"""Sent bytes that nobody acknowledged for so long: the other side is gone or cut off, however
busy it is, since its kernel answers. The kernel's own patience is 15 minutes. A serving node
always reads what it is sent."""
SERVER_UNHEARD_S = 90.0
"""A caller may stop reading for a while because its own client does, and the kernel counts a
window that stays shut as silence (seen on Linux 6.18: an abort although every probe was
acknowledged). So this is longer than the serving side's patience with a slow reader."""
LIFELINE = "ollama_distributed.lifeline"
"""The connection's `Lifeline`, in an ASGI scope's extensions."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: a free one. Blocking where `host` is a name.

    Raises:
        OSError: the port is taken, or this machine does not have the address.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        listener.set_inheritable(False)
    except OSError:
        listener.close()
        raise
    return listener


class Lifeline:
    """Tells who is interested when a connection is lost, at once if it is lost already.

    Waiting for ASGI's `http.disconnect` would take a task for each request.
    """

    __slots__ = ("_tell", "lost")

    def __init__(self) -> None:
        self.lost = False
        self._tell: set[Callable[[], None]] = set()

    def add(self, tell: Callable[[], None]) -> None:
        if self.lost:
            tell()
        else:
            self._tell.add(tell)

    def discard(self, tell: Callable[[], None]) -> None:
        self._tell.discard(tell)

    def cut(self) -> None:
        self.lost = True
        for tell in tuple(self._tell):
            tell()


def tune(connection: socket.socket | None, unheard_s: float) -> None:
    """No waiting for full packets, and soon an end when the other side does not answer."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # each is a wish: what the system does not know stays as it is
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unheard_s * 1000))
