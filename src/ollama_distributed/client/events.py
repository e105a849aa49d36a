"""Reads server-sent events (WHATWG HTML 9.2) whose data is JSON. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from ollama_distributed.client.answers import Lines, StreamReader, line_error
from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import ConnectionLost

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Reader(Protocol[T_co]):
    """Turns the bytes of one answer into structs."""

    def feed(self, data: bytes) -> Iterator[T_co]: ...

    def finish(self) -> Iterator[T_co]: ...


def reader_of(call: Call[T]) -> Reader[T]:
    assert call.done is not None, "only a stream has a reader"
    return EventReader(call.decode) if call.events else StreamReader(call.decode, call.done)


class EventReader(Generic[T]):
    """Of an answer without an end: `finish` always raises `ConnectionLost`.

    The server puts an event's data on one line, as JSON allows; names and ids of events are not
    needed, as the data says what it is. Comments only show that the server is there.
    """

    def __init__(self, decode: Callable[[bytes], T]) -> None:
        self._decode = decode
        self._lines = Lines()

    def feed(self, data: bytes) -> Iterator[T]:
        for line in self._lines.feed(data):
            field, colon, value = line.rstrip(b"\r").partition(b":")
            if field == b"data" and colon:
                error = line_error(value)
                if error is not None:
                    raise error
                yield self._decode(value)

    def finish(self) -> Iterator[T]:
        raise ConnectionLost("the server ended the watch")
