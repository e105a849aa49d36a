"""Work that is done once for all who ask for it at the same time.

The first who asks starts it, others join; when the last of them has left, it is cancelled.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from typing import Any, Generic, NoReturn, TypeVar

import anyio

from ollama_distributed.base.errors import NotFound
from ollama_distributed.cluster.tasks import end

T = TypeVar("T")


class Joint(Generic[T]):
    """One such work. `told`: what it shows of itself to those who wait."""

    def __init__(
        self, told: T, run: Callable[[T], Coroutine[Any, Any, None]], after: Joint[T] | None
    ) -> None:
        self.told = told
        self.waiting = 0
        self._after = after
        self.task = asyncio.create_task(self._run(run), name=f"{type(told).__name__.lower()}")

    async def _run(self, run: Callable[[T], Coroutine[Any, Any, None]]) -> None:
        if self._after is not None:
            await asyncio.wait({self._after.task})  # it may still put its files in order
            self._after = None
        await run(self.told)

    @property
    def ended(self) -> bool:
        return self.task.done() or self.task.cancelling() > 0

    async def result(self) -> None:
        """Wait for its end; raises what it raised. Cancelling this waits no longer, no more."""
        await asyncio.shield(self.task)


class Joints(Generic[T]):
    """One work for each key at a time. Ended by `close`."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Joint[T]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def joined(
        self, key: Hashable, told: Callable[[], T], run: Callable[[T], Coroutine[Any, Any, None]]
    ) -> AsyncIterator[Joint[T]]:
        """Take part in the work of this key, as long as the context lasts."""
        joint = self._known.get(key)
        if joint is None or joint.ended:
            joint = self._known[key] = Joint(told(), run, joint)
            self._tasks.add(joint.task)
            joint.task.add_done_callback(functools.partial(self._ended, key, joint))
        joint.waiting += 1
        try:
            yield joint
        finally:
            joint.waiting -= 1
            if joint.waiting == 0:
                joint.task.cancel()
                with anyio.CancelScope(shield=True):  # what it leaves is in order before anyone looks
                    await asyncio.wait({joint.task})

    @asynccontextmanager
    async def taken_part(self, key: Hashable) -> AsyncIterator[Joint[T]]:
        """As `joined`, in a work that runs.

        Raises:
            NotFound: none does.
        """
        known = self._known.get(key)
        if known is None or known.ended:
            raise NotFound("that is not under way here")
        async with self.joined(key, _never, _never) as joint:
            yield joint

    def _ended(self, key: Hashable, joint: Joint[T], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._known.get(key) is joint:
            del self._known[key]
        if not task.cancelled():
            task.exception()  # told to those who wait; when all have left, to nobody

    async def close(self) -> None:
        await end(list(self._tasks))


def _never(*_told: object) -> NoReturn:
    raise AssertionError("it runs already")
