"""Cuts a streamed body into records: lines (NDJSON) or server-sent events.

Pure and incremental: bytes in, complete records out, the rest kept, with a bound on it.
Sources: WHATWG HTML 9.2 "Server-sent events" (only `data` matters to engines).
"""

from __future__ import annotations

from ollama_distributed.base.errors import EngineError

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""One event or line. A final event may repeat settings and a long prompt's token ids."""


class Lines:
    """Splits at LF; a CR before it is dropped."""

    def __init__(self, max_bytes: int = MAX_RECORD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self.held_bytes = 0
        """Of the line that is not complete."""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now.

        Raises:
            EngineError: a line is longer than the bound.
        """
        first, *more = data.split(b"\n")
        self._parts.append(first)
        self.held_bytes += len(first)
        if self.held_bytes > self._max_bytes:
            raise EngineError(f"the engine sent a record over {self._max_bytes} B")
        if not more:
            return []
        lines = [b"".join(self._parts), *more[:-1]]
        self._parts, self.held_bytes = [more[-1]], len(more[-1])
        return [line.removesuffix(b"\r") for line in lines]

    def rest(self) -> bytes:
        """What came after the last line end."""
        return b"".join(self._parts)


class ServerSentEvents:
    """Yields the data of each event; comments, `event`, `id` and `retry` are skipped."""

    def __init__(self, max_bytes: int = MAX_RECORD_BYTES) -> None:
        self._lines = Lines(max_bytes)
        self._max_bytes = max_bytes
        self._data: list[bytes] = []
        self._size = 0
        self.held_bytes = 0
        """Of the event that is not complete."""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are complete now.

        Raises:
            EngineError: an event is longer than the bound.
        """
        if (
            data.startswith(b"data: {")
            and data.endswith(b"}\n\n")
            and data.find(b"\n") == len(data) - 2
            and not self.held_bytes
            and len(data) <= self._max_bytes
        ):
            return [data[6:-2]]  # how llama-server sends nearly all tokens: one whole event
        if data.startswith(b"data: ") and data.endswith(b"\n\n") and not self.held_bytes:
            whole = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(whole) and b"\r" not in data and len(data) <= self._max_bytes:
                return whole  # several of them, and nothing else
        events = []
        for line in self._lines.feed(data):
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data, self._size = [], 0
            elif line.startswith(b"data:"):
                value = line[5:].removeprefix(b" ")
                self._size += len(value)
                if self._size > self._max_bytes:
                    raise EngineError(f"the engine sent an event over {self._max_bytes} B")
                self._data.append(value)
        self.held_bytes = self._size + len(self._data) + self._lines.held_bytes
        return events


def event_lines(data: bytes) -> bytes | None:
    """The JSON objects of a piece that is whole events and nothing else, each on a line; None: another
    piece."""
    if data.startswith(b"data: {") and data.endswith(b"}\n\n"):
        return data[6:].replace(b"\n\ndata: ", b"\n")  # in JSON no text holds the end of a line
    return None


class Whole:
    """One record: all of the body."""

    def __init__(self, max_bytes: int = MAX_RECORD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self.held_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Nothing: see `rest`.

        Raises:
            EngineError: the body is longer than the bound.
        """
        self._parts.append(data)
        self.held_bytes += len(data)
        if self.held_bytes > self._max_bytes:
            raise EngineError(f"the engine sent an answer over {self._max_bytes} B")
        return []

    def rest(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)
