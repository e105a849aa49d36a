"""Who asks whom for which piece: nothing twice, the rare first, the only holder sends all once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.distribution.swarm_model import measured

from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.plan import (
    ENOUGH_HOLDERS,
    HOLD_AFTER_ALL_S,
    HOLD_S,
    MAX_PIECE_BYTES,
    MIB,
    OFFER,
    Gifts,
    Offer,
    Slots,
    Wants,
    beside,
    bits,
    everything,
    piece_bytes,
    pieces_of,
)

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


@given(st.integers(1, 1 << 45))
def test_pieces_fit_the_blob(size: int) -> None:
    piece = piece_bytes(size)
    assert MIB <= piece <= MAX_PIECE_BYTES
    assert (pieces_of(size, piece) - 1) * piece < size <= pieces_of(size, piece) * piece


@given(st.integers(1, 400), st.integers(2, 32))
def test_few_steps_lead_from_any_node_to_any_other(count: int, most: int) -> None:
    nodes = [NodeId(f"n{number}") for number in range(count)]
    sides = {node: beside(nodes, node, most) for node in nodes}
    for node, others in sides.items():
        assert len(set(others)) == len(others) <= most
        assert node not in others
        assert all(node in sides[other] for other in others)
    met, steps, edge = {nodes[0]}, 0, {nodes[0]}
    while edge:
        edge = {other for node in edge for other in sides[node]} - met
        met |= edge
        steps += bool(edge)
    assert len(met) == count
    if most >= 18:
        assert steps <= 5


@given(st.sets(st.integers(0, 300)))
def test_sets_are_numbers(pieces: set[int]) -> None:
    assert list(bits(sum(1 << piece for piece in pieces))) == sorted(pieces)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1 << 32))
def test_nothing_is_asked_of_two_and_all_arrives(pieces: int, seed: int) -> None:
    """Whatever holders do (refuse, break off, go), no piece is on two ways, and none is forgotten."""
    chance = random.Random(seed)
    wants = Wants(pieces, 0, chance.randrange)
    wants.heard(A, 0, whole=True)
    out: list[Offer] = []
    for now in range(4000):
        if wants.done:
            break
        if chance.random() < 0.2:
            wants.heard(chance.choice([B, C]), sum(1 << n for n in range(pieces) if chance.random() < 0.3))
        if chance.random() < 0.02:
            wants.drop(chance.choice([B, C]))
        while (offer := wants.next_offer(float(now))) is not None:
            assert offer.pieces
            assert not offer.pieces & wants.have
            assert all(not offer.pieces & other.pieces for other in out), "one piece on two ways"
            assert offer.pieces.bit_count() <= OFFER
            assert sum(other.node == A for other in out) < ENOUGH_HOLDERS
            out.append(offer)
        if out:
            offer = out.pop(chance.randrange(len(out)))
            if chance.random() < 0.3:
                wants.failed(offer, float(now + 1))
            else:
                assert wants.granted(offer, chance.choice(list(bits(offer.pieces))))
                wants.arrived(offer)
    assert wants.done


def test_what_was_not_offered_is_refused() -> None:
    wants = Wants(4, 0b0011, lambda _: 0)
    wants.heard(A, 0b0111)
    offer = wants.next_offer(0.0)
    assert offer is not None
    assert offer.pieces == 0b0100
    assert not wants.granted(offer, 3)
    wants.failed(offer, 5.0)
    assert wants.next_offer(4.9) is None
    assert wants.retry_at(0.0) == 5.0
    assert wants.next_offer(5.0) is not None


def test_the_rarest_come_first() -> None:
    wants = Wants(OFFER + 10, 0, random.Random(1).randrange)
    common = everything(10)
    wants.heard(A, 0, whole=True)
    wants.heard(B, common)
    offers = []
    while (offer := wants.next_offer(0.0)) is not None:
        offers.append(offer)
    of_holder = next(offer for offer in offers if offer.node == A)
    assert not of_holder.pieces & common, "the one that has it all is asked for what only it has"


@given(st.integers(0, 1 << 32))
def test_none_is_offered_before_a_rarer_one(seed: int) -> None:
    """Whatever is told, also twice: who has it all says so every few seconds."""
    chance, pieces = random.Random(seed), 3 * OFFER
    wants = Wants(pieces, 0, chance.randrange, flight=1)
    partial: dict[NodeId, int] = {}
    for _ in range(12):
        node = NodeId(f"n{chance.randrange(5)}")
        match chance.randrange(4):
            case 0:
                wants.heard(A, 0, whole=True)
            case 1:
                wants.drop(node)
                partial.pop(node, None)
            case _:
                partial[node] = chance.getrandbits(pieces) & chance.getrandbits(pieces)
                wants.heard(node, partial[node])
    offer = wants.next_offer(0.0)
    if offer is not None:
        has = partial.get(offer.node, everything(pieces))
        count = [sum(some >> piece & 1 for some in partial.values()) for piece in range(pieces)]
        others = [count[piece] for piece in bits(has & ~offer.pieces)]
        assert max(count[piece] for piece in bits(offer.pieces)) <= min(others, default=pieces)


@given(st.integers(1, 40), st.integers(0, 1 << 32))
def test_the_only_holder_sends_all_before_any_twice(pieces: int, seed: int) -> None:
    chance = random.Random(seed)
    gifts = Gifts(pieces, only_holder=True)
    given_: list[int] = []
    for step in range(pieces):
        piece = gifts.choose(step * 0.001, chance.choice([A, B]), everything(pieces))
        assert piece is not None
        given_.append(piece)
    assert sorted(given_) == list(range(pieces))


def test_the_only_holder_waits_before_it_repeats() -> None:
    gifts = Gifts(2, only_holder=True)
    assert gifts.choose(0.0, A, 0b01) == 0
    assert gifts.choose(0.1, B, 0b01) is None, "the other can get it from a"
    assert gifts.choose(0.1, A, 0b01) == 0, "its own connection broke: at once"
    assert gifts.choose(HOLD_S + 0.2, B, 0b01) == 0
    assert gifts.choose(HOLD_S + 0.3, A, 0b10) == 1
    assert gifts.choose(HOLD_S + 0.3 + HOLD_AFTER_ALL_S, B, 0b10) == 1, "all were sent: it helps sooner"


def test_one_of_many_holders_does_not_wait() -> None:
    gifts = Gifts(1, only_holder=False)
    assert [gifts.choose(0.0, node, 1) for node in (A, B, C)] == [0, 0, 0]


def test_what_broke_off_was_not_sent() -> None:
    gifts = Gifts(2, only_holder=True)
    assert gifts.choose(0.0, A, 0b11) == 0
    gifts.broken(0, A)
    assert gifts.choose(0.1, B, 0b11) == 0


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans()), max_size=200))
def test_slots_are_never_more_and_never_lost(steps: list[tuple[NodeId, bool]]) -> None:
    slots, running, waiting = Slots(3), dict[int, NodeId](), dict[int, NodeId]()

    def left(ticket: int) -> None:
        turn = slots.leave(running.pop(ticket), 1)
        if turn is not None:
            running[turn] = waiting.pop(turn)

    for node, enter in steps:
        if enter:
            ticket, now = slots.enter(node)
            (running if now else waiting)[ticket] = node
        elif running:
            left(next(iter(running)))
        assert len(running) <= 3
        assert not waiting or len(running) == 3
    while running:
        left(next(iter(running)))
    assert not waiting


def test_who_gets_least_is_next() -> None:
    slots = Slots(2)
    slots.enter(A)
    slots.enter(A)
    third, now = slots.enter(A)
    of_b, _ = slots.enter(B)
    assert not now
    assert slots.leave(A, 10) == of_b
    assert slots.leave(A, 10) == third


@pytest.mark.parametrize(("receivers", "most"), [(4, 1.08), (8, 1.08)])
def test_a_swarm_on_even_links(receivers: int, most: float) -> None:
    """256 MiB at 200 Mbit/s each way, one holder: near to the time that one copy takes."""
    world = measured(receivers, 256)
    print(f"{receivers} receivers: {world.ratio:.3f} x size / rate")
    assert world.ratio <= most
    assert next(iter(world.nodes.values())).sent <= 1.1 * world.pieces


def test_a_slow_member_does_not_hold_up_the_others() -> None:
    """One node passes things on at a tenth of the rate: the holder steps in for it."""
    world = measured(4, 64, slow=2.5e6)
    print(f"one slow uplink: {world.ratio:.3f}")
    assert world.ratio <= 2.5, "all from one takes 4"
