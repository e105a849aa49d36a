"""What is wanted of models by default, and what nodes' load reports come to."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.placement.gauge import DOWN_S, STALE_S, UP_S, Gauge
from ollama_distributed.placement.wishes import Policy, around, desired_of
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Desired, HeldModel, Holdings, Intent, Member, Placed

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def cluster(*held: tuple[NodeId, str], drained: Iterable[NodeId] = (), remote: bool = False) -> ClusterState:
    state = ClusterState()
    digests = dict(held)
    for node in (A, B, C):
        models = ()
        if node in digests:
            one = HeldModel(
                name="m", display="m", digest=digests[node], size_bytes=1, modified_at=1.0, remote=remote
            )
            models = (one,)
        for key, record in (
            (keys.member(node), Member(node=node, status="online", since=1.0)),
            (keys.placed(node), Placed(node=node)),
            (keys.holdings(node), Holdings(node=node, models=models)),
            (keys.intent(node), Intent(node=node, drain=node in set(drained))),
        ):
            state = apply(state, key, encode(record), state.revision + 1)
    return state


def wanted(state: ClusterState, copies: int) -> tuple[int | None, int | None] | None:
    found = desired_of(state, "m", around(state, Policy(copies=copies)))
    return None if found is None else (found.min, found.max)


def test_by_default_a_model_has_a_few_copies_but_not_more_than_there_are_nodes() -> None:
    state = cluster((A, "1"))
    assert wanted(state, 2) == (2, None)
    assert wanted(state, 5) == (3, None)
    assert wanted(cluster((A, "1"), drained=[A, B]), 3) == (1, None)
    assert wanted(state, 1) is wanted(state, 0) is None
    assert wanted(cluster(), 3) is None
    assert wanted(cluster((A, "1"), remote=True), 3) is None


def test_without_spreading_it_leaves_a_node_that_drains_when_no_other_has_it() -> None:
    assert wanted(cluster((A, "1"), drained=[A]), 1) == (1, 1)
    assert wanted(cluster((A, "1"), (B, "1"), drained=[A]), 1) is None


def test_whoever_has_another_version_is_to_have_the_one_that_counts() -> None:
    assert wanted(cluster((A, "1"), (B, "2")), 1) == (2, 2)
    assert wanted(cluster((A, "1"), (B, "2"), (C, "1")), 2) == (3, None)


@pytest.mark.parametrize(
    ("order", "least"),
    [
        (Desired(model="m", preload=True), 3),
        (Desired(model="m", max=2), 2),
        (Desired(model="m", min=1), 1),
        (Desired(model="m", min=0), 0),
    ],
)
def test_what_an_order_leaves_open_is_as_by_default(order: Desired, least: int) -> None:
    state = cluster((A, "1"))
    state = apply(state, keys.desired("m"), encode(order), state.revision + 1)
    found = desired_of(state, "m", around(state, Policy(copies=3)))
    assert found == msgspec.structs.replace(order, min=least)


# ── the gauge ───────────────────────────────────────────────────────────────────────


class Reports:
    """Also the clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.loads: dict[NodeId, Load] = {}
        self.asked: list[NodeId] = []

    def time(self) -> float:
        return self.now

    monotonic = time

    def interest(self, nodes: Iterable[NodeId]) -> None:
        self.asked = list(nodes)

    def report(self, node: NodeId) -> Load | None:
        return self.loads.get(node)

    def say(self, node: NodeId, busy: int, queued: int = 0, used_at: float = 0.0, age_s: float = 0.0) -> None:
        row = ModelLoad(name="m", slots=4, busy=busy, queued=queued, used_at=used_at)
        self.loads[node] = Load(models=(row,), age_s=age_s)


def after(reports: Reports, gauge: Gauge, seconds: float) -> float:
    for _ in range(round(seconds)):
        reports.now += 1.0
        gauge.look()
    return gauge.demand("m").work


def test_work_rises_soon_and_falls_slowly() -> None:
    reports = Reports()
    gauge = Gauge(reports, reports)
    assert gauge.demand("m").loaded == 0
    gauge.put(A, ["m"])
    gauge.put(B, ["m"])
    reports.say(A, 4, queued=6)
    assert after(reports, gauge, 3 * UP_S) > 18, "b is not heard, and works as much as a"
    assert reports.asked == [A, B]
    reports.say(B, 0)
    reports.say(A, 0)
    assert 6 < after(reports, gauge, DOWN_S) < 8
    demand = gauge.demand("m")
    assert (demand.slots, demand.loaded) == (4, 2)
    gauge.put(A, [])
    assert gauge.demand("m").loaded == 1
    gauge.put(B, [])
    assert gauge.models() == []


def test_use_is_seen_by_change_and_old_reports_say_nothing() -> None:
    reports = Reports()
    gauge = Gauge(reports, reports)
    gauge.put(A, ["m"])
    reports.say(A, 0, used_at=5e9)  # by a clock that is years ahead
    after(reports, gauge, 1)
    after(reports, gauge, 30)
    assert gauge.demand("m").idle_s == 30.0
    reports.say(A, 0, used_at=5e9 + 10)
    after(reports, gauge, 1)
    assert gauge.demand("m").idle_s == 0.0
    reports.say(A, 3, age_s=STALE_S + 1)
    assert after(reports, gauge, 20) == 0.0
