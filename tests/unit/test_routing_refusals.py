"""Which replicas were full for whom, for a moment."""

from __future__ import annotations

import pytest

from ollama_distributed.base.errors import QueueFull
from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.refusals import ENOUGH, FULL_S, KEPT_S, LOST_S, MOST, Asker, Refusals

A, B = NodeId("a"), NodeId("b")
FLOOD: Asker = ("flood", "normal")
FULL = QueueFull("full", retry_after_s=7.0)


def tried(known: Refusals, now: float, node: NodeId = A) -> bool:
    """Whether a request goes there now."""
    goes = node in known.left([node], "m", FLOOD, now)[0]
    if goes:
        known.asked(node, "m", FLOOD, now)
    return goes


def test_a_replica_that_was_full_for_a_key_is_tried_again_by_one_request_at_a_time() -> None:
    known = Refusals()
    assert known.left([A, B], "m", FLOOD, 0.0) == ((A, B), None)
    known.refused(A, "m", FLOOD, FULL, 0.0)
    left, said = known.left([A, B], "m", FLOOD, FULL_S / 2)
    assert left == (B,)
    assert isinstance(said, QueueFull)
    assert said is not FULL, "it may be raised"
    assert (said.message, said.retry_after_s) == ("full", 7.0)
    assert [tried(known, FULL_S) for _ in range(3)] == [True, False, False]
    known.refused(A, "m", FLOOD, FULL, 3.0)
    assert [tried(known, 3.0 + at) for at in (0.0, FULL_S, FULL_S)] == [False, True, False]


def test_the_more_are_taken_the_more_are_tried_until_it_is_forgotten() -> None:
    known = Refusals()
    known.refused(A, "m", FLOOD, FULL, 0.0)
    known.taken(A, "m", FLOOD)
    assert [tried(known, 0.0) for _ in range(2)] == [True, False], "one went, so one may come"
    for _ in range(2 * ENOUGH):
        known.taken(A, "m", FLOOD)
    assert not known
    assert all(tried(known, 0.0) for _ in range(100))


@pytest.mark.parametrize("heard", [True, False])
def test_without_another_refusal_it_is_forgotten(heard: bool) -> None:
    known = Refusals()
    known.refused(A, "m", FLOOD, FULL, 0.0)
    assert tried(known, FULL_S)
    if heard:
        known.taken(A, "m", FLOOD)
    else:
        assert not tried(known, KEPT_S + 1.0), "one is on its way"
    over = (KEPT_S if heard else LOST_S + FULL_S) + 0.01
    assert all(tried(known, over) for _ in range(100))
    assert not known


def test_it_is_asked_for_others_for_other_classes_and_for_other_models() -> None:
    known = Refusals()
    known.refused(A, "m", FLOOD, FULL, 0.0)
    others: list[tuple[str, Asker | None]] = [
        ("m", ("other", "normal")),
        ("m", ("flood", "interactive")),
        ("n", FLOOD),
        ("m", None),
    ]
    for model, asker in others:
        known.asked(A, model, asker, 0.0)
        known.taken(A, model, asker)
        assert known.left([A], model, asker, 0.0) == ((A,), None)
    assert known.left([A], "m", FLOOD, 0.0)[0] == ()


def test_what_is_remembered_is_bounded() -> None:
    known = Refusals()
    for number in range(3 * MOST):
        known.refused(NodeId(str(number)), "m", FLOOD, FULL, 0.0)
        known.refused(A, "m", (str(number), "normal"), FULL, 0.0)
    assert len(known) <= MOST
