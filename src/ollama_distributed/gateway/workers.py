"""Threads for the work that would hold the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")

INLINE_BYTES = 64 * 1024
"""Of JSON: reading or writing more may take over a millisecond and goes to a thread (0.2 ms)."""
_MOST = 2
"""At once. They take turns with the event loop: more would only make it wait longer."""


class Offload(Protocol):
    """Runs `work` where it does not hold the event loop. The work ends even if its caller is cancelled."""

    async def __call__(self, work: Callable[[], T], /) -> T: ...


class Workers:
    """`Offload` in at most two threads."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(_MOST)

    async def __call__(self, work: Callable[[], T], /) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)
