"""Who listens to which channel: each is asked by one task, while somebody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import anyio
import anyio.lowlevel
import structlog

from ollama_distributed.base.errors import NotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.events import What
from ollama_distributed.gateway.events.channels import Channel
from ollama_distributed.gateway.events.rows import Row
from ollama_distributed.gateway.tasks import Tasks

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

SLICE = 64
"""Rows that are looked at in one turn of the loop; then those who were told may write."""
FIRST_S = 5.0
"""A channel's first answer comes within that, or whoever subscribes is told so."""


class Listener(Protocol):
    def tell(self, channel: Channel, what: What, row: Row) -> None:
        """Must neither wait nor raise."""
        ...


class Hub:
    def __init__(self, channels: Mapping[str, Channel], tasks: Tasks) -> None:
        self.channels = channels
        self._tasks = tasks
        self._feeds: dict[str, _Feed] = {}
        """Of channels to which somebody listens."""

    def channel(self, name: str) -> Channel:
        """
        Raises:
            NotFound: names those that there are.
        """
        found = self.channels.get(name)
        if found is None:
            raise NotFound(f"there is no channel {name[:40]!r}; there are: {', '.join(self.channels)}")
        return found

    async def join(self, channel: Channel, listener: Listener) -> Iterable[Row]:
        """What there is now; from here on `listener` is told of changes.

        Raises:
            Unavailable: nothing was heard of it. The listener does not listen.
        """
        feed = self._feeds.get(channel.name)
        if feed is None:
            feed = self._feeds[channel.name] = _Feed(channel)
            feed.stop = self._tasks(feed.run())
        feed.coming += 1
        try:
            with anyio.fail_after(FIRST_S):
                await feed.answered.wait()
            feed.listeners.add(listener)
            return tuple(feed.rows.values())
        except TimeoutError as exc:
            raise Unavailable(f"nothing was heard of the channel {channel.name!r}; try again") from exc
        finally:
            feed.coming -= 1
            self._end_unheard(feed)

    def leave(self, channel: Channel, listener: Listener) -> None:
        """Idempotent."""
        feed = self._feeds.get(channel.name)
        if feed is not None:
            feed.listeners.discard(listener)
            self._end_unheard(feed)

    def _end_unheard(self, feed: _Feed) -> None:
        if not feed.listeners and not feed.coming:
            feed.stop()
            self._feeds.pop(feed.channel.name, None)


def _not_begun() -> None:
    """There is nothing to stop yet."""


class _Feed:
    """One channel that somebody listens to."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.rows: dict[str, Row] = {}
        self.listeners: set[Listener] = set()
        self.coming = 0
        """Who waits for its first answer."""
        self.answered = asyncio.Event()
        self.stop: Callable[[], object] = _not_begun

    async def run(self) -> None:
        while True:
            try:
                await self._take(await self.channel.ask())
                self.answered.set()
            except OllamaDistributedError as error:
                log.debug("events.not_heard", channel=self.channel.name, code=error.code)
            except Exception:  # the root of this task: one bad answer must not end the channel
                log.exception("events.channel_broke", channel=self.channel.name)
            await anyio.sleep(self.channel.every_s)

    async def _take(self, found: Iterable[Row]) -> None:
        """Tell what is not as it was."""
        seen: set[str] = set()
        for number, row in enumerate(found, 1):
            before = self.rows.get(row.id)
            if row.over:
                if before is not None:
                    del self.rows[row.id]
                    self._tell("gone", row)
            else:
                seen.add(row.id)
                if before is None or before.data != row.data:
                    self.rows[row.id] = row
                    self._tell("changed", row)
            if number % SLICE == 0:
                await anyio.lowlevel.checkpoint()
        for gone in self.rows.keys() - seen:
            self._tell("gone", self.rows.pop(gone))

    def _tell(self, what: What, row: Row) -> None:
        for listener in tuple(self.listeners):
            listener.tell(self.channel, what, row)
