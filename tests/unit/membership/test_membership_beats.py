"""What a beat says, and what is known once beats arrived, were lost or came late."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import (
    MAX_BEAT_BYTES,
    UNKNOWN_KEPT_S,
    Beat,
    Ears,
    Heard,
    beat_interval_s,
    decode_beat,
    encode_beat,
    hear,
    offline_after_s,
    suspect_after_s,
)
from ollama_distributed.cluster.membership.utilization import Utilization

A, B = NodeId("a"), NodeId("b")


def beat(seq: int, boot: str = "one", *, stopping: bool = False, interval_s: float = 1.0) -> Beat:
    return Beat(boot=boot, seq=seq, stopping=stopping, interval_s=interval_s)


def heard(*beats: tuple[float, Beat]) -> Heard:
    known: Heard | None = None
    for at, one in beats:
        known = hear(known, one, at)
    assert known is not None
    return known


def test_a_beat_survives_the_wire() -> None:
    said = Beat(boot="x", seq=3, usage=Utilization(cpu=0.5, gpu=0.25), loaded=("m:1",), stopping=True)
    assert decode_beat(encode_beat(said)) == said


def test_a_beat_of_a_newer_version_is_read() -> None:
    raw = msgspec.msgpack.encode({"boot": "x", "seq": 1, "news": [1, 2]})
    assert decode_beat(raw) == Beat(boot="x", seq=1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({"boot": "", "seq": 1}),
        msgspec.msgpack.encode({"boot": "x", "seq": -1}),
        msgspec.msgpack.encode({"boot": "x", "seq": 1, "interval_s": 0.0}),
        msgspec.msgpack.encode({"boot": "x", "seq": 1, "interval_s": float("nan")}),
        msgspec.msgpack.encode({"boot": "x", "seq": 1, "loaded": ["m"] * 33}),
        b"\x82\xa4boot\xa1\xff\xa3seq\x01",
        b"\x00" * (MAX_BEAT_BYTES + 1),
    ],
)
def test_what_is_no_beat_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        decode_beat(data)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with contextlib.suppress(Invalid):
        decode_beat(data)


@given(st.integers(0, 20_000))
def test_beats_are_slower_in_larger_clusters_and_bounded(nodes: int) -> None:
    interval_s = beat_interval_s(nodes)
    assert 1.0 <= interval_s <= 5.0
    assert interval_s <= beat_interval_s(nodes + 1)
    assert suspect_after_s(interval_s) < offline_after_s(interval_s)


def test_the_figures_of_small_and_large_clusters() -> None:
    assert [beat_interval_s(n) for n in (1, 100, 1000, 10_000, 50_000)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert (suspect_after_s(1.0), offline_after_s(1.0)) == (3.0, 8.0)


def test_steady_while_no_pause_is_too_long() -> None:
    assert heard((0.0, beat(1)), (3.0, beat(2)), (6.0, beat(3))).steady_since == 0.0
    assert heard((0.0, beat(1)), (3.1, beat(2)), (4.0, beat(3))).steady_since == 3.1


@pytest.mark.parametrize("stopping", [False, True])
def test_a_straggler_of_the_dead_life_does_not_silence_the_living_one(stopping: bool) -> None:
    """Simulation, seeds 1011 and 1190: the node was offline until its next start."""
    alive = [(1.0, beat(1, "new")), (1.1, beat(7, "old", stopping=stopping))]
    alive += [(float(at), beat(at, "new")) for at in range(2, 9)]
    known = heard(*alive)
    assert (known.boot, known.seq, known.stopped, known.earlier_life_s) == ("new", 8, False, 0.0)


def test_late_and_double_beats_change_nothing() -> None:
    known = heard((0.0, beat(1)), (1.0, beat(3)))
    assert hear(known, beat(2), 1.5) is known
    assert hear(known, beat(3), 1.5) is known


def test_a_restart_is_another_life() -> None:
    known = heard((0.0, beat(1)), (5.0, beat(9)), (7.0, beat(1, "two")))
    assert (known.boot, known.seq, known.steady_since, known.earlier_life_s) == ("two", 1, 7.0, 5.0)
    assert hear(known, beat(10), 7.5) is known  # of the life before, under way for long


def test_after_a_goodbye_only_another_life_counts() -> None:
    known = heard((0.0, beat(1)), (1.0, beat(2, stopping=True)))
    assert known.stopped
    assert hear(known, beat(3), 2.0) is known
    assert not hear(known, beat(1, "two"), 2.0).stopped


def test_deaf_until_its_own_beats_come_back() -> None:
    ears = Ears(A)
    ears.hear(B, beat(1), 0.0)
    assert ears.hears_since(0.5) is None
    ears.hear(A, beat(1), 1.0)
    assert ears.hears_since(2.9) == 1.0
    assert ears.hears_since(3.1) is None  # two of its own are missing
    ears.hear(A, beat(4), 6.0)
    assert ears.hears_since(6.5) == 6.0


def test_usage_has_its_age() -> None:
    ears = Ears(A)
    assert ears.usage(B, 0.0).age_s is None
    ears.hear(B, Beat(boot="x", seq=1, usage=Utilization(cpu=0.5)), 1.0)
    assert ears.usage(B, 3.0) == Utilization(cpu=0.5, age_s=2.0)


def test_strangers_are_forgotten_members_are_not() -> None:
    ears = Ears(A)
    for node in (A, B, NodeId("c")):
        ears.hear(node, beat(1), 0.0)
    ears.forget({A}, UNKNOWN_KEPT_S - 1)
    assert len(ears) == 3
    ears.forget({A}, UNKNOWN_KEPT_S + 1)
    assert list(ears) == [A]
