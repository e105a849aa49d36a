"""Chunks of an engine's answer that go past the HTTP parser, beside those that do not."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.http import Exchange, UnixAddress
from ollama_distributed.adapters.engines.kept import Connection
from ollama_distributed.base.errors import EngineError, Internal, OllamaDistributedError, RunnerDied

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


class Wire(asyncio.Transport):
    def write(self, data: object) -> None: ...

    def abort(self) -> None: ...


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Reader:
    """What an exchange tells of bytes that are put in by hand."""

    def __init__(self, *, defect: bool = False) -> None:
        self.parts: list[bytes] = []
        self.ended = False
        self.error: OllamaDistributedError | None = None
        self._defect = defect
        self.exchange = Exchange(
            UnixAddress("/nobody"),
            b"",
            on_head=None,
            on_body=self._body,
            on_end=self._end,
            on_error=self._fail,
            connect_deadline_s=1.0,
            idle_deadline_s=None,
        )
        Connection(self.exchange).connection_made(Wire())

    def _body(self, data: bytes) -> None:
        if self._defect:
            raise KeyError("token")
        self.parts.append(data)

    def _end(self) -> None:
        self.ended = True

    def _fail(self, error: OllamaDistributedError) -> None:
        self.error = error


def read(*pieces: bytes, defect: bool = False) -> Reader:
    async def main() -> Reader:
        reader = Reader(defect=defect)
        for piece in pieces:
            reader.exchange.data_received(piece)
        reader.exchange.connection_lost(None)
        return reader

    return asyncio.run(main())


@given(
    st.lists(st.sampled_from([b"a", b"\r\n", b"4\r\nabcd\r\n", b"0\r\n\r\n", b"x" * 20]), max_size=6),
    st.lists(st.integers(0, 300)),
    st.booleans(),
)
def test_the_body_does_not_depend_on_the_cuts(bodies: list[bytes], places: list[int], whole: bool) -> None:
    pieces = [HEAD, *map(chunk, bodies), LAST]
    if not whole:
        wire = b"".join(pieces)
        edges = [0, *sorted(place % (len(wire) + 1) for place in places), len(wire)]
        pieces = [wire[a:b] for a, b in itertools.pairwise(edges)]
    reader = read(*pieces)
    assert b"".join(reader.parts) == b"".join(bodies)
    assert (reader.ended, reader.error) == (True, None)
    if whole:
        assert reader.parts == bodies


def test_chunks_that_came_together_are_told_together() -> None:
    three = b"".join(map(chunk, (b"a", b"\r\n", b"c")))
    for reader in (read(HEAD, three, LAST), read(HEAD, three + LAST), read(HEAD, three, chunk(b"d") + LAST)):
        assert reader.parts[0] == b"a\r\nc"
        assert reader.ended


def test_an_answer_that_ends_behind_a_whole_chunk_is_broken() -> None:
    reader = read(HEAD, chunk(b"a"), chunk(b"b"))
    assert reader.parts == [b"a", b"b"]
    assert isinstance(reader.error, RunnerDied)


@pytest.mark.parametrize("size", [b"", b"-1", b"zz", b"2", b"\xff"])
def test_a_size_that_is_none_is_no_chunk(size: bytes) -> None:
    reader = read(HEAD, chunk(b"a"), size + b"\r\nb\r\n", LAST)
    assert reader.parts[0] == b"a"
    assert isinstance(reader.error, EngineError)


def test_a_body_with_a_length_is_never_taken_for_chunks() -> None:
    body = chunk(b"abc")
    reader = read(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)
    assert b"".join(reader.parts) == body


def test_a_defect_of_the_reader_ends_the_exchange() -> None:
    reader = read(HEAD, chunk(b"a"), defect=True)
    assert isinstance(reader.error, Internal)
    assert isinstance(reader.error.__cause__, KeyError)
