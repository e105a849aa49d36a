"""Slots of a runner and whose prompts they hold: nothing is shared between tenants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp.tenants import ANY, Seat, Slots


def test_one_tenant_alone_is_left_to_the_engine() -> None:
    slots = Slots(2, copies=False)
    assert slots.take("a", "x") is ANY
    assert slots.take("a", "y").fields == {}


def test_a_slot_that_changes_hands_forgets_first() -> None:
    slots = Slots(1, copies=False)
    slots.leave(slots.take("a", "x"))
    other = slots.take("b", "x")
    assert other.fields == {"id_slot": 0, "cache_prompt": False}
    slots.leave(other)
    again = slots.take("b", "x")
    assert again.fields == {"id_slot": 0}, "its own prompt it may find"
    slots.leave(again)
    assert slots.take("a", "x").clean


def test_where_copies_are_kept_nobody_looks_back_once_there_are_two() -> None:
    slots = Slots(2, copies=True)
    assert slots.take("a", "x").fields == {}
    for tenant in "bab":
        seat = slots.take(tenant, "x")
        assert seat.fields == {"cache_prompt": False}
        slots.leave(seat)


def test_a_tenant_gets_the_slot_that_read_most_of_its_prompt() -> None:
    slots = Slots(4, copies=False)
    slots.take("a", "")
    seats = {}
    for text in ("hello there", "good day"):
        seats[text] = slots.take("b", text)
    for seat in seats.values():
        slots.leave(seat)
    assert slots.take("b", "good evening").slot == seats["good day"].slot


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["p", "pq", "r"]), st.booleans()), max_size=40
    ),
)
def test_nobody_finds_what_another_left(count: int, asked: list[tuple[str, str, bool]]) -> None:
    """Whatever comes: a slot is read from only by the tenant that wrote it last."""
    slots, holder, running = Slots(count, copies=False), {}, []  # type: ignore[var-annotated]
    first = asked[0][0] if asked else ""
    for tenant, text, ends in asked:
        if len(running) == count:
            slots.leave(running.pop(0))
        seat: Seat = slots.take(tenant, text)
        if seat.slot < 0:
            assert tenant == first, "before there was a second"
        else:
            assert seat.clean or holder.get(seat.slot, first) == tenant
            holder[seat.slot] = tenant
        if ends:
            slots.leave(seat)
        else:
            running.append(seat)
