"""Options of a hop's sockets, both sides alike."""

from __future__ import annotations

import contextlib
import socket

UNHEARD_MS = 10_000
"""Sent bytes that nobody acknowledged for so long: the other side is gone or cut off. The
kernel's own patience is 15 minutes."""


def tune(connection: socket.socket | None) -> None:
    """No waiting for full packets, and soon an end when the other side does not answer."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # each is a wish: what the system does not know stays as it is
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MS)
