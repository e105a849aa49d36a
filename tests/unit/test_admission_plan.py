"""Whose turn it is: properties of the queue of one model, and examples that show what they mean."""

from __future__ import annotations

import itertools
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.admission.bounds import Bounds, Places
from ollama_distributed.admission.lanes import NEWCOMER_TOKENS, QUANTUM_TOKENS
from ollama_distributed.admission.plan import AGE_S, Turns
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Ask


class Request:
    def __init__(
        self, number: int, key: str = "a", priority: Priority = "normal", cost: float = 100.0
    ) -> None:
        self.number = number
        self.ask = Ask(key=key, priority=priority)
        self.slot = True
        self.cost = cost
        self.why: OllamaDistributedError | None = None

    def refuse(self, error: OllamaDistributedError) -> None:
        assert self.why is None, "refused once"
        self.why = error

    def __repr__(self) -> str:
        return f"{self.ask.key}{self.number}"


def served(turns: Turns[Request], count: int, now: float = 0.0) -> list[Request]:
    found = []
    for _ in range(count):
        request = turns.first(now)
        if request is None:
            break
        turns.grant(request, now)
        found.append(request)
    return found


# ── any history ─────────────────────────────────────────────────────────────────────

keys = st.sampled_from("abcd")
classes = st.sampled_from(PRIORITIES)
costs = st.floats(1.0, 5000.0)
acts = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "join", "grant", "grant", "leave", "wait"]),
        keys,
        classes,
        costs,
        st.integers(0, 50),
    ),
    max_size=80,
)


@given(acts)
def test_each_request_leaves_once_and_in_the_order_of_its_key_and_class(
    history: list[tuple[str, str, Priority, float, int]],
) -> None:
    turns: Turns[Request] = Turns()
    waiting: dict[tuple[str, Priority], deque[Request]] = {}
    now, number, gone, came = 0.0, 0, 0, 0
    for act, key, priority, cost, choice in history:
        if act == "join":
            request = Request(number, key, priority, cost)
            number, came = number + 1, came + 1
            turns.join(request, now)
            waiting.setdefault((key, priority), deque()).append(request)
        elif act == "wait":
            now += choice
        elif act == "grant" and len(turns):
            request = turns.first(now)
            assert request is not None
            assert turns.first(now) is request, "asking again changes nothing"
            assert turns.grant(request, now)
            assert waiting[request.ask.key, request.ask.priority].popleft() is request
            gone += 1
            assert not turns.grant(request, now)
            assert not turns.leave(request)
        elif act == "leave" and len(turns):
            request = list(turns)[choice % len(turns)]
            assert turns.leave(request)
            waiting[request.ask.key, request.ask.priority].remove(request)
            gone += 1
            assert not turns.leave(request)
        assert len(turns) == came - gone == sum(map(len, waiting.values()))
        assert turns.cost == pytest.approx(sum(one.cost for one in turns), abs=0.01)
    rest = served(turns, came + 1, now)
    assert len(rest) == came - gone
    assert len(turns) == 0
    assert turns.first(now) is None


@given(st.lists(st.lists(costs, min_size=3, max_size=20), min_size=2, max_size=5), st.integers(1, 60))
def test_keys_that_always_wait_get_as_many_tokens_as_each_other(of: list[list[float]], count: int) -> None:
    """The bound of deficit round robin: what a key may be ahead is its deficit, which is below the
    dearest request and a quantum."""
    turns: Turns[Request] = Turns()
    number = 0
    for key, own in enumerate(of):
        for cost in own:
            turns.join(Request(number, str(key), cost=cost), 0.0)
            number += 1
    used: Counter[str] = Counter()
    dearest = max(max(own) for own in of)
    bound = 2 * (dearest + QUANTUM_TOKENS + NEWCOMER_TOKENS)
    for _ in range(count):
        request = turns.first(0.0)
        assert request is not None
        turns.grant(request, 0.0)
        used[request.ask.key] += request.cost  # type: ignore[assignment]  # floats are counted
        if len(turns.keys) < len(of):
            break  # one has nobody left: no claim holds for it
        shares = [used[str(key)] for key in range(len(of))]
        assert max(shares) - min(shares) <= bound


@given(st.lists(costs, min_size=1, max_size=30))
def test_one_key_and_one_class_is_first_come_first_served(own: list[float]) -> None:
    turns: Turns[Request] = Turns()
    requests = [Request(number, cost=cost) for number, cost in enumerate(own)]
    for request in requests:
        turns.join(request, 0.0)
    assert served(turns, len(own)) == requests


