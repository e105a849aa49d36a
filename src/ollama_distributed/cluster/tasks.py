"""Ends tasks for sure."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

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
