"""Forms as they come: any cut gives the same, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid, Malformed, OllamaDistributedError, UnsupportedMedia
from ollama_distributed.gateway.multipart import (
    Event,
    Field,
    FileBegins,
    FileData,
    FileEnds,
    Multipart,
    boundary_of,
)

PURPOSE = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'


def form(content: bytes, *, before: bytes = PURPOSE, after: bytes = b"") -> bytes:
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".jsonl"\r\nX: y\r\n\r\n'
    return before + head + content + b"\r\n" + after + b"--B--\r\nepilogue"


def read(data: bytes, cuts: list[int]) -> list[Event]:
    parser = Multipart(b"B")
    events: list[Event] = []
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    for begin, end in zip([0, *places], [*places, len(data)], strict=True):
        events += parser.feed(data[begin:end])
    parser.finish()
    return events


def joined(events: list[Event]) -> tuple[list[Event], bytes]:
    content = b"".join(event.data for event in events if isinstance(event, FileData))
    return [event for event in events if not isinstance(event, FileData)], content


@given(st.binary(max_size=200), st.lists(st.integers(0, 1000), max_size=20))
def test_any_cut_is_the_same(content: bytes, cuts: list[int]) -> None:
    assume(b"--B" not in content)
    events, got = joined(read(form(content), cuts))
    assert got == content
    assert events == [Field("purpose", "batch"), FileBegins("file", 'a "b".jsonl'), FileEnds()]


@given(st.sampled_from([b"\r\n--", b"\r\n--\r\n", b"\r\n-", b"\r", b"\n--B--", b"x--B"]), st.integers(1, 40))
def test_what_looks_like_a_boundary_is_content(content: bytes, cut: int) -> None:
    assert joined(read(form(content), [*range(0, 300, cut)]))[1] == content


@given(st.binary(max_size=300), st.integers(0, 400))
def test_it_takes_or_refuses_whatever_comes(data: bytes, cut: int) -> None:
    whole = form(b"{}")
    try:
        read(whole[:cut] + data + whole[cut:], [])
    except OllamaDistributedError:
        return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no form at all, but long enough to be seen as none",
        PURPOSE,
        form(b"x")[:-20],
        b"--B\r\n\r\nno head\r\n--B--",
        b'--B\r\nContent-Disposition: attachment; name="x"\r\n\r\n1\r\n--B--',
        b"--B\r\nContent-Disposition: form-data\r\n\r\n1\r\n--B--",
        b"--B\r\nX: " + b"x" * 9000 + b"\r\n\r\n\r\n--B--",
    ],
)
def test_what_is_no_form(data: bytes) -> None:
    with pytest.raises(Malformed):
        read(data, [])


def test_its_bounds() -> None:
    with pytest.raises(Invalid):
        read(PURPOSE * 40, [])
    with pytest.raises(Invalid):
        read(form(b"x", before=PURPOSE.replace(b"batch", b"b" * 17_000)), [])
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    assert boundary_of("multipart/form-data; charset=utf-8; Boundary=xyz") == b"xyz"
    with pytest.raises(UnsupportedMedia):
        boundary_of("application/json")
    with pytest.raises(Invalid):
        boundary_of("multipart/form-data")
