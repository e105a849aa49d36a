"""What the API promises of a cluster: one suite over the fake and over a real node.

Each test leaves the cluster as it found it, so that one node serves them all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from tests.cluster_server import cluster_server
from tests.limits import SOON_S
from tests.nodes import running_node

from ollama_distributed.client import Conflict, Forbidden, Invalid, NodeRow, NotFound, SyncClient
from ollama_distributed.testing.fake_cluster import FakeCluster

pytestmark = pytest.mark.integration
DEADLINE_S = SOON_S


@pytest.fixture(scope="module", params=["fake", "node"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """URL and admin's key of a cluster of one."""
    if request.param == "fake":
        with cluster_server(FakeCluster("alpha")) as server:
            yield server.url, server.key
        return
    folder = tmp_path_factory.mktemp("cluster") / "node"
    options = ("--name", "alpha", "--cluster-listen", "127.0.0.1", "--advertise", "127.0.0.1")
    with running_node(folder, *options, env={"OLLAMA_DISTRIBUTED_MDNS": "false"}) as node:
        with node.admin() as client:
            deadline = time.monotonic() + DEADLINE_S
            while client.cluster.status().nodes != {"online": 1}:
                assert time.monotonic() < deadline, node.log()
                time.sleep(0.05)
        yield node.url, json.loads((folder / "admin.json").read_text())["key"]


@pytest.fixture
def client(place: tuple[str, str]) -> Iterator[SyncClient]:
    with SyncClient(*place) as client:
        yield client


@pytest.fixture
def me(client: SyncClient) -> NodeRow:
    (row,) = client.nodes.list()
    return row


def test_a_node_alone_is_a_cluster(client: SyncClient, me: NodeRow) -> None:
    status = client.cluster.status()
    assert (status.node, status.status, sum(status.nodes.values())) == (me.id, "ok", 1)
    assert status.voters == (me.id,)
    assert (me.name, me.role, me.voter, me.leader, me.this) == ("alpha", "server", True, True, True)
    leader = client.cluster.leader()
    assert (leader.leader, leader.name, leader.this) == (me.id, "alpha", True)
    assert leader.epoch > 0


def test_a_node_by_id_and_by_name(client: SyncClient, me: NodeRow) -> None:
    for name in (me.id, me.name):
        assert client.nodes.get(name).id == me.id
    with pytest.raises(NotFound, match=r"there is no node 'alpah'; did you mean alpha\?"):
        client.nodes.get("alpah")
    for change in (client.nodes.drain, client.nodes.undrain, client.nodes.remove):
        with pytest.raises(NotFound, match="did you mean"):
            change("alpah")


def test_drain_is_an_intent_that_both_ways_can_be_said_twice(client: SyncClient) -> None:
    for _ in range(2):
        assert client.nodes.drain("alpha").status == "draining"
    assert client.cluster.status().nodes == {"draining": 1}
    for _ in range(2):
        assert client.nodes.undrain("alpha").status == "online"


def test_labels(client: SyncClient) -> None:
    assert client.nodes.label("alpha", {"zone": "a", "rack": "7"}).labels == {"zone": "a", "rack": "7"}
    assert client.nodes.label("alpha", {"rack": None}).labels == {"zone": "a"}
    assert client.nodes.get("alpha").labels == {"zone": "a"}
    assert client.nodes.label("alpha", {"zone": None}).labels == {}


def test_a_node_that_is_online_is_not_removed(client: SyncClient) -> None:
    with pytest.raises(Conflict):
        client.nodes.remove("alpha")


def test_a_living_voter_is_not_replaced(client: SyncClient) -> None:
    with pytest.raises(Conflict):
        client.cluster.replace_voter("alpha")


def test_who_is_alone_has_nothing_to_leave(client: SyncClient) -> None:
    with pytest.raises(Conflict, match="alone"):
        client.cluster.leave()


def test_tokens(client: SyncClient) -> None:
    made = client.cluster.create_token()
    assert made.role == "server", "until there are three"
    assert made.token.startswith("odj_")
    assert made.command == f"ollama-distributed join {made.token}"
    assert client.cluster.status().open
    plain = client.cluster.create_token(role="node", uses=3, ttl_s=60.0)
    rows = {row.id: row for row in client.cluster.tokens()}
    assert (rows[plain.id].role, rows[plain.id].uses, rows[plain.id].used) == ("node", 3, 0)
    assert rows[plain.id].expires_at - rows[plain.id].created_at == pytest.approx(60.0, abs=1.0)
    assert rows[plain.id].creator, "whose key made it"
    for token_id in (made.id, plain.id):
        client.cluster.revoke_token(token_id)
    assert {row.state for row in client.cluster.tokens()} == {"revoked"}
    with pytest.raises(NotFound):
        client.cluster.revoke_token("nothing1")
    with pytest.raises(Invalid):
        client.cluster.create_token(uses=0)


def test_what_is_no_token(client: SyncClient) -> None:
    with pytest.raises(Invalid):
        client.cluster.join("hello")


def test_config(client: SyncClient) -> None:
    start = client.config.get()
    first = client.config.set({"keep_alive": "9m", "max_queue": 100}, comment="why")
    assert (first.version, first.comment) == (start.version + 1, "why")
    assert first.values == {**start.values, "keep_alive": "9m", "max_queue": 100}
    with pytest.raises(Conflict):
        client.config.set({"max_queue": 5}, version=start.version)
    second = client.config.set({"max_queue": None}, version=first.version)
    assert "max_queue" not in second.values
    assert [one.version for one in client.config.history()][:2] == [second.version, first.version]
    back = client.config.rollback(first.version)
    assert (back.version, back.values) == (second.version + 1, first.values)
    assert client.config.get() == back
    with pytest.raises(NotFound):
        client.config.rollback(10_000)
    client.config.set(dict.fromkeys(("keep_alive", "max_queue")))


def test_config_is_watched(client: SyncClient) -> None:
    watch = client.config.watch()
    known = next(watch)
    assert known == client.config.get()
    changed = client.config.set({"keep_alive": "8m"})
    assert next(watch) == changed
    watch.close()
    client.config.set({"keep_alive": None})


def test_a_key_is_needed_for_changes(place: tuple[str, str]) -> None:
    with SyncClient(place[0], "") as nobody:
        assert nobody.nodes.list()
        for change in (
            lambda: nobody.nodes.drain("alpha"),
            lambda: nobody.config.set({}),
            lambda: nobody.cluster.create_token(),
            lambda: nobody.cluster.leave(),
        ):
            with pytest.raises(Forbidden):
                change()
