"""The queue of a node: what is told, who is refused, who gives way; in a time of its own."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.admission.bounds import Bounds
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.errors import DeadlineExceeded, OllamaDistributedError, QueueFull
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Ask, Run

MODEL = "m"
ANSWER = 100
"""Tokens of every answer; prompts have none."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Waiter:
    def __init__(self, number: int, ask: Ask) -> None:
        self.number = number
        self.ask = ask
        self.slot = True
        self.cost = 0.0
        self.why: OllamaDistributedError | None = None

    def refuse(self, error: OllamaDistributedError) -> None:
        assert self.why is None, "refused once"
        self.why = error


class Node:
    """Slots that all take `service_s` for an answer."""

    def __init__(self, slots: int = 2, service_s: float = 1.0, **bounds: int) -> None:
        self.clock = Clock()
        self.queue: Admission[Waiter] = Admission(self.clock, Bounds(**bounds))
        self.slots = slots
        self.service_s = service_s
        self._running: list[tuple[float, int, Run]] = []
        self._number = 0
        self.begun: list[Waiter] = []

    def come(self, key: str = "a", priority: Priority = "normal", within_s: float | None = None) -> Waiter:
        """Raises `QueueFull`."""
        self._number += 1
        ask = Ask(key=key, priority=priority, most_tokens=ANSWER, within_s=within_s)
        waiter = Waiter(self._number, ask)
        if len(self._running) < self.slots and MODEL not in self.queue:
            self._begin(waiter)
        else:
            self.queue.join(MODEL, waiter)
        return waiter

    def _begin(self, waiter: Waiter) -> None:
        run = self.queue.began(MODEL, waiter.ask, self.slots)
        heapq.heappush(self._running, (self.clock.now + self.service_s, waiter.number, run))
        self.begun.append(waiter)

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self._running and self._running[0][0] <= end:
            self.clock.now, _, run = heapq.heappop(self._running)
            run.tokens = ANSWER
            self.queue.ended(run)
            if MODEL in self.queue:
                waiter = self.queue.first(MODEL)
                assert waiter is not None
                self.queue.grant(MODEL, waiter)
                self._begin(waiter)
        self.clock.now = end

    def learnt(self) -> Node:
        self.come()
        self.run(self.service_s)
        return self


def test_nothing_is_told_before_something_was_measured() -> None:
    node = Node(slots=1)
    node.come()
    place = node.queue.join(MODEL, Waiter(99, Ask()))
    assert (place.position, place.eta_s) == (1, None)


def test_who_waits_is_told_the_wait_that_comes() -> None:
    node = Node(slots=2, service_s=3.0).learnt()
    for _ in range(2):
        node.come()
    node.run(1.0)
    waiters = [node.come() for _ in range(5)]
    places = [node.queue.place(MODEL, one) for one in waiters]
    assert [one.position for one in places] == [1, 2, 3, 4, 5]
    assert [one.eta_s for one in places] == pytest.approx([2.0, 2.0, 5.0, 5.0, 8.0])
    node.run(60.0)
    seen = node.queue.figures().eta_error
    assert seen is not None
    # All of what was told came true, within the finest step of the histogram.
    off = sum(
        count for bound, count in zip((*seen.bounds, 1e9), seen.counts, strict=True) if abs(bound) > 0.2
    )
    assert (sum(seen.counts), off) == (5, 0)


def test_a_full_queue_says_when_it_will_be_drained() -> None:
    node = Node(slots=2, service_s=2.0, total=10).learnt()
    for _ in range(12):
        node.come()
    with pytest.raises(QueueFull, match="maximum pending requests exceeded") as refused:
        node.come()
    # Ten wait, one begins each second, and two that run have two seconds to go.
    assert refused.value.retry_after_s == pytest.approx(12.0)
    assert node.queue.refusal(Ask(key="a")) is not None
    assert node.queue.refusal(Ask(key="b")) is None
    assert node.queue.figures().refused == {"full": 2}


def test_the_key_that_holds_most_gives_way_to_one_that_holds_less() -> None:
    node = Node(slots=1, total=4).learnt()
    flood = [node.come("flood") for _ in range(5)]
    assert node.queue.waiting == 4
    other = node.come("other")
    assert isinstance(flood[-1].why, QueueFull)
    assert node.queue.waiting == 4
    node.come("other")
    with pytest.raises(QueueFull):
        node.come("other")  # two of each now
    node.run(3.0)
    assert node.begun[-1] is other


def test_a_batch_gives_way_to_anybody_and_nobody_to_a_batch() -> None:
    node = Node(slots=1, total=2).learnt()
    node.come()
    batch = [node.come("b", "batch") for _ in range(2)]
    node.come("u", "interactive")
    assert [one.why is None for one in batch] == [True, False]
    node.come("v", "normal")
    assert batch[0].why is not None
    with pytest.raises(QueueFull):
        node.come("w", "batch")


def test_a_wait_that_would_be_too_long_is_refused_at_once() -> None:
    node = Node(slots=1, service_s=4.0).learnt()
    node.come()
    node.come()
    assert node.come(within_s=9.0).why is None
    with pytest.raises(QueueFull, match=r"12.0 s, longer than the 5 s") as refused:
        node.come(within_s=5.0)
    assert refused.value.retry_after_s == pytest.approx(7.0)
    assert node.queue.waiting == 2
    assert node.queue.figures().refused == {"deadline": 1}


