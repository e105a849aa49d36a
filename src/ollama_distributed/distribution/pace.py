"""A limit on bytes per second, shared by whoever takes from it."""

from __future__ import annotations

import anyio

from ollama_distributed.base.clock import Clock

_BURST_S = 0.25
"""So much may come at once: smaller pauses cost more than they even out."""


class Pace:
    """First come, first served; nobody waits when there is no limit."""

    def __init__(self, clock: Clock, bytes_per_s: float = 0.0) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._paid_until = float("-inf")

    def limit(self, bytes_per_s: float) -> None:
        """From now on; 0: no limit."""
        self._bytes_per_s = bytes_per_s

    async def take(self, count: int) -> None:
        """Returns when `count` bytes more may have passed."""
        if self._bytes_per_s <= 0:
            return
        now = self._clock.monotonic()
        self._paid_until = max(self._paid_until, now) + count / self._bytes_per_s
        ahead_s = self._paid_until - now - _BURST_S
        if ahead_s > 0:
            await anyio.sleep(ahead_s)
