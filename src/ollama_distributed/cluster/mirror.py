"""The replicated state on this node: always there to read, whatever the engine does.

Follows one watch over all keys. While the engine is away the last state stays, with its age;
when it is back the watch starts again by itself. A leader renews its lease every second, so a
mirror that hears nothing for longer is cut off, or nobody leads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import anyio
import structlog
from anyio.lowlevel import checkpoint

from ollama_distributed.base.clock import Clock
from ollama_distributed.cluster.ports import Coordination, Entry, Removed, Resync, WatchEvent
from ollama_distributed.cluster.tasks import end
from ollama_distributed.state.cluster import ClusterState, advanced, apply

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

WATCH_FAILED = "mirror.watch_failed"
LISTENER_FAILED = "mirror.listener_failed"
UNREADABLE = "mirror.record_unreadable"
RESYNCED = "mirror.resynced"

SLICE = 25
"""Records between two looks at the loop: 1 ms of a first load at 10,000 nodes, which takes 1.1 s."""
FRESH_S = 3.0
"""Three renewals of the lease: a mirror that heard nothing for longer is not `synced`."""
RETRY_S = (0.2, 5.0)
"""First and longest pause after a watch that failed; it doubles."""

Listener = Callable[[ClusterState, ClusterState], None]
"""Called with the state before and after, on the loop; it must be quick. Parts that are the
same object in both did not change; `SortedMap.differences` names what did."""


class Mirror:
    """An async context manager; inside, it follows."""

    def __init__(self, coordination: Coordination, *, clock: Clock) -> None:
        self._coordination = coordination
        self._clock = clock
        self._state = ClusterState()
        self._ready = anyio.Event()
        self._heard_at = clock.monotonic()
        self._news = anyio.Event()
        self._listeners: list[Listener] = []
        self._pause_s = RETRY_S[0]
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Mirror:
        self._heard_at = self._clock.monotonic()
        self._following = asyncio.create_task(self._follow(), name="mirror")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._following is not None
        await end([self._following])

    @property
    def state(self) -> ClusterState:
        """The latest; empty until `ready`. Never changes in place: keep it as long as you like."""
        return self._state

    @property
    def ready(self) -> bool:
        """The state was loaded once."""
        return self._ready.is_set()

    @property
    def stale_s(self) -> float:
        """Seconds since anything was heard; about a second at most while a leader is in reach."""
        return self._clock.monotonic() - self._heard_at

    @property
    def synced(self) -> bool:
        return self.ready and self.stale_s < FRESH_S

    def on_change(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every change, in order; the result takes it away again."""
        self._listeners.append(listener)

        def forget() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return forget

    async def wait_ready(self) -> ClusterState:
        await self._ready.wait()
        return self._state

    async def wait_for(self, predicate: Callable[[ClusterState], bool]) -> ClusterState:
        """The first state, from now on, that `predicate` accepts. No deadline of its own."""
        while not (self.ready and predicate(self._state)):
            await self._news.wait()
        return self._state

    async def reach(self, revision: int) -> ClusterState:
        """Wait until the state shows `revision`: what was written there can be read here."""
        return await self.wait_for(lambda state: state.revision >= revision)

    # ── following ───────────────────────────────────────────────────────────────────

    async def _follow(self) -> None:
        while True:
            try:
                async with self._coordination.watch() as events:
                    await self._take(events)
                log.warning(WATCH_FAILED, error="the watch ended")
            except Exception:  # the task's root: whatever a watch raises, the mirror goes on
                log.exception(WATCH_FAILED)
            await anyio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, RETRY_S[1])

    async def _take(self, events: AsyncIterator[WatchEvent]) -> None:
        taken = 0
        async for event in events:
            match event:
                case Resync():
                    await self._reload(event)
                case Entry(key, value, revision):
                    self._step(key, value, revision)
                case Removed(key, revision):
                    self._step(key, None, revision)
            taken += 1
            if taken % SLICE == 0:
                await checkpoint()  # a watch with much to tell may never wait by itself

    def _step(self, key: str, value: bytes | None, revision: int) -> None:
        self._show(apply(self._state, key, value, revision, at=self._clock.time()))

    async def _reload(self, event: Resync) -> None:
        """From the state that is there: what still stands is neither decoded nor copied again."""
        at = self._clock.time()
        state = self._state
        for number, entry in enumerate(event.entries, 1):
            state = apply(state, entry.key, entry.value, entry.revision, at=at)
            if number % SLICE == 0:
                await checkpoint()
        there = {entry.key for entry in event.entries}
        for number, key in enumerate([key for key in state.raw if key not in there], 1):
            state = apply(state, key, None, event.revision, at=at)
            if number % SLICE == 0:
                await checkpoint()
        log.info(RESYNCED, records=len(state.raw), revision=event.revision, first=not self.ready)
        self._ready.set()
        self._pause_s = RETRY_S[0]
        self._show(advanced(state, event.revision, at=at))

    def _show(self, after: ClusterState) -> None:
        before, self._state = self._state, after
        self._heard_at = self._clock.monotonic()
        if after.rejected is not before.rejected:
            for key in after.rejected.differences(before.rejected):
                if (why := after.rejected.get(key)) is not None:
                    log.warning(UNREADABLE, key=key, error=why)
        self._news.set()
        self._news = anyio.Event()
        for listener in tuple(self._listeners):
            try:
                listener(before, after)
            except Exception:  # one listener's defect must not stop the others, nor the mirror
                log.exception(LISTENER_FAILED)
