"""A stream whose connection is lost, or whose server stops or hangs, is taken up again. Pure.

The server keeps an answer for a minute under its request id; it is told how many bytes of text
came, and gives the rest. Where it cannot, the caller sees how the connection was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import msgspec

from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import ClientError, TimedOut, Unavailable

T = TypeVar("T")

MORE_RETRIES = 6
"""Rounds over the servers: with their growing waits some 8 s, twice what a node takes to start."""


class Held(Generic[T]):
    """What came of one stream."""

    def __init__(self, call: Call[T], retries: int, leave: Callable[[], None] = lambda: None) -> None:
        """`leave`: the server hangs, another one is to be asked first."""
        self._call = call
        self._leave = leave
        self._may = retries > 0 and call.text is not None
        self._request_id = ""
        self._bytes = 0
        self._bytes_at_loss = -1
        self._lost: Unavailable | TimedOut | None = None
        self._complete = False
        self.retries = retries
        """Rounds over the servers for the next connection."""

    def began(self, headers: Mapping[str, str]) -> None:
        self._request_id = headers.get("x-request-id", "")

    def got(self, item: T) -> None:
        if self._call.text is not None:
            self._bytes += sum(len(part.encode()) for part in self._call.text(item))
        self._complete = self._call.done is not None and self._call.done(item)

    def lost(self, error: ClientError) -> Call[T]:
        """The call for the rest.

        Raises:
            ClientError: there is none. Why it cannot be taken up says less than how it was lost.
        """
        lost = error if isinstance(error, Unavailable | TimedOut) else None
        again = self._may and not self._complete and self._bytes > self._bytes_at_loss
        if lost is None or not again or not self._request_id:
            raise error if self._lost is None else self._lost
        if isinstance(lost, TimedOut):
            self._leave()
        self._lost, self._bytes_at_loss = lost, self._bytes
        self.retries = max(self.retries, MORE_RETRIES)
        headers = {"x-request-id": self._request_id, "x-ollama-resume-at": str(self._bytes)}
        return msgspec.structs.replace(self._call, headers=headers, repeat="always")
