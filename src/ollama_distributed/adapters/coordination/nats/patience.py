"""Waiting for servers to come to what they were told: they elect, catch up, refuse meanwhile.

Nothing tells when they are there, so they are asked; every caller has a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import structlog

from ollama_distributed.base.errors import Unavailable

log = structlog.get_logger()

WAITING = "coordination.voters_waiting"
POLL_S = 0.05
RETRY_S = 0.2

T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Again and again while it is `Unavailable`."""
    while True:
        try:
            return await call()
        except Unavailable as exc:
            log.debug(WAITING, reason=exc.message)
            await anyio.sleep(RETRY_S)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Until it holds; `Unavailable` means not yet."""
    while not await patiently(condition):  # noqa: ASYNC110  # there is nothing to be told by
        await anyio.sleep(POLL_S)


async def all_of(*calls: Awaitable[None]) -> None:
    """All at once; waits for all, then raises the first failure."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if outcome is not None:
            raise outcome


@asynccontextmanager
async def in_time(seconds: float) -> AsyncIterator[None]:
    """
    Raises:
        Unavailable: it took longer.
    """
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as exc:
        raise Unavailable(f"the voters were not all there after {seconds:g} s; call it again") from exc
