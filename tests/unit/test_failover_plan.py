"""When an answer goes on elsewhere, when it ends, and when silence is a stall: examples and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import (
    ContextExceeded,
    EngineError,
    Internal,
    Invalid,
    ModelNotFound,
    OllamaDistributedError,
    QueueFull,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.streams import failover
from ollama_distributed.streams.failover import Budget, Stand, wait_before
from ollama_distributed.streams.gaps import READING_LOOKS, SPEAKING_LOOKS, TIMES, Gaps

SPEAKING = Stand(began=True, sent=True, resumable=True)


def at(**fields: object) -> Stand:
    return Stand(**{"began": True, "sent": True, "resumable": True, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [Unavailable(), RunnerDied()])
def test_a_lost_source_is_replaced_at_once(error: OllamaDistributedError) -> None:
    assert wait_before(error, SPEAKING) == 0.0


@pytest.mark.parametrize(
    ("error", "stand"),
    [
        (Invalid(), at()),
        (EngineError(), at()),
        (Internal(), at()),
        (ContextExceeded(""), at()),
        (QueueFull(""), at()),  # a source at work does not say this
        (Unavailable(), at(began=False)),  # the router has tried
        (Unavailable(), at(resumable=False)),
        (RunnerDied(), at(deaths=1)),
        (RunnerDied(), at(deaths=1, tries=1)),
        (Unavailable(), at(moves=failover.MOST_MOVES)),
        (Unavailable(), at(tries=3, lost_s=failover.PATIENCE_S)),
        (ModelNotFound(), at(tries=1)),
    ],
)
def test_what_ends_an_answer(error: OllamaDistributedError, stand: Stand) -> None:
    assert wait_before(error, stand) is None


def test_what_nobody_saw_begins_again_though_it_cannot_be_continued() -> None:
    assert wait_before(Unavailable(), at(sent=False, resumable=False)) == 0.0


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_tries_come_later_and_later_but_not_too_late(tries: int, chance: float, other: float) -> None:
    wait_s = wait_before(QueueFull(""), at(tries=tries), chance)
    assert wait_s is not None
    assert failover.FIRST_WAIT_S / 2 <= wait_s <= failover.LONGEST_WAIT_S
    later = wait_before(QueueFull(""), at(tries=tries + 2), other)
    assert later is not None
    assert later >= wait_s / 2


@given(st.integers(0, 5000), st.integers(1, 400))
def test_a_budget_lets_a_burst_begin_and_the_rest_in_turn(live: int, asked: int) -> None:
    budget = Budget()
    rate = max(failover.BURST, failover.SHARE * live)
    waits = [budget.take(100.0, live) for _ in range(asked)]
    assert waits == sorted(waits)
    for second in range(10):
        began = sum(second <= wait < second + 1 for wait in waits)
        assert began <= rate + (rate + 1 if second == 0 else 1)
    assert budget.take(100.0 + asked / rate, live) <= 1 / rate + 1e-6, "all is forgiven in time"


# ── gaps ────────────────────────────────────────────────────────────────────────────


def test_a_model_that_was_never_slow_has_two_seconds() -> None:
    gaps = Gaps()
    for _ in range(1000):
        gaps.passed(5, 0)
    assert gaps.limit == SPEAKING_LOOKS
    assert Gaps(READING_LOOKS).limit == READING_LOOKS


def test_a_slow_model_gets_eight_times_its_gaps_and_loses_them_when_it_is_fast() -> None:
    gaps = Gaps()
    for _ in range(50):
        gaps.passed(1, 5)
    assert gaps.limit == TIMES * 6
    for _ in range(300):
        gaps.passed(50, 0)
    assert gaps.limit == SPEAKING_LOOKS


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 600)), max_size=300))
def test_the_limit_is_never_below_two_seconds_nor_below_most_gaps(passed: list[tuple[int, int]]) -> None:
    gaps = Gaps()
    for signs, quiet in passed:
        gaps.passed(signs, quiet)
    assert SPEAKING_LOOKS <= gaps.limit <= TIMES * 480
    total = sum(signs for signs, _ in passed)
    above = sum(quiet > gaps.limit for _, quiet in passed)
    assert above <= 0.01 * total + 1
