"""Loads and evictions: the budget holds, the busy stay, the least recently used go first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import NoCapacity
from ollama_distributed.serving.plan import (
    CRASH_WINDOW_S,
    CRASHES,
    Crashes,
    Hall,
    Held,
    Load,
    Wait,
    expires_at,
    make_room,
    oversized,
    renewed,
    sizes_of,
    thread_share,
)

held_sets = st.lists(
    st.builds(
        Held,
        key=st.text("abcdef", min_size=1, max_size=3),
        memory_bytes=st.integers(0, 50),
        last_used=st.integers(0, 5).map(float),
        busy=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda h: h.key,
).map(tuple)


@st.composite
def halls(draw: st.DrawFn) -> Hall:
    """What runs never exceeds the budget by more than a shrunken budget allows: it may."""
    return Hall(
        budget_bytes=draw(st.integers(0, 150)),
        max_loaded=draw(st.integers(1, 5)),
        held=draw(held_sets),
    )


sizes = st.integers(1, 60).flatmap(
    lambda one: st.integers(1, 4).map(lambda most: sizes_of(most, lambda slots: one + 5 * slots))
)


@given(halls(), sizes)
def test_budget_busy_and_order(hall: Hall, wanted: tuple[tuple[int, int], ...]) -> None:
    by_key = {h.key: h for h in hall.held}
    here = [h for h in hall.held if h.memory_bytes]  # the others take nobody's place
    try:
        decision = make_room(hall, wanted, name="m")
    except NoCapacity:
        assert all(size > hall.budget_bytes for _, size in wanted)
        return
    match decision:
        case Load(slots, size, evict):
            assert (slots, size) in wanted
            assert all(by_key[key].memory_bytes for key in evict)
            stay = [h for h in here if h.key not in evict]
            assert sum(h.memory_bytes for h in stay) + size <= hall.budget_bytes
            assert len(stay) < hall.max_loaded
            assert not any(by_key[key].busy for key in evict)
            # Least recently used first: no idle one that stays was used before one that goes.
            used = [by_key[key].last_used for key in evict]
            assert used == sorted(used)
            assert all(h.busy or h.last_used >= max(used, default=0) for h in stay)
            # None of them goes without need: without the last one it would not have fitted.
            if evict:
                kept = [*stay, by_key[evict[-1]]]
                assert (
                    sum(h.memory_bytes for h in kept) + size > hall.budget_bytes
                    or len(kept) >= hall.max_loaded
                )
        case Wait(drain):
            assert any(by_key[key].busy for key in drain)
            stay = [h for h in here if h.key not in drain]
            assert sum(h.memory_bytes for h in stay) + wanted[-1][1] <= hall.budget_bytes
            # Idle ones alone never suffice, with any number of slots.
            busy = [h for h in here if h.busy]
            assert (
                sum(h.memory_bytes for h in busy) + wanted[-1][1] > hall.budget_bytes
                or len(busy) >= hall.max_loaded
            )


@given(halls(), sizes, st.randoms())
def test_the_order_of_what_runs_never_matters(
    hall: Hall, wanted: tuple[tuple[int, int], ...], random: object
) -> None:
    shuffled = list(hall.held)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = Hall(budget_bytes=hall.budget_bytes, max_loaded=hall.max_loaded, held=tuple(shuffled))

    def decide(hall: Hall) -> object:
        try:
            return make_room(hall, wanted, name="m")
        except NoCapacity as exc:
            return exc.message

    assert decide(hall) == decide(other)


def test_more_slots_by_eviction_before_fewer_slots() -> None:
    idle = Held(key="a", memory_bytes=50, last_used=1.0, busy=False)
    hall = Hall(budget_bytes=100, max_loaded=3, held=(idle,))
    assert make_room(hall, [(4, 80), (2, 50)], name="m") == Load(4, 80, ("a",))
    busy = Hall(
        budget_bytes=100, max_loaded=3, held=(Held(key="a", memory_bytes=50, last_used=1.0, busy=True),)
    )
    assert make_room(busy, [(4, 80), (2, 50)], name="m") == Load(2, 50)


def test_the_refusal_says_what_is_needed_and_what_there_is() -> None:
    hall = Hall(budget_bytes=100 << 20, max_loaded=3, held=())
    with pytest.raises(NoCapacity, match=r"big needs 150 MiB of memory with 1 slot, this node has 100 MiB"):
        make_room(hall, [(2, 250 << 20), (1, 150 << 20)], name="big")


@given(st.integers(-1, 256), st.integers(0, 20), st.integers(0, 300))
def test_threads_never_pass_the_cores(cores: int, others: int, asked: int) -> None:
    threads = thread_share(cores, others, asked)
    assert 1 <= threads <= max(cores, 1)
    if not asked and cores > 2:
        assert threads < cores


@pytest.mark.parametrize(
    ("cores", "others", "threads"), [(1, 0, 1), (2, 0, 2), (2, 1, 1), (4, 0, 3), (8, 1, 3), (8, 9, 1)]
)
def test_thread_shares(cores: int, others: int, threads: int) -> None:
    assert thread_share(cores, others) == threads


def test_keep_alive() -> None:
    assert expires_at(10.0, -1) is None
    assert expires_at(10.0, 0) == 10.0
    assert expires_at(10.0, 300) == 310.0
    assert renewed(300.0, None) == 300.0
    assert renewed(300.0, 0.0) == 0.0


@given(st.lists(st.floats(0, 2000), max_size=12), st.floats(0, 500))
def test_quarantine_is_three_crashes_in_five_minutes(times: list[float], later: float) -> None:
    crashes = Crashes()
    for time in sorted(times):
        crashes = crashes.add(time, "why")
    now = max(times, default=0.0) + later
    last = sorted(times)[-CRASHES:]
    close = len(last) == CRASHES and last[-1] - last[0] < CRASH_WINDOW_S
    assert (crashes.quarantined_for(now) > 0) == (close and now < last[-1] + CRASH_WINDOW_S)


@given(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_runners_loaded_again_with_their_share_are_content(cores: int, counts: list[int]) -> None:
    busy = {str(i): min(count, cores) for i, count in enumerate(counts)}
    too_many = oversized(busy, cores)
    assert bool(too_many) == (sum(busy.values()) > max(cores, len(busy)))
    share = thread_share(cores, len(busy) - 1)
    assert oversized({key: min(count, share) for key, count in busy.items()}, cores) == []
