"""Which replica is the odd one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.coordination.nats.damage import differing
from ollama_distributed.adapters.coordination.nats.system import StreamCount
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId


def counts(*held: tuple[int, int]) -> dict[NodeId, StreamCount]:
    return {
        NodeId(f"n{i}"): StreamCount(messages=messages, last_seq=last_seq)
        for i, (messages, last_seq) in enumerate(held, start=1)
    }


@pytest.mark.parametrize(
    ("held", "odd"),
    [
        ([(5, 9), (5, 9), (5, 9)], ()),
        ([(5, 9), (3, 9), (5, 9)], ("n2",)),
        ([(5, 9), (3, 8), (5, 9)], ()),  # behind, not damaged
        ([(5, 9), (3, 9)], ("n2",)),
        ([(3, 9), (5, 9), (4, 8)], ("n1",)),
        ([(5, 9), (5, 9), (4, 9), (3, 9), (5, 9)], ("n3", "n4")),
    ],
)
def test_the_one_that_lost_messages_differs(held: list[tuple[int, int]], odd: tuple[str, ...]) -> None:
    assert differing(counts(*held)) == odd


def test_nothing_is_said_of_replicas_under_way() -> None:
    for held in ([], [(5, 9)], [(5, 9), (5, 10), (5, 11)]):
        with pytest.raises(Unavailable):
            differing(counts(*held))


@given(st.lists(st.tuples(st.integers(0, 3), st.just(9)), min_size=2, max_size=5))
def test_some_replica_is_always_believed(held: list[tuple[int, int]]) -> None:
    assert len(differing(counts(*held))) < len(held)
