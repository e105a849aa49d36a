"""The fold: events and snapshots agree, views follow the records, strangers do no harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.errors import Conflict, NotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ABSENT, ClusterState, NodeState, advanced, apply
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import (
    Advert,
    Applied,
    Config,
    Deleted,
    HeldModel,
    Holdings,
    Intent,
    Lease,
    Member,
    Term,
    Voters,
)

Event = tuple[str, bytes | None]
STATUSES: list[NodeStatus] = ["joining", "online", "suspect", "offline"]


def advert(node: str, *, name: str = "", role: str = "node", labels: dict[str, str] | None = None) -> Advert:
    return Advert(
        node=NodeId(node),
        name=name or node,
        role="server" if role == "server" else "node",
        version="1",
        boot="b",
        started_at=1.0,
        labels=labels or {},
    )


def holds(node: str, *names: str, digest: str = "d", at: float = 1.0) -> Holdings:
    models = tuple(
        HeldModel(name=name, display=name, digest=digest, size_bytes=1, modified_at=at) for name in names
    )
    return Holdings(node=NodeId(node), models=models)


def member(node: str, status: NodeStatus = "online", since: float = 1.0) -> Member:
    return Member(node=NodeId(node), status=status, since=since)


def told(
    *events: tuple[str, msgspec.Struct | bytes | None], state: ClusterState | None = None
) -> ClusterState:
    state = state or ClusterState()
    for key, record in events:
        value = encode(record) if isinstance(record, msgspec.Struct) else record
        state = apply(state, key, value, state.revision + 1)
    return state


# ── snapshots and events ────────────────────────────────────────────────────────────

nodes = st.sampled_from(["n1", "n2", "n3", "n4"])
names = st.sampled_from(["m1", "m2", "m3"])
garbage = st.sampled_from([b"", b"{}", b"nonsense", b'{"node":"other"}'])


@st.composite
def events(draw: st.DrawFn) -> Event:
    node, at = draw(nodes), draw(st.sampled_from([1.0, 2.0, 3.0]))
    model = draw(names)
    key, record = draw(
        st.sampled_from(
            [
                (keys.advert(node), advert(node, name=draw(st.sampled_from(["x", "y"])))),
                (keys.advert(node), advert(node, role="server", labels={"a": draw(names)})),
                (
                    keys.holdings(node),
                    holds(node, *draw(st.lists(names, unique=True)), digest=draw(names), at=at),
                ),
                (keys.deleted(model), Deleted(model=model, until=at)),
                (keys.deleted(model), Deleted(model="m1", until=at)),
                (keys.member(node), member(node, draw(st.sampled_from(STATUSES)))),
                (keys.intent(node), Intent(node=NodeId(node), drain=draw(st.booleans()))),
                (keys.CONFIG, Config(version=draw(st.integers(0, 3)))),
                (keys.version(draw(st.integers(0, 3))), Config(version=draw(st.integers(0, 3)))),
                (keys.VOTERS, Voters(nodes=(NodeId(node),))),
                (keys.LEASE, Lease(node=NodeId(node), epoch=draw(st.integers(1, 3)))),
                (keys.FENCE, Term(node=NodeId(node), epoch=1)),
                (keys.change(node), Applied(kind="x")),
                ("admission.tokens.t1", Applied(kind="not ours")),
                (f"nodes.{node}.from_the_future", Applied(kind="unknown")),
            ]
        )
    )
    return key, draw(st.just(encode(record)) | st.none() | garbage)


def snapshot(history: list[Event], at: int = 0) -> dict[str, tuple[bytes, int]]:
    present: dict[str, tuple[bytes, int]] = {}
    for revision, (key, value) in enumerate(history, at + 1):
        if value is None:
            present.pop(key, None)
        else:
            present[key] = (value, revision)
    return present


def loaded(present: dict[str, tuple[bytes, int]], revision: int, start: ClusterState) -> ClusterState:
    """As the mirror does at a resync."""
    state = start
    for key, (value, at) in sorted(present.items()):
        state = apply(state, key, value, at)
    for key in [key for key in state.raw if key not in present]:
        state = apply(state, key, None, revision)
    return advanced(state, revision)


@given(st.lists(events(), max_size=30), st.lists(events(), max_size=15), st.data())
def test_events_and_snapshots_give_the_same_state(
    first: list[Event], then: list[Event], data: st.DataObject
) -> None:
    history = first + then
    followed = ClusterState()
    for revision, (key, value) in enumerate(history, 1):
        followed = apply(followed, key, value, revision)
    final = snapshot(history)
    assert loaded(final, len(history), ClusterState()) == followed
    # A snapshot in the middle, and events after it.
    half = loaded(snapshot(first), len(first), ClusterState())
    for revision, (key, value) in enumerate(then, len(first) + 1):
        half = apply(half, key, value, revision)
    assert half == followed
    # A snapshot on top of whatever was known before, even of another history.
    other = ClusterState()
    for revision, (key, value) in enumerate(data.draw(st.lists(events(), max_size=15)), 1):
        other = apply(other, key, value, revision)
    assert loaded(final, len(history), other) == followed


@given(st.lists(events(), max_size=40))
def test_views_are_what_a_naive_look_at_the_nodes_gives(history: list[Event]) -> None:
    state = told(*history)
    every = list(state.nodes.values())
    assert [node.id for node in every] == sorted(node.id for node in every)
    naive: dict[str, dict[NodeId, HeldModel]] = {}
    left: dict[str, dict[NodeId, HeldModel]] = {}
    for node in every:
        for model in node.holdings.models if node.holdings else ():
            deleted = state.deleted.get(model.name)
            there = naive if deleted is None or model.modified_at > deleted.until else left
            there.setdefault(model.name, {})[node.id] = model
    assert {name: dict(holders) for name, holders in state.models.items()} == naive
    assert {name: dict(holders) for name, holders in state.leftovers.items()} == left
    for name, known in state.deleted.items():
        assert (known.model, known) == (name, decode(state.raw[keys.deleted(name)][0], Deleted))
    assert dict(state.counts) == {
        status: n for status in [*STATUSES, "draining"] if (n := sum(x.status == status for x in every))
    }
    assert list(state.servers) == [n.id for n in every if n.advert and n.advert.role == "server"]
    called: dict[str, tuple[NodeId, ...]] = {}
    for node in every:
        if node.advert:
            called[node.advert.name] = (*called.get(node.advert.name, ()), node.id)
    assert dict(state.names) == called
    assert all(not node.empty for node in every)


@given(st.lists(events(), max_size=30))
def test_a_snapshot_that_says_nothing_new_changes_nothing(history: list[Event]) -> None:
    state = told(*history)
    again = loaded(snapshot(history), state.revision, state)
    assert again == state
    assert again.nodes is state.nodes, "nothing is decoded or copied again"
    assert again.raw is state.raw


# ── strangers ───────────────────────────────────────────────────────────────────────


def test_what_is_not_known_is_ignored_and_moves_the_revision() -> None:
    state = told(("nodes.n1.advert", advert("n1")))
    for key in (
        "nodes.n1.later",
        "nodes.n1",
        "config.history.x",
        "config.history.007",
        "zebra",
        "members.a.b",
    ):
        after = apply(state, key, b"\xff", state.revision + 1)
        assert after.nodes is state.nodes
        assert key not in after.raw
        assert after.revision == state.revision + 1
        assert apply(after, key, None, after.revision + 1).revision == after.revision + 1


def test_what_cannot_be_read_is_kept_out_and_named() -> None:
    state = told((keys.member("n1"), member("n1")), (keys.member("n1"), b'{"node":"n1","status":"asleep"}'))
    assert "n1" not in state.nodes
    assert "asleep" in state.rejected[keys.member("n1")]
    assert state.revision_of(keys.member("n1")) == 2, "it can still be replaced"
    better = told((keys.member("n1"), member("n1")), state=state)
    assert better.nodes[NodeId("n1")].status == "online"
    assert not better.rejected


def test_a_record_about_another_node_than_its_key_says_is_kept_out() -> None:
    state = told((keys.advert("n1"), advert("n2")), (keys.version(3), Config(version=4)))
    assert not state.nodes
    assert not state.history
    assert set(state.rejected) == {keys.advert("n1"), keys.version(3)}


# ── views ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "drain", "shown"),
    [
        (None, False, "joining"),
        (None, True, "draining"),
        ("joining", True, "draining"),
        ("online", False, "online"),
        ("online", True, "draining"),
        ("suspect", True, "suspect"),
        ("offline", True, "offline"),
    ],
)
def test_the_status_that_is_shown(status: NodeStatus | None, drain: bool, shown: str) -> None:
    node = NodeState(
        NodeId("n1"),
        advert=advert("n1"),
        member=member("n1", status, since=5.0) if status else None,
        intent=Intent(node=NodeId("n1"), drain=drain, at=9.0),
    )
    assert node.status == shown
    assert node.since == (9.0 if shown == "draining" else 5.0 if status else 1.0)
    assert node.alive == (status != "offline")


def test_the_operators_labels_lie_over_the_nodes_own() -> None:
    intent = Intent(node=NodeId("n1"), labels={"zone": "c", "rack": None, "team": "red"})
    node = NodeState(
        NodeId("n1"), advert=advert("n1", labels={"zone": "b", "rack": "1", "a": "1"}), intent=intent
    )
    assert node.labels == {"a": "1", "team": "red", "zone": "c"}
    assert list(node.labels) == ["a", "team", "zone"]


def test_a_node_is_found_by_id_or_by_a_name_of_its_own() -> None:
    state = told(
        (keys.advert("n1"), advert("n1", name="blue")),
        (keys.advert("n2"), advert("n2", name="red")),
        (keys.advert("n3"), advert("n3", name="red")),
        (keys.advert("red2"), advert("red2", name="n1")),
    )
    assert state.resolve("n1") == "n1", "an id goes before a name"
    assert state.resolve("blue") == "n1"
    with pytest.raises(Conflict, match="n2, n3"):
        state.resolve("red")
    with pytest.raises(NotFound, match="green"):
        state.resolve("green")


def test_holders_come_and_go() -> None:
    state = told(
        (keys.holdings("n2"), holds("n2", "m1", "m2")),
        (keys.holdings("n1"), holds("n1", "m1", digest="other")),
    )
    assert list(state.models["m1"]) == ["n1", "n2"]
    assert state.models["m1"][NodeId("n1")].digest == "other"
    state = told((keys.holdings("n2"), holds("n2", "m2")), state=state)
    assert list(state.models["m1"]) == ["n1"]
    state = told((keys.holdings("n1"), None), (keys.holdings("n2"), None), state=state)
    assert not state.models
    assert not state.nodes


def test_versions_of_the_config() -> None:
    state = told(*((keys.version(n), Config(version=n, by=str(n))) for n in (9, 10, 2)))
    assert [config.version for config in state.versions()] == [10, 9, 2]
    assert state.version(9) == Config(version=9, by="9")
    assert state.version(3) is None
    assert state.revision_of(keys.version(9)) == 1
    assert state.revision_of(keys.CONFIG) == ABSENT


def test_the_newest_version_that_a_living_node_holds_counts() -> None:
    state = told(
        *((keys.advert(node), advert(node)) for node in ("a", "b", "c", "d")),
        (keys.holdings("a"), holds("a", "m", digest="old", at=1.0)),
        (keys.holdings("b"), holds("b", "m", digest="new", at=3.0)),
        (keys.holdings("c"), holds("c", "m", digest="new", at=2.0)),
        (keys.holdings("d"), holds("d", "m", digest="newest", at=9.0)),
        (keys.member("d"), member("d", "offline")),
    )
    current = state.current("m")
    assert current is not None
    assert (current.digest, current.modified_at) == ("new", 3.0)
    assert state.holders("m") == ("b", "c")
    assert (state.current("x"), state.holders("x")) == (None, ())
    for node in ("a", "b", "c"):
        state = told((keys.member(node), member(node, "offline")), state=state)
    assert state.holders("m") == ("d",)