@given(
    st.integers(1, 6),
    st.integers(0, 6),
    st.floats(0.05, 9.0),
)
def test_nobody_starves_behind_urgent_requests_that_never_end(
    batch: int, normal: int, service_s: float
) -> None:
    """One slot, and always somebody interactive waits: each class has a turn within its age, so the
    n-th of a class within n times its age, and a service for each class that is late too."""
    turns: Turns[Request] = Turns()
    number = 0

    def join(priority: Priority) -> Request:
        nonlocal number
        number += 1
        request = Request(number, priority=priority)
        turns.join(request, now)
        return request

    now = 0.0
    left = {"batch": [join("batch") for _ in range(batch)], "normal": [join("normal") for _ in range(normal)]}
    last = {"batch": 0.0, "normal": 0.0}
    while any(left.values()):
        join("interactive")
        request = turns.first(now)
        assert request is not None
        turns.grant(request, now)
        kind = request.ask.priority
        if kind != "interactive":
            assert request is left[kind].pop(0)
            assert now - last[kind] <= AGE_S[kind] + 3 * service_s
            last[kind] = now
        now += service_s
        assert now <= (batch + normal + 1) * (AGE_S["batch"] + 3 * service_s)


@given(acts, st.integers(0, 2), st.integers(0, 40))
def test_who_comes_behind_a_line_is_not_first_before_it(
    history: list[tuple[str, str, Priority, float, int]], rank: int, most: int
) -> None:
    turns: Turns[Request] = Turns()
    for number, (_, key, priority, cost, _) in enumerate(history):
        turns.join(Request(number, key, priority, cost), 0.0)
    line = (rank, most)
    found = turns.first(0.0, line)
    before = [one for one in turns if turns.order_of(one, 0.0) < line]
    assert (found is None) == (not before)
    if found is not None:
        assert found in before
        assert turns.order(0.0) <= turns.order_of(found, 0.0)


# ── examples ────────────────────────────────────────────────────────────────────────


def test_urgent_ones_go_first_and_keys_take_turns() -> None:
    turns: Turns[Request] = Turns()
    for number in range(6):
        turns.join(Request(number, "flood", cost=400.0), 0.0)
    turns.join(Request(6, "other", cost=400.0), 0.0)
    turns.join(Request(7, "flood", "interactive"), 0.0)
    turns.join(Request(8, "late", "batch"), 0.0)
    assert [one.number for one in served(turns, 9)] == [7, 6, 0, 1, 2, 3, 4, 5, 8]


def test_who_asks_now_and_then_goes_before_a_flood() -> None:
    turns: Turns[Request] = Turns()
    for number in range(200):
        turns.join(Request(number, "flood", cost=40.0), 0.0)
    served(turns, 50)
    turns.join(Request(1000, "seldom", cost=300.0), 0.0)
    assert turns.first(0.0).number == 1000  # type: ignore[union-attr]  # somebody waits


def test_a_backlog_of_batches_however_old_costs_one_turn() -> None:
    turns: Turns[Request] = Turns()
    for number in range(100):
        turns.join(Request(number, priority="batch"), 0.0)
    for number in range(100, 110):
        turns.join(Request(number, priority="interactive"), 599.0)
    assert [one.ask.priority for one in served(turns, 12, 600.0)] == ["batch"] + ["interactive"] * 10 + [
        "batch"
    ]


def test_what_is_ahead_follows_class_and_turns() -> None:
    turns: Turns[Request] = Turns()
    for number in range(10):
        turns.join(Request(number, "flood"), 0.0)
    mine = [Request(10 + number, "mine") for number in range(2)]
    for request in mine:
        turns.join(request, 0.0)
    turns.join(Request(20, "flood", "interactive"), 0.0)
    turns.join(Request(21, "flood", "batch"), 0.0)
    assert [turns.ahead(one).requests for one in mine] == [1, 2]
    assert [one.number for one in served(turns, 4)] == [20, 10, 11, 0], "and so it comes"
    assert turns.ahead_of_new("interactive").requests == 0
    assert turns.ahead_of_new("normal").requests == 9


# ── who comes now and then ──────────────────────────────────────────────────────────


def test_of_many_keys_with_a_request_each_the_first_that_came_is_first() -> None:
    turns: Turns[Request] = Turns()
    for number in range(20):
        turns.join(Request(number, f"k{number}"), 0.0)
    assert [one.number for one in served(turns, 20)] == list(range(20))


