"""Clients that write while servers die, with every call recorded: what came of it is checked."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.ports import ABSENT, Resync
from ollama_distributed.testing.linearizability import Client, History
from tests.limits import SOON_S
from tests.voters import Voters

KEYS = 12
"""Spread over many keys: the checker is quick up to a thousand operations on each."""
MAX_OPERATIONS_OF_KEY = 1000


class Writers:
    """Two clients write random keys by compare-and-set until they are told to stop."""

    def __init__(self, clients: dict[str, NatsCoordination], seed: int) -> None:
        self.history = History()
        self.clients = clients
        self.acknowledged = 0
        self.longest_gap_s = 0.0
        """Between two acknowledged writes, of any client."""
        self.disorder: list[tuple[int, int]] = []
        self._random = random.Random(seed)
        self._stopped = False
        self._last_at = anyio.current_time()
        self._calls: dict[str, int] = {}

    async def write(self, name: str) -> None:
        recorded = Client(self.history, name, self.clients[name])
        number = 0
        while not self._stopped:
            number += 1
            key = self._key()
            try:
                entry = await recorded.look(key)
            except Unavailable:
                await anyio.sleep(0.05)
                continue
            expected = entry.revision if entry is not None else ABSENT
            value = None if entry is not None and self._random.random() < 0.1 else f"{name} {number}".encode()
            self._calls[key] = self._calls.get(key, 0) + 1
            if await recorded.write(key, value, expected=expected) is not None:
                self._note()
            else:
                await anyio.sleep(0.02)

    def _key(self) -> str:
        """Of the generation that still has room for the checker."""
        number, generation = self._random.randrange(KEYS), 0
        while self._calls.get(f"w.{number}.{generation}", 0) >= MAX_OPERATIONS_OF_KEY:
            generation += 1
        return f"w.{number}.{generation}"

    def _note(self) -> None:
        now = anyio.current_time()
        self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)
        self._last_at = now
        self.acknowledged += 1

    async def follow(self, name: str) -> None:
        """A watcher never sees the history go back."""
        last = 0
        async with self.clients[name].watch() as events:
            async for event in events:
                if event.revision < last or (event.revision == last and not isinstance(event, Resync)):
                    self.disorder.append((last, event.revision))
                last = event.revision

    def forget_gap(self) -> None:
        self.longest_gap_s = 0.0
        self._last_at = anyio.current_time()

    async def more(self, count: int, deadline_s: float = SOON_S) -> None:
        """Wait for so many further acknowledged writes."""
        wanted = self.acknowledged + count
        with anyio.fail_after(deadline_s):
            while self.acknowledged < wanted:
                await anyio.sleep(0.005)

    def stop(self) -> None:
        self._stopped = True

    async def check(self) -> None:
        """Read all that is there at last, and check the one history."""
        assert self.disorder == []
        last = Client(self.history, "last", next(iter(self.clients.values())))
        for key in sorted(self._calls):
            with anyio.fail_after(SOON_S):
                while True:
                    try:
                        await last.read_last(key)
                        break
                    except Unavailable:
                        await anyio.sleep(0.05)
        self.history.check()


@asynccontextmanager
async def writing(voters: Voters, *, seed: int = 1, create: bool = False) -> AsyncIterator[Writers]:
    """Writers at work inside; outside they have ended and their history was checked."""
    async with (
        voters.client("one", create=create) as one,
        voters.client("two") as two,
    ):
        writers = Writers({"one": one, "two": two}, seed)
        async with anyio.create_task_group() as group:
            for name in ("one", "two"):
                group.start_soon(writers.write, name)
                group.start_soon(writers.follow, name)
            try:
                await writers.more(20)
                yield writers
                await writers.more(20)
            finally:
                writers.stop()
                await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        await writers.check()
