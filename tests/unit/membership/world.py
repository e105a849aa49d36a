"""Nodes with the real services on one engine in memory, over wires that can be cut one way."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import msgspec

from ollama_distributed.adapters.coordination.memory import MemoryCoordination, MemoryEngine
from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.load import Load, LoadReports
from ollama_distributed.cluster.membership.service import Membership
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.network import NetworkManager
from ollama_distributed.cluster.ports import Entry, Resync
from ollama_distributed.state import keys
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import Advert, Member
from ollama_distributed.testing.virtual_time import VirtualClock

DELAY_S = 0.001
SOON_S = 30.0


class Wires:
    """`cut`: pairs of ends whose messages are lost, in that direction only."""

    def __init__(self) -> None:
        self.cut: set[tuple[str, str]] = set()
        self.sent = 0

    def delay_s(self, source: str, target: str) -> float | None:
        self.sent += 1
        return None if (source, target) in self.cut else DELAY_S


class Node(msgspec.Struct):
    id: NodeId
    coordination: MemoryCoordination
    mirror: Mirror
    consensus: ConsensusEngine
    membership: Membership
    loads: LoadReports
    network: NetworkManager
    usage: Utilization
    load: Load
    alerts: list[Alert] = msgspec.field(default_factory=list)


class World:
    def __init__(self) -> None:
        self.wires = Wires()
        self.engine = MemoryEngine(self.wires)
        self.clock = VirtualClock()
        self.nodes: dict[NodeId, Node] = {}
        self.removed: set[NodeId] = set()
        self.story: list[tuple[float, NodeId, str, str]] = []
        """Every record of a member, as it was written."""

    @asynccontextmanager
    async def node(self, name: str, role: NodeRole = "node", boot: str = "one") -> AsyncIterator[Node]:
        node, chance = NodeId(name), random.Random(f"{name}/{boot}")
        async with AsyncExitStack() as stack:
            coordination = await stack.enter_async_context(self.engine.client(name))
            mirror = await stack.enter_async_context(Mirror(coordination, clock=self.clock))
            consensus = await stack.enter_async_context(
                ConsensusEngine(coordination, mirror, node=node, role=role, clock=self.clock, random=chance)
            )
            await self._advertise(coordination, node, role, boot)
            network = NetworkManager(coordination, node=node, clock=self.clock, chance=chance)
            membership = Membership(
                coordination,
                consensus,
                mirror,
                node=node,
                boot=boot,
                role=role,
                clock=self.clock,
                chance=chance,
                usage=lambda: self.nodes[node].usage,
                alerts=lambda: self.nodes[node].alerts,
                loaded=lambda: ("m:1",),
                removed=lambda other: other in self.removed,
            )
            loads = LoadReports(
                coordination,
                node=node,
                clock=self.clock,
                chance=chance,
                own=lambda: self.nodes[node].load,
            )
            self.nodes[node] = one = Node(
                id=node,
                coordination=coordination,
                mirror=mirror,
                consensus=consensus,
                membership=membership,
                loads=loads,
                network=network,
                usage=Utilization(cpu=0.5),
                load=Load(boot=boot, slots=4),
            )
            for service in (network, loads, membership):
                await stack.enter_async_context(service)
            yield one

    async def _advertise(
        self, coordination: MemoryCoordination, node: NodeId, role: NodeRole, boot: str
    ) -> None:
        advert = Advert(node=node, name=node, role=role, version="0", boot=boot, started_at=0.0)
        entry = await coordination.get(keys.advert(node))
        revision = 0 if entry is None else entry.revision
        await coordination.put(keys.advert(node), encode(advert), revision=revision)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside, the story is written down."""

        async def write_down() -> None:
            async with self.engine.client("writer") as coordination, coordination.watch("members.") as events:
                async for event in events:
                    for one in event.entries if isinstance(event, Resync) else (event,):
                        self._note(one.key, one.value if isinstance(one, Entry) else None)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write_down)
            yield
            tasks.cancel_scope.cancel()

    def _note(self, key: str, value: bytes | None) -> None:
        node = NodeId(key.removeprefix("members."))
        if value is None:
            self.story.append((self.clock.monotonic(), node, "none", ""))
        else:
            member = decode(value, Member)
            self.story.append((self.clock.monotonic(), node, member.status, member.reason))

    def of(self, node: str, since: float = 0.0) -> list[tuple[str, str]]:
        return [(status, reason) for at, who, status, reason in self.story if who == node and at >= since]

    def cut(self, source: str, target: str) -> None:
        self.wires.cut.add((source, target))

    def heal(self) -> None:
        self.wires.cut.clear()

    def status(self, node: str, at: Node) -> str | None:
        known = at.mirror.state.nodes.get(NodeId(node))
        return known.member.status if known is not None and known.member is not None else None

    async def until(self, condition: Callable[[], bool], within_s: float = SOON_S) -> float:
        """Wait for it; how long it took."""
        began = self.clock.monotonic()
        with anyio.fail_after(within_s):
            while not condition():
                await anyio.sleep(0.05)
        return self.clock.monotonic() - began

    async def leader(self) -> Node:
        """The one that leads, once there is one."""
        await self.until(lambda: any(n.consensus.is_leader() for n in self.nodes.values()))
        return next(n for n in self.nodes.values() if n.consensus.is_leader())
