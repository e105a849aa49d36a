"""Models that are deleted everywhere: which versions go, which stay, and when it is forgotten."""

from __future__ import annotations

import pytest

from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state import deleting, keys
from ollama_distributed.state.changes import Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.deleting import DeleteModel
from ollama_distributed.state.records import Deleted, HeldModel, Holdings
from ollama_distributed.state.wanting import SetReplicas

DAY = 86_400.0


def put(state: ClusterState, key: str, value: bytes | None) -> ClusterState:
    return apply(state, key, value, state.revision + 1)


def hold(state: ClusterState, node: str, at: float, *models: str) -> ClusterState:
    held = [HeldModel(name=m, display=m, digest="d", size_bytes=1, modified_at=at) for m in models]
    return put(state, keys.holdings(node), encode(Holdings(node=NodeId(node), models=tuple(held))))


def delete(state: ClusterState, model: str, at: float) -> ClusterState:
    proposal = Proposal(id=f"p{state.revision}", change=DeleteModel(model=model), actor="k1", at=at)
    for write in plan_change(state, proposal):
        assert state.revision_of(write.key) == write.revision
        state = put(state, write.key, write.value)
    return state


def test_what_was_there_goes_and_what_comes_later_stays() -> None:
    state = hold(hold(ClusterState(), "a", 1.0, "m", "other"), "b", 2.0, "m")
    state = delete(state, "m", 5.0)
    assert list(state.models) == ["other"]
    assert list(state.leftovers["m"]) == ["a", "b"]
    state = hold(hold(state, "a", 1.0, "other"), "b", 6.0, "m")
    assert (list(state.models["m"]), len(state.leftovers)) == (["b"], 0)
    assert list(hold(state, "c", 4.0, "m").models["m"]) == ["b"], "a node that comes back with the old one"


def test_a_clock_that_is_behind_deletes_all_the_same() -> None:
    state = delete(hold(ClusterState(), "a", 100.0, "m"), "m", 5.0)
    assert state.deleted["m"] == Deleted(model="m", until=100.0, by="k1", at=5.0)
    assert delete(state, "m", 6.0).deleted["m"].until == 100.0
    assert not state.models


def test_what_lives_in_an_engine_of_a_node_stays() -> None:
    model = HeldModel(name="m", display="m", digest="d", size_bytes=1, modified_at=1.0, remote=True)
    held = encode(Holdings(node=NodeId("a"), models=(model,)))
    assert list(delete(put(ClusterState(), keys.holdings("a"), held), "m", 5.0).models) == ["m"]


def test_what_was_wanted_of_its_places_goes_with_it() -> None:
    state = hold(ClusterState(), "a", 1.0, "m")
    wanted = Proposal(id="w", change=SetReplicas(model="m", replicas=3), at=1.0)
    for write in plan_change(state, wanted):
        state = put(state, write.key, write.value)
    assert "m" in state.desired
    assert not delete(state, "m", 2.0).desired


def test_it_is_forgotten_after_a_week_unless_somebody_has_it_still() -> None:
    state = hold(ClusterState(), "away", 1.0, "m", "n")
    state = delete(delete(state, "m", 2.0), "n", 2.0)
    state = hold(state, "away", 1.0, "n")  # it heard of one of them
    assert list(delete(state, "x", 2.0 + 6 * DAY).deleted) == ["m", "n", "x"]
    state = delete(state, "x", 3.0 + 7 * DAY)
    assert list(state.deleted) == ["n", "x"]
    assert list(put(state, keys.deleted("n"), None).models["n"]) == ["away"]


def test_there_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deleting, "MAX_DELETED", 3)
    state = hold(ClusterState(), "away", 1.0, "m1", "m2", "m3")
    for model in ("m1", "gone", "m2", "m3"):
        state = delete(state, model, 5.0)
    assert list(state.deleted) == ["m1", "m2", "m3"], "nobody had `gone` any more"
    with pytest.raises(Conflict, match="nodes that are away"):
        delete(state, "m4", 6.0)
    assert delete(state, "m2", 7.0).deleted["m2"].until == 7.0
    with pytest.raises(Invalid):
        delete(state, "m" * 2000, 8.0)
