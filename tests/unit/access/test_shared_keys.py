"""Keys that hold on every node: entered by servers, followed by all, kept, void with their node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.access.keys import KeyRecord, make_admin_key
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.errors import Unauthenticated
from ollama_distributed.base.ids import KeyId, NodeId, NodeRole
from ollama_distributed.base.policies import Policy
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster.book import KeyUses
from ollama_distributed.node.cluster.keys import SharedKeys
from ollama_distributed.state.keys import ACCESS_KEYS as KEYS

CLUSTER = "c1"


class World:
    """Nodes on one engine; `removed` is their common roster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = MemoryEngine()
        self.removed: set[NodeId] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.clients: list[object] = []

    async def node(self, name: str, role: NodeRole, own: tuple[KeyRecord, ...]) -> Node:
        node = Node(self.folder / name, NodeId(name), own)
        client = await self.engine.client(name).__aenter__()
        self.clients.append(client)
        follow = node.keys.follow(
            client, cluster=CLUSTER, role=role, removed=lambda node: node in self.removed
        )
        self.tasks.append(asyncio.create_task(follow))
        return node


class Node:
    def __init__(self, folder: Path, node: NodeId, own: tuple[KeyRecord, ...]) -> None:
        folder.mkdir(exist_ok=True)
        self.authenticator = Authenticator(own, require_key=True, wall=lambda: 0.0)
        self.shared: Mapping[KeyId, KeyRecord] = {}
        self.keys = SharedKeys(folder, node, own, self.use, KeyUses(folder, dict, lambda: 0.0))

    def use(self, keys: Mapping[KeyId, KeyRecord], policies: Mapping[str, Policy]) -> None:
        self.shared = keys
        self.authenticator.share(keys, policies)

    def knows(self, key: str) -> bool:
        try:
            self.authenticator.identify(Caller(key, at_this_machine=False))
        except Unauthenticated:
            return False
        return True


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        while not true():
            await anyio.sleep(0.005)


async def stopped(world: World) -> None:
    await end(world.tasks)
    for client in world.clients:
        await client.__aexit__(None, None, None)  # type: ignore[attr-defined]


async def test_a_servers_key_holds_on_every_node_and_a_mere_nodes_only_at_home(world: World) -> None:
    (key, record), (other, other_record) = make_admin_key(0.0), make_admin_key(0.0)
    server = await world.node("server", "server", (record,))
    member = await world.node("member", "node", (other_record,))
    await until(lambda: member.knows(key))
    assert server.knows(key)
    assert member.knows(other)
    assert not server.knows(other)
    assert list(world.engine.entries) == [KEYS + record.id]
    assert key.encode() not in world.engine.entries[KEYS + record.id].value
    await stopped(world)


async def test_a_key_that_its_server_has_no_more_holds_nowhere(world: World) -> None:
    (old, old_record), (new, new_record) = make_admin_key(0.0), make_admin_key(0.0)
    (other, other_record) = make_admin_key(0.0)
    await world.node("server", "server", (old_record,))
    await world.node("second", "server", (other_record,))
    member = await world.node("member", "node", ())
    await until(lambda: member.knows(old) and member.knows(other))
    await world.node("server", "server", (new_record,))  # again, with another key in its folder
    await until(lambda: member.knows(new) and not member.knows(old))
    assert member.knows(other)
    await stopped(world)


async def test_a_removed_servers_key_holds_nowhere_else(world: World) -> None:
    key, record = make_admin_key(0.0)
    await world.node("gone", "server", (record,))
    member = await world.node("member", "node", ())
    await until(lambda: member.knows(key))
    world.removed.add(NodeId("gone"))
    member.keys.check(lambda node: node in world.removed)
    assert not member.knows(key)
    await stopped(world)


async def test_keys_are_kept_for_a_start_without_coordination_and_for_that_cluster_only(world: World) -> None:
    key, record = make_admin_key(0.0)
    await world.node("server", "server", (record,))
    member = await world.node("member", "node", ())
    kept = world.folder / "member" / "cluster-keys.json"
    await until(lambda: member.knows(key) and kept.exists())
    assert kept.stat().st_mode & 0o777 == 0o600
    await stopped(world)
    again = Node(world.folder / "member", NodeId("member"), ())
    again.keys.restore("c2")
    assert not again.knows(key)
    again.keys.restore(CLUSTER)
    assert again.knows(key)
