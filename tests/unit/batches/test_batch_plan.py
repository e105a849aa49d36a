"""Which lines a batch may have, how it goes on, and how many of its lines run at once."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.batches import FINAL, Batch, BatchAsk, BatchFault, BatchStatus
from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId
from ollama_distributed.batches.plan import (
    MOST_FAULTS,
    STARVED_S,
    Judge,
    Line,
    Seats,
    check_ask,
    lanes,
    may_see,
    moved,
    owner_of,
    read_line,
)

CHAT = "/v1/chat/completions"


def line(number: int = 1, **changes: Any) -> bytes:
    row = {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": {"model": "m"}, **changes}
    return json.dumps(row).encode()


def test_a_good_line() -> None:
    read = read_line(line(body={"model": "m", "messages": []}), CHAT)
    assert read == Line(custom_id="r1", model="m", body=b'{"model": "m", "messages": []}')


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b"[]", "invalid_request"),
        (b'{"custom_id": "a"}', "invalid_request"),
        (line(method="GET"), "invalid_method"),
        (line(url="/v1/embeddings"), "mismatched_url"),
        (line(custom_id=""), "invalid_custom_id"),
        (line(custom_id="x" * 513), "invalid_custom_id"),
        (line(body={}), "missing_model"),
        (line(body={"model": "m", "stream": True}), "invalid_stream"),
    ],
)
def test_what_a_line_may_not_be(data: bytes, code: str) -> None:
    read = read_line(data, CHAT)
    assert isinstance(read, BatchFault)
    assert read.code == code


def test_a_file_is_judged_as_a_whole() -> None:
    judge = Judge(CHAT)
    for number, data in enumerate([line(1), b"", line(2), line(1), b"no"], 1):
        judge.take(number, data)
    verdict = judge.verdict()
    assert verdict is not None
    assert [(fault.line, fault.code) for fault in verdict.data] == [
        (4, "duplicate_custom_id"),
        (5, "invalid_json_line"),
    ]
    assert Judge(CHAT).verdict().data[0].code == "empty_file"  # type: ignore[union-attr]
    many = Judge(CHAT)
    for number in range(3 * MOST_FAULTS):
        many.take(number, b"no")
        if many.enough:
            break
    assert len(many.verdict().data) == MOST_FAULTS  # type: ignore[union-attr]


@pytest.mark.parametrize("window", ["", "24", "0h", "15d", "1w", "-1h", "24h "])
def test_a_window_is_a_time(window: str) -> None:
    with pytest.raises(Invalid):
        check_ask(BatchAsk(input_file_id="f", endpoint=CHAT, completion_window=window))


def test_what_may_be_asked() -> None:
    assert check_ask(BatchAsk(input_file_id="f", endpoint=CHAT)) == 86_400
    with pytest.raises(Invalid):
        check_ask(BatchAsk(input_file_id="f", endpoint="/api/chat"))
    with pytest.raises(Invalid):
        check_ask(BatchAsk(input_file_id="f", endpoint=CHAT, metadata={"a": "x" * 513}))


@given(st.lists(st.sampled_from(get_args(BatchStatus)), max_size=12))
def test_a_batch_ends_once(steps: list[BatchStatus]) -> None:
    """Whatever is tried in whatever order: from an end it goes nowhere, and it never goes back."""
    batch = Batch(id="b", endpoint=CHAT, input_file_id="f", completion_window="24h", created_at=1)
    order: list[BatchStatus] = [batch.status]
    for number, step in enumerate(steps):
        try:
            batch = moved(batch, step, float(number))
        except Conflict:
            assert batch.status == order[-1]
        else:
            assert order[-1] not in FINAL
            order.append(step)
    assert len(order) == len(set(order))


seats = st.builds(
    Seats,
    slots=st.integers(0, 64),
    busy=st.integers(0, 64),
    queued=st.integers(0, 64),
)


@given(seats, st.integers(0, 64))
def test_lines_take_only_what_others_leave(given_seats: Seats, mine: int) -> None:
    most = lanes(given_seats, mine, 0.0)
    others = given_seats.busy + given_seats.queued - mine
    if given_seats.slots > 1 and others >= 0:
        assert most + others < given_seats.slots or most == 0, "one slot stays free"
    assert most <= max(given_seats.slots, 1)
    assert lanes(given_seats, mine, STARVED_S) >= 1, "no batch waits for ever"


def test_whose_it_is() -> None:
    first, second = Identity("user", KeyId("a")), Identity("user", KeyId("b"))
    assert may_see(owner_of(first), owner_of(first))
    assert not may_see(owner_of(first), owner_of(second))
    assert not may_see(owner_of(first), owner_of(Identity("user", KeyId("a"), team="other")))
    assert not may_see(owner_of(first), owner_of(Identity("local")))
    assert may_see(owner_of(first), owner_of(Identity("admin", KeyId("c"))))
    anna = Identity("user", KeyId("s1"), user="anna")
    assert may_see(owner_of(anna), owner_of(Identity("user", KeyId("s2"), user="anna"))), "in another session"
