"""Counts what moves models: how many run, how they ended, how fast bytes come."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Coroutine
from typing import Any

from ollama_distributed.base.clock import Clock

KEPT_S = 60.0
"""A speed is the mean since the look that is so old, or since the one before it."""


class Tally:
    """Works by kind (`pull`, `push`, `copy`) and outcome (`done`, `failed`, `cancelled`)."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()

    async def count(self, kind: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it, and count it. Raises what it raises."""
        self.running[kind] += 1
        outcome = "failed"
        try:
            await work
            outcome = "done"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.running[kind] -= 1
            self.ended[kind, outcome] += 1


class Speed:
    """Of a number that grows, from one look to a later one: whoever looks seldom pays nothing else."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._looks: deque[tuple[float, int]] = deque([(clock.monotonic(), 0)])

    def per_s(self, total: int) -> float:
        now = self._clock.monotonic()
        while len(self._looks) > 1 and now - self._looks[1][0] >= KEPT_S:
            self._looks.popleft()
        began, before = self._looks[0]
        if now - self._looks[-1][0] >= 1.0:
            self._looks.append((now, total))
        return max(0, total - before) / (now - began) if now > began else 0.0
