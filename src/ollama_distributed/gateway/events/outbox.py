"""What one listener still has to be told: bounded, and the newest of each row only."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from ollama_distributed.base.events import What
from ollama_distributed.gateway.events.channels import Channel
from ollama_distributed.gateway.events.rows import Row

MOST = 256
"""Events; then the oldest is dropped, and the reader told."""
MOST_REPLIES = 64
"""Answers to commands that a client may leave unread."""


class Unread(Exception):
    """The client sends, and does not read."""


class Outbox:
    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._events: OrderedDict[tuple[str, str], tuple[Channel, What, Row]] = OrderedDict()
        """By channel and row."""
        self._replies: deque[Iterator[str]] = deque()
        self.dropped = 0
        """Events since `gap` was told last."""

    def add(self, channel: Channel, what: What, row: Row) -> None:
        key = (channel.name, row.id)
        if key not in self._events and len(self._events) >= self._most:
            self._events.popitem(last=False)
            self.dropped += 1
        self._events[key] = (channel, what, row)

    def reply(self, messages: Iterable[str]) -> None:
        """Messages that come before all events, whole.

        Raises:
            Unread: too many wait already.
        """
        if len(self._replies) >= MOST_REPLIES:
            raise Unread("too many answers wait to be read")
        self._replies.append(iter(messages))

    def next_reply(self) -> str | None:
        while self._replies:
            found = next(self._replies[0], None)
            if found is not None:
                return found
            self._replies.popleft()
        return None

    def next_event(self) -> tuple[Channel, What, Row] | None:
        return self._events.popitem(last=False)[1] if self._events else None

    def forget(self, channel: Channel) -> None:
        """Nobody wants to hear of it any more."""
        for key in [key for key in self._events if key[0] == channel.name]:
            del self._events[key]

    def __bool__(self) -> bool:
        return bool(self._events or self._replies or self.dropped)
