"""Where models are wanted: what each change makes of the record, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state import keys
from ollama_distributed.state.changes import Change, Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Assigned, Desired, HeldModel, Holdings, Placed
from ollama_distributed.state.wanting import Pin, SetReplicas, Unpin, Unplace

N1, N2 = NodeId("n1"), NodeId("n2")
MODEL = "registry.ollama.ai/library/m:latest"


def cluster() -> ClusterState:
    state = ClusterState()
    for number, node in enumerate((N1, N2), 1):
        advert = Advert(node=node, name=node, role="server", version="1", boot="b", started_at=0.0)
        state = apply(state, keys.advert(node), encode(advert), number)
    held = HeldModel(name=MODEL, display="m", digest="00", size_bytes=7, modified_at=1.0)
    return apply(state, keys.holdings(N1), encode(Holdings(node=N1, models=(held,))), 3)


def after(state: ClusterState, *changes: Change) -> ClusterState:
    for change in changes:
        proposal = Proposal(id=f"p{state.revision}", change=change, actor="k1", at=9.0)
        for write in plan_change(state, proposal):
            assert write.revision == state.revision_of(write.key)
            state = apply(state, write.key, write.value, state.revision + 1)
    return state


def test_what_is_not_said_stays() -> None:
    state = after(
        cluster(),
        SetReplicas(model=MODEL, replicas=2, labels={"zone": "a"}),
        Pin(model=MODEL, node=N2),
        Pin(model=MODEL, node=N1),
        SetReplicas(model=MODEL, min=0, max=4, replicas=None),
        Unpin(model=MODEL, node=N2),
    )
    assert state.desired[MODEL] == Desired(
        model=MODEL, min=0, max=4, labels={"zone": "a"}, pins=(N1,), by="k1", at=9.0
    )


def test_nothing_is_wanted_any_more() -> None:
    state = after(cluster(), Pin(model=MODEL, node=N1), Unplace(model=MODEL))
    assert not state.desired
    assert keys.desired(MODEL) not in state.raw


def test_a_pin_twice_is_one() -> None:
    state = after(cluster(), Pin(model=MODEL, node=N1), Pin(model=MODEL, node=N1))
    assert state.desired[MODEL].pins == (N1,)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (SetReplicas(model="nobody/has:it", replicas=1), NotFound),
        (Pin(model=MODEL, node=NodeId("n9")), NotFound),
        (Unpin(model=MODEL, node=N1), NotFound),
        (Unplace(model=MODEL), NotFound),
        (SetReplicas(model=MODEL, replicas=-1), Invalid),
        (SetReplicas(model=MODEL, min=3, max=2), Invalid),
        (SetReplicas(model=MODEL, keep_alive_s=-1.0), Invalid),
        (SetReplicas(model=MODEL, keep_alive_s=float("nan")), Invalid),
        (SetReplicas(model=MODEL, labels={"": "x"}), Invalid),
        (SetReplicas(model=MODEL, labels={f"l{i}": "x" for i in range(17)}), Invalid),
    ],
)
def test_what_cannot_be_is_refused(change: Change, error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_change(cluster(), Proposal(id="p", change=change))


def test_a_model_that_is_wanted_can_be_changed_though_nobody_holds_it_now() -> None:
    state = after(cluster(), SetReplicas(model=MODEL, replicas=2))
    state = apply(state, keys.holdings(N1), None, state.revision + 1)
    assert after(state, SetReplicas(model=MODEL, replicas=3)).desired[MODEL].replicas == 3


def test_a_newer_record_is_not_overwritten() -> None:
    state = apply(cluster(), keys.desired(MODEL), b'{"model":7}', 9)
    with pytest.raises(Conflict):
        plan_change(state, Proposal(id="p", change=SetReplicas(model=MODEL, replicas=1)))


def test_a_record_under_another_models_key_is_left_out() -> None:
    state = apply(cluster(), keys.desired("other"), encode(Desired(model=MODEL)), 9)
    assert not state.desired
    assert "another model" in state.rejected[keys.desired("other")]


@pytest.mark.parametrize(
    ("key", "record"),
    [
        (keys.assigned(N1), Assigned(node=N1, epoch=1)),
        (keys.placed(N1), Placed(node=N1, memory_bytes=5)),
    ],
)
def test_records_of_a_node_come_and_go(key: str, record: Any) -> None:
    state = apply(cluster(), key, encode(record), 9)
    assert record in (state.nodes[N1].assigned, state.nodes[N1].placed)
    assert apply(state, key, None, 10).nodes[N1] == cluster().nodes[N1]