def test_nobody_gives_way_to_one_that_is_refused_for_its_deadline() -> None:
    node = Node(slots=1, service_s=4.0, total=3).learnt()
    flood = [node.come("flood") for _ in range(4)]
    with pytest.raises(QueueFull, match="longer than the 1 s"):
        node.come("other", within_s=1.0)
    assert [one.why for one in flood] == [None] * 4
    assert node.queue.waiting == 3
    assert node.come("other", within_s=5.0).why is None
    assert [one.why is None for one in flood] == [True, True, True, False]


def test_who_waited_too_long_leaves() -> None:
    node = Node(slots=1).learnt()
    node.come()
    waiter = node.come()
    node.queue.expired(MODEL, waiter, DeadlineExceeded("too long"))
    assert isinstance(waiter.why, DeadlineExceeded)
    assert (node.queue.waiting, MODEL in node.queue) == (0, False)


def test_questions_without_an_answer_are_measured_too() -> None:
    node = Node(slots=1)
    run = node.queue.began(MODEL, Ask(prompt_tokens=50, most_tokens=0), 1)
    node.clock.now += 2.0
    run.tokens = 0
    node.queue.ended(run)
    node.queue.ended(run)  # idempotent
    node.queue.began(MODEL, Ask(prompt_tokens=50, most_tokens=0), 1)
    assert node.queue.join(MODEL, Waiter(1, Ask(prompt_tokens=50, most_tokens=0))).eta_s == pytest.approx(2.0)


def test_rows_say_who_waits_where() -> None:
    node = Node(slots=1, service_s=2.0).learnt()
    for key, priority in (("a", "normal"), ("a", "normal"), ("b", "batch"), ("b", "interactive")):
        node.come(key, priority)  # type: ignore[arg-type]
    node.run(0.5)
    (row,) = node.queue.rows({MODEL: "tiny", "other": "idle"}, "n1")
    assert (row.model, row.node, row.running, row.slots) == ("tiny", "n1", 1, 1)
    assert (row.waiting, row.keys, dict(row.classes)) == (3, 2, {"interactive": 1, "normal": 1, "batch": 1})
    assert row.oldest_s == pytest.approx(0.5)
    assert row.requests_per_s == pytest.approx(0.5)
    assert row.eta_s == pytest.approx(1.5 + 2.0 + 2.0)


def test_a_flood_of_ten_times_the_capacity_costs_another_key_no_more_than_a_slot_that_becomes_free() -> None:
    """The short form of `bench.overload`, counted: two minutes in no time."""
    node, refused, waits = Node(slots=10, service_s=1.0, total=50).learnt(), 0, []
    for step in range(12_000):  # a hundred a second, where ten are answered
        try:
            node.come("flood")
        except QueueFull:
            refused += 1
        if step % 100 == 37:
            came, before = node.clock.now, len(node.begun)
            seldom = node.come("seldom")
            while seldom not in node.begun[before:]:
                node.run(0.01)
            waits.append(node.clock.now - came)
        node.run(0.01)
    seconds = node.clock.now - 1000.0
    assert len(node.begun) >= 0.99 * 10 * seconds, "the slots were never idle"
    assert refused > 9_000
    assert max(waits) <= 1.0
    assert node.queue.waiting <= 50


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(PRIORITIES), st.floats(0.0, 1.0)),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 3),
    st.integers(1, 8),
)
def test_under_any_load_each_request_begins_or_is_refused_once_and_no_more_wait_than_may(
    come: list[tuple[str, Priority, float]], slots: int, total: int
) -> None:
    node, all_of_them, at_once = Node(slots=slots, service_s=0.7, total=total), [], 0
    told: list[float] = []
    for key, priority, pause_s in come:
        try:
            all_of_them.append(node.come(key, priority))
        except QueueFull as full:
            at_once += 1
            told.append(full.retry_after_s)
        assert node.queue.waiting <= total
        node.run(pause_s)
    node.run(1000.0)
    assert node.queue.waiting == 0
    assert all(1.0 <= seconds <= 60.0 for seconds in told)
    refused = [one for one in all_of_them if one.why is not None]
    assert len(node.begun) + len(refused) == len(all_of_them) == len(come) - at_once
    assert not {one.number for one in refused} & {one.number for one in node.begun}
    assert sum(node.queue.figures().refused.values()) == at_once + len(refused)


def test_each_that_waits_is_told_of_and_so_is_whose_turn_came() -> None:
    node = Node(slots=1)
    node.come("a")
    first, second = node.come("a"), node.come("b")
    rows = {row.number: row for row in node.queue.waiters({MODEL: "shown"}, "n-1")}
    assert {(number, row.key, row.model) for number, row in rows.items()} == {
        (first.number, "a", "shown"),
        (second.number, "b", "shown"),
    }
    for one in (first, second):
        assert rows[one.number].position == node.queue.place(MODEL, one).position
    assert {row.since for row in rows.values()} == {node.clock.now}
    lazily = node.queue.waiters({}, "")
    next(lazily)
    node.run(10.0)
    assert list(lazily) == []  # they left meanwhile
    assert set(node.queue.began_lately()) == {first.number, second.number}
    node.run(60.0)
    node.clock.now += 60.0
    assert node.queue.began_lately() == ()
