"""Ends tasks for sure, or lets them come to their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")

AGAIN_S = 0.1


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel them and wait until they are done.

    Cancels again and again: on Python 3.11 `asyncio.wait_for` loses a cancellation that
    comes together with its result (CPython issue 86296), and clients use it inside.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=AGAIN_S)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await it; a cancellation goes on only when it is over. For work in threads: those cannot be
    stopped, and what they have open must not be put in order under them."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):  # once more; raised when it has ended
                    await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody waits for it any more
        raise
