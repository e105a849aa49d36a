"""One ordered feed of changes, mirrored in memory and handed to any number of watchers.

Knows no engine: an adapter feeds it (`resync`, `apply`), in order. Every buffer is bounded:
a watcher that reads too slowly loses its buffer and gets the state instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio

from ollama_distributed.cluster.ports import Entry, Message, Removed, Resync, WatchEvent

MAX_UNREAD_EVENTS = 4096
"""Per watcher; a leader's largest burst (a node with 500 models) fits eight times."""
MAX_UNREAD_MESSAGES = 1024

T = TypeVar("T")


class _Mailbox(Generic[T]):
    """What one reader has not read yet; the loop's thread only."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._news = anyio.Event()

    def wake(self) -> None:
        self._news.set()

    async def sleep(self) -> None:
        self._news = anyio.Event()
        await self._news.wait()


class Inbox(_Mailbox[Message]):
    """Messages of one subscription; a slow reader loses the oldest ones."""

    def push(self, message: Message) -> None:
        if len(self._items) == MAX_UNREAD_MESSAGES:
            self._items.popleft()
        self._items.append(message)
        self.wake()

    async def read(self) -> AsyncIterator[Message]:
        while True:
            while self._items:
                yield self._items.popleft()
            await self.sleep()


class _Watcher(_Mailbox[Entry | Removed]):
    def __init__(self, fanout: Fanout, prefix: str) -> None:
        super().__init__()
        self._fanout = fanout
        self._prefix = prefix
        self._stale = True

    def push(self, event: Entry | Removed) -> None:
        if self._stale or not event.key.startswith(self._prefix):
            return
        if len(self._items) == MAX_UNREAD_EVENTS:
            self.reset()
            return
        self._items.append(event)
        self.wake()

    def reset(self) -> None:
        """What was not read is lost; the state replaces it."""
        self._items.clear()
        self._stale = True
        self.wake()

    async def read(self) -> AsyncIterator[WatchEvent]:
        while True:
            if self._stale and self._fanout.synced:
                self._stale = False
                yield self._fanout.snapshot(self._prefix)
            elif self._items:
                yield self._items.popleft()
            else:
                await self.sleep()


class Fanout:
    """The mirror and its watchers."""

    def __init__(self) -> None:
        self.synced = False
        """False until the first `resync`: there is nothing to show yet."""
        self.revision = 0
        """The mirror shows the history up to here."""
        self._entries: dict[str, Entry] = {}
        self._watchers: list[_Watcher] = []
        self._advanced = anyio.Event()

    # ── the adapter's side ──────────────────────────────────────────────────────────

    def resync(self, state: Resync) -> None:
        """Replace the mirror; every watcher gets a `Resync`."""
        self._entries = {entry.key: entry for entry in state.entries}
        self.synced = True
        self.skip(state.revision)
        for watcher in self._watchers:
            watcher.reset()

    def apply(self, event: Entry | Removed) -> None:
        """The next change; revisions rise."""
        assert event.revision > self.revision, "a feed goes forward"
        match event:
            case Entry():
                self._entries[event.key] = event
            case Removed():
                self._entries.pop(event.key, None)
        self.skip(event.revision)
        for watcher in self._watchers:
            watcher.push(event)

    def skip(self, revision: int) -> None:
        """The history went on without a change that anyone may see."""
        self.revision = revision
        self._advanced.set()
        self._advanced = anyio.Event()

    # ── the readers' side ───────────────────────────────────────────────────────────

    def snapshot(self, prefix: str = "") -> Resync:
        entries = sorted(
            (entry for key, entry in self._entries.items() if key.startswith(prefix)),
            key=lambda entry: entry.key,
        )
        return Resync(tuple(entries), self.revision)

    async def reach(self, revision: int) -> None:
        """Wait until the mirror shows `revision`."""
        while not self.synced or self.revision < revision:
            await self._advanced.wait()

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        watcher = _Watcher(self, prefix)
        self._watchers.append(watcher)
        try:
            yield watcher.read()
        finally:
            self._watchers.remove(watcher)
