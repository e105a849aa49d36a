"""Leader and nodes together, in virtual time, over coordination in memory and a fake mover."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from tests.consensus_nodes import Cluster, Node, cluster, until

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.placement.agent import PlacementAgent
from ollama_distributed.placement.facts import Device, Rules
from ollama_distributed.placement.ports import Inventory
from ollama_distributed.placement.service import PlacementService
from ollama_distributed.placement.tries import AGAIN_S
from ollama_distributed.placement.wishes import Policy
from ollama_distributed.state import keys
from ollama_distributed.state.changes import SetDrain
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import HeldModel, Holdings, LoadedPlace, Member
from ollama_distributed.state.wanting import SetReplicas, Unplace
from ollama_distributed.testing.virtual_time import VirtualLoop

GIB = 1 << 30
MODEL = "registry.ollama.ai/library/m:latest"
HELD = HeldModel(
    name=MODEL, display="m", digest="00", size_bytes=GIB, modified_at=1.0, layers=4, context_tokens=512
)

NEWER = msgspec.structs.replace(HELD, digest="11", modified_at=2.0)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class FakeMover:
    """A node's models, as a list; moving takes `took_s`. `broken`: what fails, and why."""

    def __init__(self, world: World, node: NodeId) -> None:
        self.world = world
        self.node = node
        self.held: set[str] = set()
        self.loaded: dict[str, Device] = {}
        self.kept: set[str] = set()
        self.done: list[tuple[str, str]] = []
        self.broken: dict[str, str] = {}
        self.took_s = 2.0

    async def inventory(self) -> Inventory:
        return Inventory(
            memory_bytes=8 * GIB,
            disk_free_bytes=100 * GIB,
            loaded=tuple(
                LoadedPlace(model=m, device=d, memory_bytes=2 * GIB, held=m in self.kept)
                for m, d in self.loaded.items()
            ),
        )

    async def _work(self, what: str, model: str) -> None:
        await anyio.sleep(self.took_s)
        if what in self.broken:
            raise Unavailable(self.broken[what])
        self.done.append((what, model))

    async def fetch(self, model: str, digest: str, holders: Sequence[NodeId]) -> None:
        assert digest == self.world.current.digest
        assert any(model in self.world.movers[holder].held for holder in holders)
        await self._work("fetch", model)
        self.held.add(model)
        self.world.versions[self.node] = digest
        await self.world.publish(self.node)

    async def load(self, model: str, device: Device) -> None:
        assert model in self.held
        await self._work("load", model)
        self.loaded[model] = device
        self.kept.add(model)

    async def unload(self, model: str) -> None:
        await self._work("unload", model)
        self.loaded.pop(model, None)
        self.kept.discard(model)

    async def delete(self, model: str) -> None:
        assert model not in self.loaded
        assert sum(model in mover.held for mover in self.world.movers.values()) > 1, "the last copy"
        await self._work("delete", model)
        self.held.discard(model)
        await self.world.publish(self.node)


class World:
    def __init__(self, there: Cluster, policy: Policy) -> None:
        self.cluster = there
        self.policy = policy
        self.loads: dict[NodeId, Load] = {}
        self.current = HELD
        self.versions: dict[NodeId, str] = {}
        """Of nodes with another version than the first."""
        self.movers: dict[NodeId, FakeMover] = {}
        self.services: dict[NodeId, PlacementService] = {}

    def interest(self, nodes: Iterable[NodeId]) -> None:
        """As `cluster.load.LoadReports`."""

    def report(self, node: NodeId) -> Load | None:
        return self.loads.get(node)

    async def publish(self, node: NodeId) -> None:
        held = NEWER if self.versions.get(node) == NEWER.digest else HELD
        models = (held,) if MODEL in self.movers[node].held else ()
        await self.cluster.write(keys.holdings(node), encode(Holdings(node=node, models=models)))

    async def say(self, node: str, status: Any) -> None:
        known = self.cluster.nodes.get(node) or next(iter(self.cluster.nodes.values()))
        member = Member(node=NodeId(node), status=status, since=known.clock.time())
        await self.cluster.write(keys.member(node), encode(member))

    async def order(self, change: Any) -> None:
        node = next(iter(self.cluster.nodes.values()))
        await node.consensus.propose_change(change, actor="k")

    def holding(self) -> set[NodeId]:
        return {node for node, mover in self.movers.items() if MODEL in mover.held}

    def running(self) -> set[NodeId]:
        return {node for node, mover in self.movers.items() if MODEL in mover.loaded}

    def quiet(self) -> bool:
        """Nothing is left to do, and every node has heard."""
        state = next(iter(self.cluster.nodes.values())).mirror.state
        return all(known.assigned is None or not known.assigned.tasks for known in state.nodes.values())