@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(1.0, 400.0)), min_size=2, max_size=6), st.integers(1, 4)
)
def test_nobody_starves_however_many_ask_again_at_once(of: list[tuple[int, float]], slots: int) -> None:
    """Keys with so many clients each, all of whom ask again when they have their answer. A key that has
    always somebody waiting gets as many tokens as any other, but for what each may be ahead; and nobody
    waits for more than that."""
    turns: Turns[Request] = Turns()
    number = itertools.count()
    cost = {str(key): one for key, (_, one) in enumerate(of)}
    running: deque[Request] = deque()
    for key, (clients, _) in enumerate(of):
        for _ in range(clients):
            turns.join(Request(next(number), str(key), cost=cost[str(key)]), 0.0)
    used: Counter[str] = Counter()
    always = set(cost)
    ahead = NEWCOMER_TOKENS + QUANTUM_TOKENS + max(cost.values())
    for _ in range(400):
        if len(running) == slots or not len(turns):
            done = running.popleft()
            turns.join(Request(next(number), done.ask.key, cost=done.cost), 0.0)
        request = turns.first(0.0)
        assert request is not None
        turns.grant(request, 0.0)
        running.append(request)
        used[request.ask.key] += request.cost  # type: ignore[assignment]  # floats are counted
        always &= turns.keys
        if always:
            most, least = max(used.values()), min(used[key] for key in always)
            assert most - least <= 2 * ahead


def test_a_key_that_always_has_one_request_waiting_is_not_always_next() -> None:
    """Else it would have every slot, and one that asked for more at once none."""
    turns: Turns[Request] = Turns()
    for number in range(200):
        turns.join(Request(number, "many"), 0.0)
    had: Counter[str] = Counter()
    for number in range(1000, 1100):
        if "one" not in turns.keys:
            turns.join(Request(number, "one"), 0.0)
        (request,) = served(turns, 1)
        had[request.ask.key] += 1
    assert had["many"] >= 45, had


def test_a_long_request_of_who_asks_seldom_is_not_held_back_by_short_ones() -> None:
    turns: Turns[Request] = Turns()
    for number in range(200):
        turns.join(Request(number, "flood", cost=40.0), 0.0)
    served(turns, 50)
    turns.join(Request(1000, "seldom", cost=8000.0), 0.0)
    turns.join(Request(1001, "seldom", cost=8000.0), 0.0)
    assert turns.first(0.0).number == 1000  # type: ignore[union-attr]  # somebody waits
    assert [one.ask.key for one in served(turns, 150)] == ["seldom"] + ["flood"] * 149, "and is paid for"


def test_a_few_short_ones_of_who_asks_seldom_go_together() -> None:
    turns: Turns[Request] = Turns()
    for number in range(200):
        turns.join(Request(number, "flood"), 0.0)
    served(turns, 50)
    few = [Request(1000 + number, "seldom", cost=40.0) for number in range(5)]
    for request in few:
        turns.join(request, 0.0)
    assert [turns.ahead(request).requests for request in few] == [0, 1, 2, 3, 4]
    assert served(turns, 5) == few


def test_what_a_key_used_is_forgotten_when_the_others_had_as_much() -> None:
    turns: Turns[Request] = Turns()
    for number in range(200):
        turns.join(Request(number, "flood"), 0.0)
    turns.join(Request(1000, "seldom", cost=5000.0), 0.0)
    served(turns, 2)
    turns.join(Request(1001, "seldom"), 0.0)
    came = [one.number for one in served(turns, 60)]
    assert 40 <= came.index(1001) <= 55, "5,000 tokens are some fifty of the flood's"
    served(turns, 30)
    turns.join(Request(1002, "seldom"), 0.0)
    assert turns.first(0.0).number == 1002  # type: ignore[union-attr]  # somebody waits


# ── places ──────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(keys, classes), min_size=1, max_size=60), st.integers(1, 12))
def test_a_key_below_its_share_always_finds_a_place(come: list[tuple[str, Priority]], total: int) -> None:
    places = Places(Bounds(total=total))
    held: list[Ask] = []
    for key, priority in come:
        ask = Ask(key=key, priority=priority)
        if places.full:
            loser = places.loser(ask)
            if loser is None:
                # Nobody is less urgent, and nobody in the class has more than one above the newcomer's.
                urgency = PRIORITIES.index(priority)
                assert all(PRIORITIES.index(one.priority) <= urgency for one in held)
                alike = Counter(one.key for one in held if one.priority == priority)
                assert not alike or max(alike.values()) <= alike[key] + 1
                continue
            gone = next(one for one in held if (one.priority, one.key) == (loser.priority, loser.key))
            held.remove(gone)
            places.take("m", gone, -1)
        places.take("m", ask)
        held.append(ask)
        assert places.taken == len(held) <= total
        assert sum(places.waiting().values()) == len(held)


def test_bounds_of_a_model_a_team_and_a_key() -> None:
    places = Places(Bounds(total=100, per_model=4, per_team=3, per_key=2))
    places.take("m", Ask(key="a"))
    places.take("m", Ask(key="a"))
    assert places.over("m", Ask(key="a")) == "key"
    assert places.over("m", Ask(key="b")) is None
    places.take("m", Ask(key="b"))
    assert places.over("other", Ask(key="c")) == "team"
    places.take("m", Ask(key="c", team="t"))
    assert places.over("m", Ask(key="d", team="u")) == "model"
    assert places.over("other", Ask(key="d", team="u")) is None
