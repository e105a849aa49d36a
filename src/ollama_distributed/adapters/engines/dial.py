"""Connections to a UNIX socket that are made at once, without the loop: it takes two rounds for one, and
the server another 0.15 ms until a thread of its own reads from it."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import NamedTuple

AHEAD_S = 3.0
"""llama-server closes a connection on which nothing comes for 5 s."""


class Dialled(NamedTuple):
    socket: socket.socket | None
    unsent: bytes
    """What of the request is not on its way yet."""
    ahead: bool
    """It was open before, and the server may have closed it."""


def dialled(path: str, request: bytes, ahead: Ahead | None) -> Dialled:
    """Sends as much of `request` as goes. Never waits. No socket: not at once (nobody listens, or too many
    want to); who connects in the ordinary way is told why."""
    opened = ahead.take() if ahead is not None else None
    made = opened or _connected(path)
    sent = 0
    if made is not None:
        with suppress(OSError):  # full, or closed already: the transport finds out
            sent = made.send(request)
    return Dialled(made, request[sent:], opened is not None)


def _connected(path: str) -> socket.socket | None:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    try:
        made.connect(path)
    except OSError:
        made.close()
        return None
    return made


class Ahead:
    """One connection, opened while the server is at work on another request, for the next; `close` it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made: socket.socket | None = None
        self._made_at = 0.0
        """By a monotonic clock."""
        self._closed = False

    def open(self) -> None:
        """Where none is open."""
        if self._closed:
            return
        if self._made is None or time.monotonic() - self._made_at > AHEAD_S:
            self._drop()
            self._made, self._made_at = _connected(self._path), time.monotonic()

    def take(self) -> socket.socket | None:
        """The caller's from now on. The server may have closed it all the same."""
        if self._made is not None and time.monotonic() - self._made_at > AHEAD_S:
            self._drop()
        made, self._made = self._made, None
        return made

    def close(self) -> None:
        """Idempotent; none is opened after it."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._made is not None:
            self._made.close()
            self._made = None
