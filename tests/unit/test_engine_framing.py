"""Streamed bodies are cut the same however the bytes arrive."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.framing import Lines, ServerSentEvents
from ollama_distributed.base.errors import EngineError

payloads = st.lists(
    st.binary(min_size=1, max_size=30).filter(lambda b: not set(b) & set(b"\r\n")), max_size=8
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(payloads, st.lists(st.integers(0, 500)), st.sampled_from([b"\n", b"\r\n"]))
def test_events_do_not_depend_on_the_cuts(events: list[bytes], places: list[int], eol: bytes) -> None:
    stream = b"".join(b"event: x" + eol + b": note" + eol + b"data: " + e + eol + eol for e in events)
    parser = ServerSentEvents()
    assert [e for part in cut(stream, places) for e in parser.feed(part)] == events


@given(payloads, st.lists(st.integers(0, 500)))
def test_lines_do_not_depend_on_the_cuts(lines: list[bytes], places: list[int]) -> None:
    parser = Lines()
    seen = [line for part in cut(b"\n".join(lines) + b"\ntail", places) for line in parser.feed(part)]
    assert seen == (lines or [b""])
    assert parser.rest() == b"tail"


@given(
    st.lists(st.sampled_from([b'{"a":1}', b"{}", b"x", b'{"b":"}"}']), max_size=6),
    st.lists(st.integers(0, 99)),
)
def test_whole_events_take_the_short_way_only_between_events(events: list[bytes], places: list[int]) -> None:
    stream = b"".join(b"data: " + event + b"\n\n" for event in events)
    parser = ServerSentEvents()
    assert [e for part in cut(stream, places) for e in parser.feed(part)] == events


@pytest.mark.parametrize("before", [b"data: {", b"data: a\n"])
def test_a_whole_event_behind_a_part_belongs_to_it(before: bytes) -> None:
    parser = ServerSentEvents()
    assert parser.feed(before) == []
    (event,) = parser.feed(b"data: {}\n\n")
    assert event in (b"{data: {}", b"a\n{}")


def test_several_data_lines_are_one_event() -> None:
    assert ServerSentEvents().feed(b"data: a\ndata:b\n\n") == [b"a\nb"]


def test_memory_is_bounded() -> None:
    with pytest.raises(EngineError):
        Lines(max_bytes=100).feed(b"x" * 101)
    with pytest.raises(EngineError):
        ServerSentEvents(max_bytes=100).feed(b"data: 0123456789\n" * 20)
    with pytest.raises(EngineError):
        ServerSentEvents(max_bytes=100).feed(b"data: {" + b"x" * 100 + b"}\n\n")
