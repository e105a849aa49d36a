"""`client.cluster`, `client.nodes` and `client.config` of both clients, against the real gateway."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from tests.cluster_server import ClusterServer, cluster_server

from ollama_distributed import client as sdk
from ollama_distributed.base.cluster import ConfigAsk
from ollama_distributed.client import attempts, cluster
from ollama_distributed.testing.fake_cluster import FakeCluster

pytestmark = pytest.mark.integration

Use = Callable[[Any], Any]


@pytest.fixture
def server() -> Iterator[ClusterServer]:
    with cluster_server() as running:
        yield running


@pytest.fixture(params=[sdk.Client, sdk.SyncClient], ids=["async", "sync"])
def either(
    server: ClusterServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Use], Any]:
    """Runs `use` on a client with the admin's key; awaits for the asyncio one."""
    monkeypatch.setattr(attempts, "BASE_WAIT_S", 0.001)

    def run(use: Use, key: str = server.key) -> Any:
        client = request.param(server.url, key)
        found = use(client)
        if not inspect.iscoroutine(found):
            return found

        async def awaited() -> Any:
            return await found

        return asyncio.run(awaited())

    return run


def test_status_leader_and_nodes(either: Callable[[Use], Any]) -> None:
    status = either(lambda c: c.cluster.status())
    assert (status.status, status.nodes, status.leader.name) == ("ok", {"online": 4}, "alpha")
    assert either(lambda c: c.cluster.leader()).leader == "alpha-id"
    nodes = either(lambda c: c.nodes.list())
    assert [node.name for node in nodes] == ["alpha", "beta", "delta", "gamma"]
    assert nodes[1].usage.cpu == 25.0
    assert either(lambda c: c.nodes.get("beta")) == nodes[1]


def test_changes_of_nodes(server: ClusterServer, either: Callable[[Use], Any]) -> None:
    assert either(lambda c: c.nodes.drain("beta")).status == "draining"
    assert either(lambda c: c.nodes.undrain("beta")).status == "online"
    assert either(lambda c: c.nodes.label("beta", {"zone": "a"})).labels == {"zone": "a"}
    assert either(lambda c: c.nodes.label("beta", {"zone": None})).labels == {}
    with pytest.raises(sdk.Conflict, match="online"):
        either(lambda c: c.nodes.remove("beta"))
    assert either(lambda c: c.nodes.remove("beta", force=True)) is None
    with pytest.raises(sdk.NotFound, match="there is no node 'beta'"):
        either(lambda c: c.nodes.get("beta"))
    assert {key for _, key in server.cluster.by} == {server.key_id}


@pytest.mark.parametrize("name", ["", ".", "..", "beta/drain"])
def test_what_is_no_name_is_not_sent(either: Callable[[Use], Any], name: str) -> None:
    with pytest.raises(sdk.InvalidName):
        either(lambda c: c.nodes.get(name))


def test_names_are_quoted(either: Callable[[Use], Any]) -> None:
    with pytest.raises(sdk.NotFound, match=r"there is no node 'beta\?x=1#y z'"):
        either(lambda c: c.nodes.get("beta?x=1#y z"))


def test_tokens(either: Callable[[Use], Any]) -> None:
    made = either(lambda c: c.cluster.create_token(role="server", uses=2, ttl_s=60.0, hosts=["10.0.0.1"]))
    assert (made.role, made.uses, made.command) == ("server", 2, f"ollama-distributed join {made.token}")
    (row,) = either(lambda c: c.cluster.tokens())
    assert (row.id, row.state) == (made.id, "open")
    either(lambda c: c.cluster.revoke_token(made.id))
    assert either(lambda c: c.cluster.tokens())[0].state == "revoked"


def test_voters_and_leaving(server: ClusterServer, either: Callable[[Use], Any]) -> None:
    server.cluster.set("gamma", status="offline")
    assert "delta-id" in either(lambda c: c.cluster.replace_voter("gamma", "delta")).voters
    with pytest.raises(sdk.Conflict):
        either(lambda c: c.cluster.join("odj_1"))
    either(lambda c: c.cluster.leave(force=True))
    assert server.cluster.left


def test_joining() -> None:
    with cluster_server(FakeCluster("alpha")) as alone, sdk.SyncClient(alone.url, alone.key) as client:
        assert client.cluster.join("odj_1").nodes == {"online": 2}


def test_config(either: Callable[[Use], Any]) -> None:
    assert either(lambda c: c.config.get()).version == 0
    assert either(lambda c: c.config.set({"keep_alive": "9m"}, comment="x")).values == {"keep_alive": "9m"}
    with pytest.raises(sdk.Conflict):
        either(lambda c: c.config.set({}, version=0))
    assert either(lambda c: c.config.set({"keep_alive": None}, version=1)).values == {}
    assert either(lambda c: c.config.rollback(1)).values == {"keep_alive": "9m"}
    assert [one.version for one in either(lambda c: c.config.history())] == [3, 2, 1]


def test_without_quorum(server: ClusterServer, either: Callable[[Use], Any]) -> None:
    server.cluster.quorum = False
    with pytest.raises(sdk.Unavailable, match="no majority") as caught:
        either(lambda c: c.nodes.drain("beta"))
    assert caught.value.retryable


def test_changes_need_the_admins_key(server: ClusterServer) -> None:
    with sdk.SyncClient(server.url, "") as client, pytest.raises(sdk.Forbidden):
        client.nodes.drain("beta")


# ── watching ────────────────────────────────────────────────────────────────────────


def put(server: ClusterServer, **values: Any) -> None:
    server.do(server.cluster.put_config(ConfigAsk(values=values), actor="k"))


async def test_watch_async(server: ClusterServer) -> None:
    seen = []
    async with sdk.Client(server.url) as client:
        watch = client.config.watch()
        assert isinstance(watch, AsyncGenerator)
        async for config in watch:
            seen.append(config.version)
            if config.version == 2:
                break
            await asyncio.to_thread(put, server, n=config.version)
        await watch.aclose()
    assert seen == [0, 1, 2]


def test_watch_sync_ends_with_the_server(server: ClusterServer) -> None:
    with sdk.SyncClient(server.url) as client:
        watch = client.config.watch()
        assert next(watch).version == 0
        put(server, n=1)
        assert next(watch).version == 1
        server.ready = False
        with pytest.raises(sdk.ConnectionLost, match="ended the watch"):
            next(watch)


# ── the twins ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Cluster", "Nodes", "Config", "Routes"])
def test_both_clients_have_the_same_methods(name: str) -> None:
    def methods(kind: type) -> dict[str, tuple[str, str | None]]:
        found = {k: v for k, v in vars(kind).items() if not k.startswith("_")}
        return {k: (str(inspect.signature(v)), v.__doc__) for k, v in found.items()}

    one, two = methods(getattr(cluster, name)), methods(getattr(cluster, f"Sync{name}"))
    assert one == two
    assert all(text for _, text in one.values())
    assert [parameters for parameters, _ in methods(cluster.Nodes).values()][3] == "(self, /, node: 'str')"
