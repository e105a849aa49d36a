"""Replicas that failed: ejected, probed, brought back slowly."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.health import FIRST_S, FORGIVEN_S, LONGEST_S, RETURN_S, Health
from ollama_distributed.routing.plan import Standing, plan

A, B = (NodeId("a"), "m"), (NodeId("b"), "m")


def always() -> float:
    return 0.0


def never() -> float:
    return 1.0


def test_from_well_to_ejected_to_probed_to_returning_to_well() -> None:
    health = Health()
    assert not health
    assert health.failed(A, 10.0, "stalled")
    assert health.circuit(A, 10.0) == ("open", "stalled")
    assert not health.failed(A, 10.1), "it is ejected already"
    assert health.shunned(A, 10.5, always)
    assert not health.shunned(B, 10.5, never)
    assert health.due(10.5) == []
    assert health.due(10.0 + FIRST_S) == [A]
    assert health.due(10.0 + FIRST_S) == [], "one probe at a time"
    assert health.well(A, 12.0)
    assert health.circuit(A, 12.0) == ("half-open", "stalled")
    assert health.circuit(A, 12.0 + RETURN_S) == health.circuit(B, 12.0) == ("closed", "")
    assert health.shunned(A, 12.0 + RETURN_S / 2, lambda: 0.51)
    assert not health.shunned(A, 12.0 + RETURN_S / 2, lambda: 0.49)
    assert not health.shunned(A, 12.0 + RETURN_S, never)
    assert not health.shunned(A, 12.0 + FORGIVEN_S + 1, never)
    assert not health, "forgotten"


def test_who_fails_again_and_again_is_left_alone_longer_and_longer() -> None:
    health, now, waits = Health(), 0.0, []
    for _ in range(8):
        health.failed(A, now)
        began = now
        while not health.due(now):
            now += 0.25
        waits.append(now - began)
        health.well(A, now)
        now += RETURN_S
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_S, LONGEST_S, LONGEST_S]


def test_a_probe_that_fails_waits_longer_for_the_next() -> None:
    health = Health()
    health.failed(A, 0.0)
    assert health.due(1.0) == [A]
    assert not health.failed(A, 1.5), "no news: it is ejected still"
    assert health.due(3.0) == []
    assert health.due(3.5) == [A]
    health.forget(lambda _: False)
    assert not health


@given(
    st.lists(
        st.tuples(st.sampled_from(["failed", "well", "due", "wait"]), st.sampled_from([A, B])), max_size=60
    ),
    st.integers(0, 9),
)
def test_whatever_happens_a_replica_that_stays_well_is_used_again(
    happened: list[tuple[str, tuple[NodeId, str]]], seed: int
) -> None:
    health, now, chance = Health(), 0.0, random.Random(seed).random
    for what, replica in happened:
        now += 0.5
        match what:
            case "failed":
                health.failed(replica, now)
            case "well":
                health.well(replica, now)
            case "due":
                for one in health.due(now):
                    assert health.shunned(one, now, chance), "only who is ejected is probed"
    for one in (A, B):
        health.well(one, now)
    now += RETURN_S
    assert not any(health.shunned(one, now, chance) for one in (A, B))
    assert health.due(now) == []


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_who_is_shunned_comes_after_all_who_are_not(shunned: list[bool], mine: bool, seed: int) -> None:
    holders = [Standing(node=NodeId(f"n{i}"), status="online", shunned=bad) for i, bad in enumerate(shunned)]
    me = NodeId("n0") if mine else NodeId("gateway")
    order = plan(holders, me, {}, random.Random(seed).randrange).order
    bad = {one.node for one in holders if one.shunned}
    judged = [node in bad for node in order]
    assert judged == sorted(judged)
    assert order, "a last resort is better than none"
