"""Lines of batches on their way: how many run, and their results until they are on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.batches.plan import lanes
from ollama_distributed.batches.ports import Disk, Room
from ollama_distributed.batches.records import Result

MOST_RUNNING = 512
"""Lines of all batches that run at once: as many requests as a node lets wait (`max_queue`), however many
models they name."""
LOOK_S = 0.5
"""Between two looks for an idle slot."""
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


class Berths:
    """Says when a line may run: within what its model's slots leave free, and all lines together."""

    def __init__(self, room: Room, clock: Clock) -> None:
        self._room = room
        self._clock = clock
        self._flights: dict[str, Flights] = {}
        """By model, of lines that run or did lately: of names that clients make up there is no end."""
        self._running = 0
        self._landed = anyio.Event()
        """One has left."""

    def __len__(self) -> int:
        """Models that are known."""
        return len(self._flights)

    async def take(self, model: str) -> None:
        """Wait until one more line may run, and take its place."""
        since = self._clock.monotonic()
        while True:
            now = self._clock.monotonic()
            flights = self._flights.setdefault(model, Flights(since))
            most = lanes(self._room(model), flights.most(now), now - flights.began_at)
            if flights.running < most and self._running < MOST_RUNNING:
                flights.changed(1, now)
                self._running += 1
                return
            landed = self._landed
            with anyio.move_on_after(LOOK_S):
                await landed.wait()

    def leave(self, model: str) -> None:
        self._flights[model].changed(-1, self._clock.monotonic())
        self._running -= 1
        self._landed.set()
        self._landed = anyio.Event()

    def forget(self, after_s: float) -> None:
        """Models for which no line has begun for so long, and none runs."""
        until = self._clock.monotonic() - after_s
        for model in [
            name for name, one in self._flights.items() if not one.running and one.began_at < until
        ]:
            del self._flights[model]


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
