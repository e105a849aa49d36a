"""What changes write, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Conflict, Invalid, NotFound, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import MAX_BATCH_WRITES, Write, check_batch
from ollama_distributed.state import keys
from ollama_distributed.state.changes import (
    KEPT_CHANGES,
    KEPT_VERSIONS,
    Change,
    Proposal,
    RemoveNode,
    RollbackConfig,
    SetConfig,
    SetDrain,
    SetLabels,
    SetVoters,
    plan_change,
)
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Applied, Config, Member, Voters

N = [NodeId(f"n{i}") for i in range(6)]


def put(state: ClusterState, key: str, value: bytes | None) -> ClusterState:
    return apply(state, key, value, state.revision + 1)


def start() -> ClusterState:
    """Five servers, n1 offline, and one mere node; n0 votes."""
    state = ClusterState()
    for node in N:
        role = "node" if node == "n5" else "server"
        advert = Advert(
            node=node,
            name=f"name-{node}",
            role=role,  # type: ignore[arg-type]
            version="1",
            boot="b",
            started_at=1.0,
            labels={"zone": "a"},
        )
        status = "offline" if node == "n1" else "online"
        state = put(state, keys.advert(node), encode(advert))
        state = put(
            state,
            keys.member(node),
            encode(Member(node=node, status=status, since=1.0)),  # type: ignore[arg-type]
        )
    return put(state, keys.VOTERS, encode(Voters(nodes=(N[0],))))


def make(state: ClusterState, change: Change, proposal: str = "p") -> ClusterState:
    """Plan it and write it, as an engine would: every revision must hold."""
    planned = plan_change(state, Proposal(id=proposal, change=change, actor="k1", at=9.0))
    check_batch([Write(write.key, write.value, write.revision) for write in planned])
    for write in planned:
        assert state.revision_of(write.key) == write.revision
    for write in planned:
        state = put(state, write.key, write.value)
    assert state.applied[proposal] == Applied(kind=state.applied[proposal].kind, by="k1", at=9.0)
    assert not state.rejected
    return state


def refused(state: ClusterState, change: Change) -> OllamaDistributedError:
    with pytest.raises(OllamaDistributedError) as caught:
        plan_change(state, Proposal(id="p", change=change))
    return caught.value


def test_a_version_of_the_config_goes_on_top_of_the_one_it_was_made_from() -> None:
    state = make(start(), SetConfig(values={"a": 1}, base=0, comment="first"), "p1")
    assert state.config == Config(version=1, values={"a": 1}, by="k1", at=9.0, comment="first")
    assert state.version(1) == state.config
    stale = refused(state, SetConfig(values={"a": 2}, base=0))
    assert isinstance(stale, Conflict)
    assert stale.revision == 1
    state = make(state, SetConfig(values={"a": 2}, base=1), "p2")
    assert [config.values for config in state.versions()] == [{"a": 2}, {"a": 1}]


def test_a_rollback_is_a_new_version() -> None:
    state = make(start(), SetConfig(values={"a": 1}, base=0), "p1")
    state = make(state, SetConfig(values={"a": 2}, base=1), "p2")
    state = make(state, RollbackConfig(version=1, base=2), "p3")
    assert (state.config.version, state.config.values) == (3, {"a": 1})
    state = make(state, RollbackConfig(version=0, base=3), "p4")
    assert (state.config.version, state.config.values) == (4, {})
    assert isinstance(refused(state, RollbackConfig(version=7, base=4)), NotFound)
    assert isinstance(refused(state, RollbackConfig(version=1, base=3)), Conflict)


def test_only_so_many_versions_and_changes_are_kept() -> None:
    state = start()
    for n in range(KEPT_CHANGES + 40):
        state = make(state, SetConfig(values={"n": n}, base=n), f"p{n}")
    assert [c.version for c in state.versions()] == list(
        range(KEPT_CHANGES + 40, KEPT_CHANGES + 40 - KEPT_VERSIONS, -1)
    )
    assert len(state.applied) == KEPT_CHANGES
    assert "p39" not in state.applied
    assert "p40" in state.applied


def test_too_much_of_old_goes_a_little_at_a_time() -> None:
    state = start()
    for n in range(2_000):
        state = put(state, keys.version(n), encode(Config(version=n)))
        state = put(state, keys.change(f"c{n}"), encode(Applied(kind="x")))
    state = put(state, keys.CONFIG, encode(Config(version=1_999)))
    planned = plan_change(state, Proposal(id="p", change=SetConfig(values={}, base=1_999)))
    assert len(planned) < MAX_BATCH_WRITES / 10


def test_a_config_that_this_version_cannot_read_is_not_overwritten() -> None:
    state = put(start(), keys.CONFIG, b'{"version":"five"}')
    assert isinstance(refused(state, SetConfig(values={}, base=0)), Conflict)


def test_draining_and_labels_are_kept_apart() -> None:
    state = make(start(), SetDrain(node=N[2], drain=True), "p1")
    assert state.nodes[N[2]].status == "draining"
    state = make(state, SetLabels(node=N[2], labels={"team": "red", "zone": None}), "p2")
    assert state.nodes[N[2]].labels == {"team": "red"}
    assert state.nodes[N[2]].draining
    state = make(state, SetDrain(node=N[2], drain=False), "p3")
    assert state.nodes[N[2]].status == "online"
    assert state.nodes[N[2]].labels == {"team": "red"}
    state = make(state, SetLabels(node=N[2], labels={"team": None, "zone": "b"}), "p4")
    assert state.nodes[N[2]].labels == {"zone": "b"}
    intent = state.nodes[N[2]].intent
    assert intent is not None
    assert intent.labels == {"zone": "b"}, "a label that nobody has needs no None"


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"x" * 64: "1"},
        {"a": "x" * 64},
        {"-a": "1"},
        {"a b": "1"},
        {"a": "ö"},
        {f"l{i}": "" for i in range(65)},
    ],
)
def test_labels_have_bounds_and_are_as_in_the_settings(labels: dict[str, str | None]) -> None:
    assert isinstance(refused(start(), SetLabels(node=N[2], labels=labels)), Invalid)


def test_a_removed_node_leaves_nothing() -> None:
    state = make(start(), SetDrain(node=N[1], drain=True), "p1")
    state = make(state, RemoveNode(node=N[1]), "p2")
    assert N[1] not in state.nodes
    assert not [key for key in state.raw if N[1] in key]
    assert isinstance(refused(state, RemoveNode(node=N[1])), NotFound)


def test_a_living_node_is_removed_by_force_only_and_a_voter_never() -> None:
    state = start()
    assert isinstance(refused(state, RemoveNode(node=N[2])), Conflict)
    assert N[2] not in make(state, RemoveNode(node=N[2], force=True)).nodes
    assert isinstance(refused(state, RemoveNode(node=N[0], force=True)), Conflict)


@pytest.mark.parametrize(
    "change", [SetDrain(node=NodeId("x"), drain=True), SetLabels(node=NodeId("x"), labels={})]
)
def test_nobody_is_not_found(change: Change) -> None:
    assert isinstance(refused(start(), change), NotFound)


def test_voters_change_from_what_stands_to_an_odd_number_of_servers() -> None:
    state = make(start(), SetVoters(nodes=(N[2], N[0], N[1]), before=(N[0],)), "p1")
    assert state.voters is not None
    assert state.voters.nodes == (N[0], N[1], N[2])
    three = state.voters.nodes
    assert isinstance(refused(state, SetVoters(nodes=(N[0],), before=(N[0],))), Conflict)
    for nodes in ((), (N[0], N[1]), (N[0], N[0], N[1]), (N[0], N[1], N[5])):
        assert isinstance(refused(state, SetVoters(nodes=nodes, before=three)), Invalid)
    unknown = SetVoters(nodes=(N[0], N[1], NodeId("x")), before=three)
    assert isinstance(refused(state, unknown), NotFound)


changes: st.SearchStrategy[Change] = st.one_of(
    st.builds(SetConfig, values=st.just({"a": 1}), base=st.integers(0, 3)),
    st.builds(RollbackConfig, version=st.integers(0, 3), base=st.integers(0, 3)),
    st.builds(SetDrain, node=st.sampled_from(N), drain=st.booleans()),
    st.builds(
        SetLabels,
        node=st.sampled_from(N),
        labels=st.dictionaries(st.sampled_from(["zone", "b"]), st.none() | st.just("1")),
    ),
    st.builds(RemoveNode, node=st.sampled_from(N), force=st.booleans()),
    st.builds(
        SetVoters,
        nodes=st.lists(st.sampled_from(N), max_size=3).map(tuple),
        before=st.just((N[0],)),
    ),
)


@given(st.lists(changes, max_size=12))
def test_whatever_is_planned_can_be_written_and_is_read_again(wanted: list[Change]) -> None:
    state = start()
    for number, change in enumerate(wanted):
        try:
            plan_change(state, Proposal(id="p", change=change))
        except (NotFound, Conflict, Invalid):
            continue
        state = make(state, change, f"p{number}")
        assert state.voters is not None
        assert all(node in state.nodes for node in state.voters.nodes), "a voter is never removed"
