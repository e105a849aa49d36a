"""Slots of a runner and whose prompts they hold: nothing is shared between tenants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp.tenants import ANY, Seat, Slots


def asked(slots: Slots, tenant: str, text: str, *, whole: bool = True) -> Seat:
    """One request from its beginning to its end."""
    seat = slots.take(tenant, text)
    slots.leave(seat, whole=whole)
    return seat


def test_one_tenant_alone_is_left_to_the_engine_that_keeps_copies() -> None:
    slots = Slots(2, copies=True)
    assert slots.take("a", "x") is ANY
    assert slots.take("a", "y").fields == {}


def test_a_slot_that_changes_hands_forgets_first() -> None:
    slots = Slots(1, copies=False)
    assert asked(slots, "a", "x").fields == {"id_slot": 0}
    assert asked(slots, "b", "x").fields == {"id_slot": 0, "cache_prompt": False}
    assert asked(slots, "b", "x").fields == {"id_slot": 0}, "its own prompt it may find"
    assert slots.take("a", "x").clean


def test_who_took_a_slot_and_left_before_the_end_does_not_read_what_is_kept_there() -> None:
    """A request that is cancelled may never have begun: the slot still keeps the other's prompt."""
    slots = Slots(1, copies=False)
    asked(slots, "a", "secret")
    for _ in range(3):
        assert asked(slots, "b", "secret", whole=False).clean
    assert asked(slots, "b", "secret").clean
    assert not asked(slots, "b", "secret").clean


def test_who_shares_a_slot_with_another_s_request_does_not_hold_it() -> None:
    slots = Slots(1, copies=False)
    first, second = slots.take("a", "x"), slots.take("b", "x")
    slots.leave(first, whole=True)
    slots.leave(second, whole=True)
    assert asked(slots, "b", "x").clean, "the other's may have been the last"
    assert not asked(slots, "b", "x").clean


def test_where_copies_are_kept_nobody_looks_back_once_there_are_two() -> None:
    slots = Slots(2, copies=True)
    assert asked(slots, "a", "x").fields == {}
    for tenant in "bab":
        assert asked(slots, tenant, "x").fields == {"cache_prompt": False}


def test_a_tenant_gets_the_slot_that_read_most_of_its_prompt() -> None:
    slots = Slots(4, copies=False)
    asked(slots, "a", "")
    seats = {text: slots.take("b", text) for text in ("hello there", "good day")}
    for seat in seats.values():
        slots.leave(seat, whole=True)
    assert slots.take("b", "good evening").slot == seats["good day"].slot


def test_another_prompt_goes_where_nobody_was_then_over_the_own_then_over_another_s() -> None:
    slots = Slots(3, copies=False)
    first, other = asked(slots, "a", "one"), asked(slots, "b", "two")
    second = asked(slots, "a", "three")
    assert len({first.slot, other.slot, second.slot}) == 3
    assert asked(slots, "a", "xyz").slot == first.slot
    assert asked(slots, "c", "two").slot == other.slot, "who waited longest"


@given(
    st.integers(1, 3),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["p", "pq", "r"]), st.booleans(), st.booleans()),
        max_size=40,
    ),
)
def test_nobody_finds_what_another_left(
    count: int, begun: bool, said: list[tuple[str, str, bool, bool]]
) -> None:
    """Whatever comes and however it ends: what a slot keeps is its reader's own. A request that was
    cancelled (not `whole`) has read its prompt (`begun`), or nothing at all."""
    slots, running = Slots(count, copies=False), list[tuple[str, Seat, bool]]()
    kept: dict[int, str] = {}
    """Slot -> whose prompt it keeps."""

    def end(tenant: str, seat: Seat, whole: bool) -> None:
        if whole or begun:
            assert seat.clean or kept.get(seat.slot, tenant) == tenant
            kept[seat.slot] = tenant
        slots.leave(seat, whole=whole)

    for tenant, text, ends, whole in said:
        if len(running) == count:
            end(*running.pop(0))
        running.append((tenant, slots.take(tenant, text), whole))
        if ends:
            end(*running.pop())
