"""Lines of batches on their way: how many run, and their results until they are on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.batches.ports import Disk
from ollama_distributed.batches.records import Result

MEMORY_S = 2.0
"""Reports of other nodes are so old: they still count lines that have ended."""


class Flights:
    """Lines of one model that run, and how many ran a moment ago."""

    def __init__(self, now: float) -> None:
        self.running = 0
        self.began_at = now
        self._past: deque[tuple[float, int]] = deque()

    def changed(self, by: int, now: float) -> None:
        self._past.append((now, self.running))
        self.running += by
        if by > 0:
            self.began_at = now

    def most(self, now: float) -> int:
        while self._past and self._past[0][0] < now - MEMORY_S:
            self._past.popleft()
        return max([self.running, *(count for _, count in self._past)])


class Results:
    """Answers on their way to the disk: those that came while the last were written go together."""

    def __init__(
        self, disk: Disk, batch_id: str, told: Callable[[int, int], None], scope: anyio.CancelScope
    ) -> None:
        self.failure: OllamaDistributedError | None = None
        """They cannot be written; `scope` is cancelled then."""
        self._scope = scope
        self._disk = disk
        self._batch_id = batch_id
        self._told = told
        self._waiting: list[Result] = []
        self._news = anyio.Event()
        self._closed = False
        self._writing = anyio.Lock()

    def add(self, result: Result) -> None:
        self._waiting.append(result)
        self._news.set()

    def close(self) -> None:
        """No more will come."""
        self._closed = True
        self._news.set()

    async def run(self) -> None:
        while not (self._closed and not self._waiting):
            await self._news.wait()
            self._news = anyio.Event()
            await self.flush()

    async def flush(self) -> None:
        async with self._writing:
            taken = self._waiting
            if not taken or self.failure is not None:
                return
            self._waiting = []
            try:
                # Shielded: a write that is given up in the middle would be written twice.
                with anyio.CancelScope(shield=True):
                    await self._disk.append(self._batch_id, taken)
            except OllamaDistributedError as error:
                self.failure = error
                self._scope.cancel()
                return
            failed = sum(result.failed for result in taken)
            self._told(len(taken) - failed, failed)
