"""What a pull or push shows: its lines so far, for everyone who looks, whenever they began to.

A slow reader gets the newest state of each line, not every state that it had. While nothing
changes the last line is told again, so that nobody on the way takes the connection for dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.distribution.ports import Status

AGAIN_S = 5.0
"""Far below the minute after which proxies cut silent connections."""


class Progress:
    def __init__(self, *, again_s: float = AGAIN_S) -> None:
        self._again_s = again_s
        self._lines: dict[str, tuple[int, Status]] = {}
        """By their text: when (a count of changes), and how they stood."""
        self._changes = 0
        self._changed = asyncio.Event()

    def tell(self, status: Status) -> None:
        known = self._lines.get(status.status)
        if known is not None and known[1] == status:
            return
        self._changes += 1
        self._lines[status.status] = (self._changes, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, task: asyncio.Task[None]) -> AsyncGenerator[Status]:
        """Each line as it changes, until the work `task` is over. Raises what it raises."""
        seen = 0
        last: Status | None = None
        while True:
            for change, status in sorted(self._lines.values(), key=lambda line: line[0]):
                if change > seen:
                    seen, last = change, status
                    yield status
            if seen == self._changes:
                if task.cancelled():
                    raise Unavailable("the node is shutting down; ask again to go on")
                if task.done():
                    task.result()
                    return
                changed = asyncio.create_task(self._changed.wait())
                try:
                    ends = {task, changed}
                    done, _ = await asyncio.wait(
                        ends, timeout=self._again_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    changed.cancel()
                if not done and last is not None:
                    yield last
