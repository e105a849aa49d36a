"""Slots of a runner: those that work stand together, and nobody finds what another's prompt left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp.slots import LEAVING_S, PAGE, Seat, Slots, beginning
from ollama_distributed.base.inference import Message
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest


def asked(slots: Slots, tenant: str, text: str, *, whole: bool = True) -> Seat:
    """One request from its beginning to its end."""
    seat = slots.take(tenant, text, 0.0)
    slots.leave(seat, 0.0 if whole else -LEAVING_S, whole=whole)
    return seat


def groups(numbers: set[int]) -> int:
    """Of slots that follow each other: each is computed by itself."""
    return sum(number - 1 not in numbers for number in numbers)


def test_those_that_work_stand_together() -> None:
    slots = Slots(8, copies=True)
    for number in range(8):  # each has been used, and none keeps what is asked now
        assert asked(slots, "a", f"{number} before").slot == number
    seats = [slots.take("a", f"now {number}", 0.0) for number in range(4)]
    assert groups({seat.slot for seat in seats}) == 1
    slots.leave(seats[1], 0.0, whole=True)
    assert slots.take("a", "and now", 0.0).slot == seats[1].slot, "a gap is filled"


@given(st.integers(1, 8), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_who_comes_makes_a_group_only_where_no_neighbour_is_free(
    count: int, said: list[tuple[bool, int]]
) -> None:
    slots, running = Slots(count, copies=True), list[Seat]()
    for number, (comes, which) in enumerate(said):
        busy = {seat.slot for seat in running}
        if comes and len(running) < count:
            seat = slots.take("a", f"{number}, something else", 0.0)
            assert seat.slot not in busy
            assert groups(busy | {seat.slot}) == min(
                groups(busy | {one}) for one in range(count) if one not in busy
            )
            running.append(seat)
        elif running:
            slots.leave(running.pop(which % len(running)), 0.0, whole=True)


def test_a_page_that_need_not_be_read_again_is_worth_more_than_a_neighbour() -> None:
    slots = Slots(4, copies=True)
    page, less = "p" * PAGE, "l" * (PAGE - 1)
    assert [asked(slots, "a", text).slot for text in ("x", less, page)] == [0, 1, 2]
    busy = slots.take("a", "x", 0.0)
    assert busy.slot == 0
    far = slots.take("a", page + " and more", 0.0)
    assert far.slot == 2
    slots.leave(far, 0.0, whole=True)
    slots.leave(busy, 0.0, whole=True)
    busy = slots.take("a", page, 0.0)
    assert slots.take("a", "l" * 10 + "x", 0.0).slot == 1, "beside it"


def test_of_those_that_keep_as_many_pages_a_neighbour_is_taken() -> None:
    """A long system prompt that every slot keeps."""
    slots, system = Slots(6, copies=True), "s" * 3 * PAGE
    first = [slots.take("a", f"{system}{number}", 0.0) for number in range(6)]
    for seat in first:
        slots.leave(seat, 0.0, whole=True)
    seats = [slots.take("a", f"{system} something else {number}", 0.0) for number in range(3)]
    assert groups({seat.slot for seat in seats}) == 1
    rest = f"{system}5" + "h" * PAGE
    slots = Slots(6, copies=True)
    kept = [slots.take("a", text, 0.0) for text in (system, rest, system)][1]
    slots.leave(kept, 0.0, whole=True)
    assert slots.take("a", rest + "!", 0.0).slot == kept.slot, "its own history"


def test_who_was_cancelled_may_still_be_at_work() -> None:
    slots = Slots(3, copies=True)
    cancelled = slots.take("a", "x", 10.0)
    slots.leave(cancelled, 10.0, whole=False)
    other = slots.take("a", "x", 10.0 + LEAVING_S / 2)
    assert other.slot != cancelled.slot
    slots.leave(other, 10.5, whole=True)
    alone = Slots(1, copies=True)
    alone.leave(alone.take("a", "x", 10.0), 10.0, whole=False)
    assert alone.take("a", "x", 10.0).slot == 0, "there is no other"
    assert slots.take("a", "x", 10.0 + LEAVING_S).slot in (cancelled.slot, other.slot)


def test_prompts_of_every_kind_can_be_compared() -> None:
    chat = ChatRequest(
        messages=(Message(role="system", content="be brief"), Message(role="user", content="hello")), tools=()
    )
    assert beginning(chat) == "be brief\nhello"
    assert beginning(CompletionRequest(prompt="text")) == "text"
    ids, more = (tuple(range(100_000, 100_000 + count)) for count in (50, 60))
    for one, other in ((ids, more), ((ids, "text"), (more, "text"))):
        first, second = (beginning(CompletionRequest(prompt=prompt)) for prompt in (one, other))
        slots = Slots(2, copies=True)
        slots.leave(slots.take("a", "else", 0.0), 0.0, whole=True)
        assert asked(slots, "a", first).slot == 1
        assert slots.take("a", second, 0.0).slot == 1


def test_one_tenant_alone_reads_what_is_kept() -> None:
    slots = Slots(2, copies=True)
    assert asked(slots, "", "the node itself").fields == {"id_slot": 0}
    assert [slots.take("a", text, 0.0).fields for text in "xy"] == [{"id_slot": 1}, {"id_slot": 0}]


def test_a_slot_that_changes_hands_forgets_first() -> None:
    slots = Slots(1, copies=False)
    assert asked(slots, "a", "x").fields == {"id_slot": 0}
    assert asked(slots, "b", "x").fields == {"id_slot": 0, "cache_prompt": False}
    assert asked(slots, "b", "x").fields == {"id_slot": 0}, "its own prompt it may find"
    assert slots.take("a", "x", 0.0).clean


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
    first, second = slots.take("a", "x", 0.0), slots.take("b", "x", 0.0)
    slots.leave(first, 0.0, whole=True)
    slots.leave(second, 0.0, whole=True)
    assert asked(slots, "b", "x").clean, "the other's may have been the last"
    assert not asked(slots, "b", "x").clean


def test_one_that_was_cancelled_may_come_after_all() -> None:
    """Between two requests of who took the slot: llama.cpp reads what a slow thread of it hands over late."""
    slots = Slots(1, copies=False)
    slots.leave(slots.take("a", "secret", 10.0), 10.0, whole=False)
    for now_s in (10.0, 10.0 + LEAVING_S / 2, 10.0 + LEAVING_S):
        seat = slots.take("b", "secret", now_s)
        assert seat.clean
        slots.leave(seat, now_s, whole=True)
    assert not slots.take("b", "secret", 10.0 + LEAVING_S).clean


def test_where_copies_are_kept_nobody_looks_back_once_there_are_two() -> None:
    slots = Slots(2, copies=True)
    assert asked(slots, "a", "x").fields == {"id_slot": 0}
    for tenant in "bab":
        assert asked(slots, tenant, "x").fields["cache_prompt"] is False


def test_a_tenant_gets_the_slot_that_read_most_of_its_prompt() -> None:
    slots = Slots(4, copies=False)
    asked(slots, "a", "")
    seats = {text: slots.take("b", text, 0.0) for text in ("hello there", "good day")}
    for seat in seats.values():
        slots.leave(seat, 0.0, whole=True)
    assert slots.take("b", "good evening", 0.0).slot == seats["good day"].slot


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
        slots.leave(seat, 0.0, whole=whole)

    for tenant, text, ends, whole in said:
        if len(running) == count:
            end(*running.pop(0))
        running.append((tenant, slots.take(tenant, text, 0.0), whole))
        if ends:
            end(*running.pop())
