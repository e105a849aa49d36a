"""What the node's cluster side decides without a cluster: addresses, rows, voters, seats."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import NodeStatus, NodeUsage
from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.identity.tokens import TokenRecord, TokenUse
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.node.cluster import addresses, alerts, rows
from ollama_distributed.node.cluster.addresses import ListenOn, parse_listen
from ollama_distributed.node.cluster.front import beyond_this_machine
from ollama_distributed.node.cluster.seat import SeatFile
from ollama_distributed.node.cluster.voters import SETTLED_S, next_voters
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Intent, Lease, Member, Voters

# ── addresses ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("", "0.0.0.0", 0),
        ("*", "0.0.0.0", 0),
        (":7000", "0.0.0.0", 7000),
        ("192.0.2.7", "192.0.2.7", 0),
        ("192.0.2.7:7000", "192.0.2.7", 7000),
        ("::1", "::1", 0),
        ("[::1]:7000", "::1", 7000),
        ("gpu1.lan:7000", "gpu1.lan", 7000),
    ],
)
def test_where_to_listen(text: str, host: str, port: int) -> None:
    assert parse_listen(text) == ListenOn(host, port)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "127.0.0.1:x", "127.0.0.1:99999", "[::1]:"])
def test_a_wrong_address_is_refused(text: str) -> None:
    if text == "[::1]:":
        assert parse_listen(text).port == 0
        return
    with pytest.raises(Invalid, match="cluster-listen"):
        parse_listen(text)


def test_what_is_advertised_is_what_was_chosen_else_the_address_else_the_interfaces() -> None:
    everywhere = parse_listen("")
    assert addresses.advertised(["gpu1.lan", "[2001:db8::1]"], everywhere) == ("gpu1.lan", "2001:db8::1")
    assert addresses.advertised([], parse_listen("127.0.0.1")) == ("127.0.0.1",)
    found = addresses.advertised([], everywhere)
    assert found
    assert "0.0.0.0" not in found


def test_a_taken_default_port_gives_way_and_a_chosen_one_does_not() -> None:
    with addresses.bind("127.0.0.1", (0,), chosen=False) as taken:
        port = taken.getsockname()[1]
        with addresses.bind("127.0.0.1", (port,), chosen=False) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(Conflict, match=str(port)):
            addresses.bind("127.0.0.1", (port,), chosen=True)


def test_an_address_of_another_machine_cannot_be_used() -> None:
    with pytest.raises(Invalid, match="cannot be used"):
        addresses.bind("192.0.2.77", (0,), chosen=False)


def test_only_what_means_something_elsewhere_is_announced() -> None:
    where = ("127.0.0.1:7443", "[::1]:7443", "localhost:7443", "192.0.2.7:7443", "gpu1.lan:7443")
    assert beyond_this_machine(where) == ("192.0.2.7:7443", "gpu1.lan:7443")


# ── voters ──────────────────────────────────────────────────────────────────────────

NOW = 1000.0


def _state(*nodes: tuple[str, str, NodeStatus, float], voters: tuple[str, ...] = ()) -> ClusterState:
    """Of (id, role, status, since)."""
    state = ClusterState()
    revision = 0
    for node, role, status, since in nodes:
        advert = Advert(
            node=NodeId(node),
            name=f"name-{node}",
            role=role,
            version="1",
            boot="b",
            started_at=0.0,  # type: ignore[arg-type]
        )
        member = Member(node=NodeId(node), status=status, since=since)
        for key, record in ((keys.advert(node), advert), (keys.member(node), member)):
            revision += 1
            state = apply(state, key, encode(record), revision)
    if voters:
        state = apply(state, keys.VOTERS, encode(Voters(nodes=tuple(map(NodeId, voters)))), revision + 1)
    return state


def _next(state: ClusterState, *voters: str, admitted: str | None = None) -> tuple[NodeId, ...]:
    """`admitted`: as servers, a letter each; None: all."""
    return next_voters(
        state,
        tuple(map(NodeId, voters)),
        now=NOW,
        is_server=lambda node: admitted is None or node in admitted,
    )


def test_three_steady_servers_become_three_voters() -> None:
    three = _state(*((name, "server", "online", 0.0) for name in "abc"), voters=("a",))
    assert _next(three, "a") == ("b", "c")
    assert _next(three, "a", admitted="ab") == (), "c only says that it is a server"
    five = _state(*((name, "server", "online", float(i)) for i, name in enumerate("abcde")), voters=("a",))
    assert _next(five, *"abc") == ("d", "e")
    assert _next(five, *"abcde") == ()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("server", "node")),
            st.sampled_from(("joining", "online", "suspect", "offline", "draining")),
            st.sampled_from((0.0, NOW - SETTLED_S / 2)),
        ),
        max_size=8,
    ),
    st.sampled_from((1, 3)),
)
def test_only_steady_servers_are_chosen_and_only_beside_steady_voters(
    others: list[tuple[str, NodeStatus, float]], count: int
) -> None:
    voters = tuple(NodeId(f"v{i}") for i in range(count))
    nodes = [(str(voter), "server", "online", 0.0) for voter in voters]
    nodes += [(f"n{i}", *facts) for i, facts in enumerate(others)]  # type: ignore[misc]
    chosen = _next(_state(*nodes), *voters)  # type: ignore[arg-type]
    fit = {
        f"n{i}"
        for i, (role, status, since) in enumerate(others)
        if (role, status, since) == ("server", "online", 0.0)
    }
    assert len(chosen) == (2 if len(fit) >= 2 else 0)
    assert set(chosen) <= fit
    away = [(str(voters[0]), "server", "suspect", 0.0), *nodes[1:]]
    assert _next(_state(*away), *voters) == ()  # type: ignore[arg-type]


# ── rows ────────────────────────────────────────────────────────────────────────────


def test_a_status_says_why_it_is_not_ok_and_what_to_do() -> None:
    state = _state(("a", "server", "online", 0.0), ("b", "server", "offline", 5.0), voters=("a", "b", "c"))
    lease = Lease(node=NodeId("a"), epoch=3, since=7.0)
    state = apply(state, keys.LEASE, encode(lease), 99)
    status = rows.status_answer(
        state,
        cluster="c1",
        me=NodeId("a"),
        lease=lease,
        writable=True,
        alerts=alerts.of_state(state, lease),
        is_open=True,
        listen=("127.0.0.1:7443",),
    )
    assert (status.status, status.leader.name, status.leader.epoch) == ("degraded", "name-a", 3)
    (reason,) = status.reasons
    assert "voter name-b is offline" in reason
    assert "cluster voter replace name-b" in reason
    assert status.nodes == {"offline": 1, "online": 1}


@pytest.mark.parametrize("now", [NOW, NOW + 86_400.0])
def test_a_clock_within_the_days_of_the_certificate_is_no_trouble(now: float) -> None:
    own = Peer(
        cluster="c1",
        node=NodeId("a"),
        role="server",
        key_sha256="k",
        issued_at=NOW + 300.0,
        expires_at=NOW + 86_400.0,
    )
    assert alerts.of_clock(own, now) == []
    for wrong in (NOW - 1, NOW + 86_401):
        (told,) = alerts.of_clock(own, wrong)
        assert "1970-01-01 00:16 UTC to 1970-01-02 00:16 UTC" in told.message


def test_what_to_do_names_one_node_where_two_have_its_name() -> None:
    """A machine that was lost and joined anew."""
    state = _state(("a", "server", "online", 0.0), ("b", "server", "offline", 5.0), voters=("a", "b"))
    again = Advert(node=NodeId("c"), name="name-b", role="server", version="1", boot="b", started_at=0.0)
    state = apply(state, keys.advert("c"), encode(again), 90)
    status = rows.status_answer(
        state,
        cluster="c1",
        me=NodeId("a"),
        lease=None,
        writable=True,
        alerts=alerts.of_state(state, None),
        is_open=True,
        listen=(),
    )
    assert any("voter name-b is offline" in reason for reason in status.reasons)
    assert any(reason.endswith("cluster voter replace b") for reason in status.reasons)


def test_a_new_leader_is_not_shown_with_the_epoch_before() -> None:
    """Its lease is known to it before the news of it: never two nodes as leader of one epoch."""
    before = Lease(node=NodeId("b"), epoch=3, since=7.0)
    state = apply(_state(("a", "server", "online", 0.0)), keys.LEASE, encode(before), 99)
    now = Lease(node=NodeId("a"), epoch=4, since=9.0)
    shown = rows.leader_answer(state, now, NodeId("a"))
    assert (shown.leader, shown.epoch, shown.since, shown.this) == ("a", 4, 9.0, True)
    assert rows.leader_answer(state, None, NodeId("a")).epoch == 3


def test_without_a_quorum_the_status_says_so_whatever_else() -> None:
    status = rows.status_answer(
        _state(("a", "server", "online", 0.0)),
        cluster="c1",
        me=NodeId("a"),
        lease=None,
        writable=False,
        alerts=[
            Alert(level="error", code="no_quorum", message="the servers have no majority"),
            *alerts.of_state(ClusterState(), None),
        ],
        is_open=False,
        listen=(),
    )
    assert status.status == "no_quorum"
    assert status.reasons[0] == "the servers have no majority"
    assert any("no leader" in reason for reason in status.reasons)


def test_a_row_has_what_the_node_said_and_what_the_operator_wants() -> None:
    state = _state(("a", "server", "online", 0.0), voters=("a",))
    intent = Intent(node=NodeId("a"), drain=True, labels={"zone": "x"}, at=9.0)
    state = apply(state, keys.intent("a"), encode(intent), 50)
    row = rows.node_row(
        state.nodes[NodeId("a")],
        state,
        me=NodeId("a"),
        leader=None,
        usage=Utilization(cpu=0.12345, memory=1.0, gpu=0.5, requests=2, overload="closing", age_s=0.1),
    )
    assert (row.status, row.since, row.voter, row.this, row.leader) == ("draining", 9.0, True, True, False)
    assert (row.name, row.role, row.labels) == ("name-a", "server", {"zone": "x"})
    assert row.usage == NodeUsage(
        cpu=12.3, memory=100.0, gpu=50.0, requests=2, overload="closing", age_s=0.1
    )  # in percent
    assert row.reason == "an operator drains it"  # not what its member record said before


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "open"),
        ({"used": (TokenUse("n", "k", 5.0),)}, "used"),
        ({"expires_at": 50.0}, "expired"),
        ({"revoked_at": 5.0, "expires_at": 50.0}, "revoked"),
    ],
)
def test_a_tokens_state(changes: dict[str, object], state: str) -> None:
    fields: dict[str, object] = {
        "id": "t",
        "secret_sha256": "s",
        "role": "node",
        "uses": 1,
        "created_at": 0.0,
        "expires_at": 200.0,
        "creator": "k",
    }
    assert rows.token_row(TokenRecord(**(fields | changes)), 100.0).state == state  # type: ignore[arg-type]


# ── seats ───────────────────────────────────────────────────────────────────────────


async def test_a_seat_is_kept_and_is_another_clusters_no_more(tmp_path: Path) -> None:
    seats = SeatFile(tmp_path)
    seats.read("c1")
    await seats.change(open=True, hop_port=7443, members=3)
    again = SeatFile(tmp_path)
    assert again.read("c1").hop_port == 7443
    assert again.read("c2") == again.now
    assert (again.now.open, again.now.members) == (False, 1)


async def test_a_seat_that_is_changed_twice_at_once_has_both(tmp_path: Path) -> None:
    seats = SeatFile(tmp_path)
    seats.read("c1")
    for number in range(1, 40):
        nats = (f"10.0.0.1:{number}",)
        await asyncio.gather(
            seats.change(hop_port=number), seats.change(members=number), seats.change(nats=nats)
        )
        kept = SeatFile(tmp_path).read("c1")
        assert (kept.hop_port, kept.members, kept.nats) == (number, number, nats)


def test_a_socket_that_is_bound_does_not_outlive_its_context() -> None:
    with addresses.bind("127.0.0.1", (0,), chosen=False) as taken:
        assert taken.getsockname()[1]
    assert taken.fileno() == -1, "whose port it is now, anybody may say"
