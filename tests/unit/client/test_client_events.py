"""Server-sent events, however their bytes were split on the way."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.errors import BadAnswer, ConnectionLost, Unavailable
from ollama_distributed.client.events import EventReader


class Item(msgspec.Struct):
    n: int


def read(pieces):
    reader = EventReader(decoder_of(Item))
    return [item.n for piece in pieces for item in reader.feed(piece)]


STREAM = (
    b'id: 1\nevent: config\ndata: {"n":1}\n\n: still here\n\n'
    b'retry: 5\r\ndata:{"n":2}\r\n\r\ndata: {"n":3}\n\n'
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_any_split_gives_the_same_events(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert read([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == [1, 2, 3]


def test_an_error_event_is_raised():
    told = b'event: error\ndata: {"error":{"code":"unavailable","message":"gone"}}\n\n'
    with pytest.raises(Unavailable, match="gone"):
        read([told])


def test_data_of_another_program():
    with pytest.raises(BadAnswer):
        read([b"data: hello\n\n"])


def test_a_line_without_end_does_not_fill_the_memory():
    reader = EventReader(decoder_of(Item))
    with pytest.raises(BadAnswer, match="longer than"):
        any(True for _ in range(100) for _ in reader.feed(b"x" * (1 << 20)))


def test_its_end_is_always_a_loss():
    with pytest.raises(ConnectionLost):
        list(EventReader(decoder_of(Item)).finish())
