"""A replica that has become slow, and one that always was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.paces import WINDOW, Paces

A, B, C = ((NodeId(name), "m") for name in "abc")


def speaks(paces: Paces, replica: tuple[NodeId, str], rate: float, seconds: int = 60) -> int | None:
    """Second of it in which it was slow."""
    for second in range(seconds):
        if paces.said(replica, round(rate), 1.0):
            return second
    return None


def test_ten_times_slower_than_before_is_slow_within_some_seconds() -> None:
    paces = Paces()
    assert speaks(paces, A, 50.0) is None
    second = speaks(paces, A, 5.0)
    assert second is not None
    assert second < 2 * WINDOW


def test_a_machine_that_always_was_slow_is_not() -> None:
    paces = Paces()
    slow = 0
    for _ in range(10):
        slow += speaks(paces, B, 4.0, 30) is not None
        assert speaks(paces, A, 400.0, 30) is None
    assert slow == 0, "it is known by itself before its peer is"
    speaks(paces, C, 400.0)
    slow = sum(speaks(paces, (NodeId("d"), "m"), 4.0, 30) is not None for _ in range(20))
    assert slow <= 4, "one that came later is suspected until it is known"


def test_one_that_is_new_and_ten_times_slower_than_its_peers_is_slow() -> None:
    paces = Paces()
    speaks(paces, A, 50.0)
    speaks(paces, C, 60.0)
    assert speaks(paces, B, 5.0) == WINDOW - 1


def test_busy_slots_are_no_sickness() -> None:
    paces = Paces()
    speaks(paces, A, 60.0)
    for _ in range(20):
        assert not paces.said(A, 4 * 15, 4.0), "four answers at once, a quarter of the speed for each"


def test_it_is_judged_anew_when_it_comes_back_and_what_is_slow_for_good_is_usual_in_the_end() -> None:
    paces = Paces()
    speaks(paces, A, 50.0, 300)
    turns = 0
    while speaks(paces, A, 5.0, 120) is not None:
        turns += 1
        assert turns < 1000
    assert turns > 10


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 4)), max_size=80))
def test_a_speed_that_hardly_changes_is_never_slow(seen: list[tuple[int, float]]) -> None:
    paces = Paces()
    for more, seconds in seen:
        assert not paces.said(A, round((20 + more) * seconds), seconds if round(20 * seconds) else 0.0)