@asynccontextmanager
async def world(
    *names: str, seed: int = 1, grace_s: float = 60.0, copies: int = 0, keep_alive_s: float = 300.0
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(cluster(*names, seed=seed))
        made = World(there, Policy(copies=copies, grace_s=grace_s, keep_alive_s=keep_alive_s))
        await there.advertise()
        for node in there.nodes.values():
            made.movers[node.id] = FakeMover(made, node.id)
            await made.say(node.id, "online")
            await stack.enter_async_context(_agent(made, node))
            service = PlacementService(
                node.consensus,
                node.mirror,
                clock=node.clock,
                chance=random.Random(f"{seed} {node.id} placement"),
                policy=lambda: made.policy,
                reports=made,
                rules=Rules(disk_low_bytes=GIB),
            )
            made.services[node.id] = await stack.enter_async_context(service)
        made.movers[NodeId(names[0])].held.add(MODEL)
        await made.publish(NodeId(names[0]))
        await there.leader()
        await there.agree()
        yield made


def _agent(made: World, node: Node) -> PlacementAgent:
    return PlacementAgent(
        node.coordination,
        node.mirror,
        made.movers[node.id],
        node=node.id,
        clock=node.clock,
        chance=random.Random(f"{made.cluster.seed} {node.id} agent"),
    )


async def test_a_model_is_copied_and_loaded_until_as_many_have_it_as_are_wanted() -> None:
    async with world("a", "b", "c") as there:
        await there.order(SetReplicas(model=MODEL, replicas=2, preload=True))
        await until(lambda: len(there.running()) == 2, 60)
        await until(there.quiet, 30)
        assert len(there.holding()) == 2
        assert all(len(mover.done) == len(set(mover.done)) for mover in there.movers.values()), "done twice"
        await there.order(SetReplicas(model=MODEL, replicas=1, keep=False))
        await until(lambda: len(there.running()) == len(there.holding()) == 1, 60)


async def test_what_nobody_orders_stays() -> None:
    async with world("a", "b") as there:
        await anyio.sleep(30)
        assert all(not mover.done for mover in there.movers.values())
        await there.order(SetReplicas(model=MODEL, replicas=2))
        await until(lambda: len(there.holding()) == 2, 60)
        await there.order(Unplace(model=MODEL))
        await until(there.quiet, 30)
        await anyio.sleep(30)
        assert len(there.holding()) == 2


async def test_a_drained_node_is_emptied_while_the_model_runs_on() -> None:
    async with world("a", "b", "c") as there:
        await there.order(SetReplicas(model=MODEL, replicas=1, preload=True))
        await until(lambda: bool(there.running()), 60)
        first = next(iter(there.running()))
        await there.order(SetDrain(node=first, drain=True))

        def moved() -> bool:
            assert there.running(), "it never stops"
            return first not in there.running()

        await until(moved, 60)
        assert there.holding() > {first}


async def test_a_lost_node_is_replaced_after_its_grace_and_not_before() -> None:
    async with world("a", "b", "c", "d", "e", grace_s=60.0) as there:
        await there.order(SetReplicas(model=MODEL, replicas=2))
        await until(lambda: len(there.holding()) == 2, 60)
        gone = next(iter(there.holding() - {NodeId("a")}))
        await there.cluster.kill(there.cluster.nodes[gone])
        await there.cluster.leader(30)
        await there.say(gone, "offline")
        await anyio.sleep(50)
        assert len(there.holding()) == 2
        await until(lambda: len(there.holding() - {gone}) == 2, 60)


async def test_a_new_leader_goes_on_and_what_an_old_one_planned_does_not_count() -> None:
    async with world("a", "b", "c", "d", "e") as there:
        await there.order(SetReplicas(model=MODEL, replicas=4, preload=True))
        await until(lambda: len(there.holding()) >= 2, 60)
        leader = await there.cluster.leader()
        there.cluster.wires.cut(leader.id)
        rest = [node for node in there.cluster.nodes.values() if node is not leader]
        await until(lambda: any(node.consensus.is_leader() for node in rest), 30)
        there.cluster.wires.heal()
        await there.cluster.leader(30)
        await until(lambda: len(there.running()) == 4, 120)
        await until(there.quiet, 60)
        assert len(there.holding()) == 4


async def test_a_failure_is_told_and_tried_again_later() -> None:
    async with world("a", "b") as there:
        there.movers[NodeId("b")].broken["fetch"] = "the disk is full"
        await there.order(SetReplicas(model=MODEL, replicas=2))

        def told() -> bool:
            state = there.cluster.nodes["a"].mirror.state
            placed = state.nodes[NodeId("b")].placed
            return placed is not None and [one.reason for one in placed.failed] == ["the disk is full"]

        await until(told, 30)
        there.movers[NodeId("b")].broken.clear()
        await until(lambda: len(there.holding()) == 2, 3 * AGAIN_S[0])
        await until(lambda: not told(), 10)


# ── what nobody orders ──────────────────────────────────────────────────────────────


async def test_a_model_spreads_and_a_new_version_follows_everywhere() -> None:
    async with world("a", "b", "c", "d", copies=3) as there:
        await until(lambda: len(there.holding()) == 3, 60)
        await until(there.quiet, 30)
        assert all(("fetch", MODEL) in m.done for n, m in there.movers.items() if m.held and n != "a")
        holders = there.holding()
        there.current = NEWER
        there.versions[NodeId("a")] = NEWER.digest
        await there.publish(NodeId("a"))
        await until(lambda: {there.versions[node] for node in holders} == {NEWER.digest}, 60)
        await until(there.quiet, 30)
        assert there.holding() == holders


async def test_without_spreading_a_model_leaves_a_drained_node_and_stays_there_too() -> None:
    async with world("a", "b", "c", copies=1) as there:
        await there.order(SetDrain(node=NodeId("a"), drain=True))
        await until(lambda: len(there.holding()) == 2, 60)
        await until(there.quiet, 30)
        await there.order(SetDrain(node=NodeId("a"), drain=False))
        await anyio.sleep(30)
        assert len(there.holding()) == 2, "and nothing else moves"


def busy(there: World, *nodes: NodeId, queued: int = 0) -> None:
    for node in nodes:
        row = ModelLoad(name=MODEL, slots=4, busy=4, queued=queued, used_at=1.0)
        there.loads[node] = Load(models=(row,), age_s=0.0)


async def test_replicas_follow_the_load_up_and_down_and_go_when_nobody_asks() -> None:
    async with world("a", "b", "c", copies=3, keep_alive_s=120.0) as there:
        a = NodeId("a")
        there.movers[a].loaded[MODEL] = "cpu"  # a request did
        busy(there, a, queued=4)
        await until(lambda: len(there.running()) >= 2, 60)
        busy(there, *there.running(), queued=4)
        await until(lambda: len(there.running()) == 3, 60)
        for node in there.running():
            there.loads[node] = Load(models=(ModelLoad(name=MODEL, slots=4, used_at=1.0),), age_s=0.0)
        await until(lambda: len(there.running()) == 1, 120)
        assert MODEL not in there.movers[a].kept, "what requests loaded is theirs"
        if there.running() != {a}:
            await until(lambda: not there.running(), 200)


async def test_what_fails_again_and_again_is_done_elsewhere() -> None:
    async with world("a", "b", "c") as there:
        for node in ("b", "c"):
            there.movers[NodeId(node)].broken["load"] = "the runner dies"
        there.movers[NodeId("a")].broken["load"] = "the runner dies"
        await there.order(SetReplicas(model=MODEL, replicas=1, preload=True))
        await until(lambda: any(tries(there, n) >= 3 for n in there.movers), 60)
        for node, mover in there.movers.items():
            if tries(there, node) < 3:
                mover.broken.clear()
        await until(lambda: bool(there.running()), 60)
        assert all(tries(there, node) == 0 for node in there.running())


def tries(there: World, node: NodeId) -> int:
    placed = there.cluster.nodes["a"].mirror.state.nodes[node].placed
    return max((one.tries for one in placed.failed), default=0) if placed is not None else 0


async def test_what_requests_displace_again_and_again_is_loaded_elsewhere() -> None:
    async with world("a", "b", "c") as there:
        await there.order(SetReplicas(model=MODEL, replicas=2))
        await until(lambda: len(there.holding()) == 2, 60)
        await there.order(SetReplicas(model=MODEL, replicas=1, preload=True))
        await until(lambda: bool(there.running()), 60)
        (first,) = there.running()

        async def displace() -> None:
            while True:
                await until(lambda: MODEL in there.movers[first].loaded, 60)
                await anyio.sleep(3)
                there.movers[first].loaded.clear()

        async with anyio.create_task_group() as group:
            group.start_soon(displace)
            await until(lambda: bool(there.running() - {first}), 180)
            group.cancel_scope.cancel()
        count = there.movers[first].done.count(("load", MODEL))
        assert count <= 4, "each pause is longer"
