"""Reads the streams of all running answers in few turns of the loop.

llama.cpp computes on the cores that the node runs on: at each wake-up of the node one of its
threads has to wait, and the others wait for that one. A wake-up for a token costs 0.1-0.2 ms,
nearly all of it for caches that the model's weights have emptied, and ten more tokens in the
same wake-up cost as much again. So the connections of a loop are read together, at most once
in `pace_s`: a token that comes after a pause is read at once, those that follow it in less
than `pace_s` come together. The end of a connection waits for nothing. Where there are so many that
a round of reading takes long, they rest longer, at most `LONGEST` times `pace_s`: a token costs the
less, the more come together.

Two epoll instances hold all connections, one for what can be read and one for those that the
peer has closed; the loop watches the first only after a pause, the second always.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

PACE_S = 0.02
"""Fifty times a second: nobody sees text come faster, and a small model makes two tokens in it."""
LONGEST = 2.0
"""Of `pace_s`: 25 times a second."""
REST = 20.0
"""Times as long as a round of reading took."""
_READ_BYTES = 65_536
MUCH_BYTES = 8192
"""Sixty tokens. Of an engine that makes so many in `pace_s`, the socket would hold no more than a
hundred, and the engine would wait for us."""

Reader = tuple[Callable[[bytes], None], Callable[[OSError | None], None]]
"""Who gets what comes, and who hears of the end."""


class Intake:
    """For connections on one loop; make it there, and `close` it."""

    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s
        self._loop = asyncio.get_running_loop()
        self._readers: dict[int, Reader] = {}
        self._readable = select.epoll()
        self._closed = select.epoll()
        self._watching = False
        """The loop waits for the next thing to read."""
        self._timer: asyncio.TimerHandle | None = None
        """Or for this: something was read less than `pace_s` ago."""
        self._loop.add_reader(self._closed.fileno(), self._take_closed)

    def add(
        self, connection: int, feed: Callable[[bytes], None], end: Callable[[OSError | None], None]
    ) -> None:
        """`connection`: a file descriptor that was read just now. Until `remove` the one gets what
        comes, the other hears when no more will; once they may be called after it, with what was
        read before. Neither may raise."""
        self._readers[connection] = (feed, end)
        self._readable.register(connection, select.EPOLLIN)
        self._closed.register(connection, select.EPOLLRDHUP)
        if self._timer is None:
            self._rest(self._pace_s)

    def remove(self, connection: int) -> None:
        """Before the descriptor is closed. Idempotent."""
        if self._readers.pop(connection, None) is not None:
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
        self._readers.clear()

    def _take(self) -> None:
        """What can be read now; then a rest, or a watch for what comes next."""
        self._timer = None
        ready = self._readable.poll(0)
        began = time.perf_counter()
        most = self._hand_on(ready)
        if ready and most < MUCH_BYTES:
            self._rest(rest_s(self._pace_s, time.perf_counter() - began))
        elif self._readers:
            self._watch(True)

    def _take_closed(self) -> None:
        self._hand_on(self._closed.poll(0))

    def _hand_on(self, ready: list[tuple[int, int]]) -> int:
        """The most that one of them had to read. All are read before the first is told: the kernel's
        code and ours do not push each other out of the caches for each one."""
        most = 0
        heard: list[tuple[Callable[[Any], None], bytes | OSError | None]] = []
        for connection, _ in ready:
            feed, end = self._readers[connection]
            try:
                data = os.read(connection, _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as exc:
                heard.append((end, exc))
                continue
            if data:
                heard.append((feed, data))
                most = max(most, len(data))
            else:
                heard.append((end, None))
        for tell, what in heard:
            tell(what)
        return most

    def _rest(self, rest_s: float) -> None:
        self._watch(False)
        self._timer = self._loop.call_later(rest_s, self._take)

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_reader(self._readable.fileno(), self._take)
        elif self._watching and not wanted:
            self._loop.remove_reader(self._readable.fileno())
        self._watching = wanted


def rest_s(pace_s: float, took_s: float) -> float:
    """After a round that took so long."""
    return max(pace_s, min(REST * took_s, LONGEST * pace_s))


def intake(pace_s: float) -> Intake | None:
    """None: no pace is wanted, or this system has no epoll, and every stream is read by itself."""
    return Intake(pace_s) if pace_s > 0 and sys.platform == "linux" else None
