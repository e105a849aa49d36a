"""Reads the streams of all running answers in few turns of the loop.

llama.cpp computes on the cores that the node runs on: at each wake-up of the node one of its
threads has to wait, and the others wait for that one. A wake-up for a token costs 0.1-0.2 ms,
nearly all of it for caches that the model's weights have emptied, and ten more tokens in the
same wake-up cost as much again. So the connections of a loop are read together, at most once
in `pace_s`: a token that comes after a pause is read at once, those that follow it in less
than `pace_s` come together. The end of an answer waits for nothing.

Two epoll instances hold all connections, one for what can be read and one for those that the
peer has closed; the loop watches the first only after a pause, the second always.
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections.abc import Callable

PACE_S = 0.02
"""Fifty times a second: nobody sees text come faster, and a small model makes two tokens in it."""


MUCH_BYTES = 8192
"""Sixty tokens. Of an engine that makes so many in `pace_s`, the socket would hold no more than a
hundred, and the engine would wait for us."""


class Intake:
    """For connections on one loop; make it there, and `close` it."""

    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s
        self._loop = asyncio.get_running_loop()
        self._read: dict[int, Callable[[], int]] = {}
        self._readable = select.epoll()
        self._closed = select.epoll()
        self._watching = False
        """The loop waits for the next thing to read."""
        self._timer: asyncio.TimerHandle | None = None
        """Or for this: something was read less than `pace_s` ago."""
        self._loop.add_reader(self._closed.fileno(), self._take_closed)

    def add(self, connection: int, read: Callable[[], int]) -> None:
        """`connection`: a file descriptor that was read just now. `read` is called when it can be
        read again, or its end is there, until `remove`; it reads once, says how many bytes that
        were, and must not raise."""
        self._read[connection] = read
        self._readable.register(connection, select.EPOLLIN)
        self._closed.register(connection, select.EPOLLRDHUP)
        if self._timer is None:
            self._rest()

    def remove(self, connection: int) -> None:
        """Before the descriptor is closed. Idempotent."""
        if self._read.pop(connection, None) is not None:
            self._readable.unregister(connection)
            self._closed.unregister(connection)

    def close(self) -> None:
        """Idempotent."""
        if self._closed.closed:
            return
        self._watch(False)
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._closed.fileno())
        self._readable.close()
        self._closed.close()
        self._read.clear()

    def _take(self) -> None:
        """What can be read now; then a rest, or a watch for what comes next."""
        self._timer = None
        ready = self._readable.poll(0)
        most = self._call(ready)
        if ready and most < MUCH_BYTES:
            self._rest()
        elif self._read:
            self._watch(True)

    def _take_closed(self) -> None:
        self._call(self._closed.poll(0))

    def _call(self, ready: list[tuple[int, int]]) -> int:
        """The most that one of them had to read."""
        most = 0
        for connection, _ in ready:
            read = self._read.get(connection)
            if read is not None:  # else whoever was called before has removed it
                most = max(most, read())
        return most

    def _rest(self) -> None:
        self._watch(False)
        self._timer = self._loop.call_later(self._pace_s, self._take)

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_reader(self._readable.fileno(), self._take)
        elif self._watching and not wanted:
            self._loop.remove_reader(self._readable.fileno())
        self._watching = wanted


def intake(pace_s: float) -> Intake | None:
    """None: no pace is wanted, or this system has no epoll, and every stream is read by itself."""
    return Intake(pace_s) if pace_s > 0 and sys.platform == "linux" else None
