"""Membership, load reports and messages on the real engine, with a node's own narrow rights."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest
from tests.limits import SOON_S, limit_s
from tests.trust import Trust
from tests.voters import written

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.load import Load, LoadReports
from ollama_distributed.cluster.membership.service import Membership
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.network import Message, NetworkManager
from ollama_distributed.state import keys
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

CLOCK = SystemClock()


class Node(msgspec.Struct):
    mirror: Mirror
    membership: Membership
    loads: LoadReports
    network: NetworkManager

    def status(self, node: str) -> str | None:
        known = self.mirror.state.nodes.get(NodeId(node))
        return known.member.status if known is not None and known.member is not None else None


@asynccontextmanager
async def _node(trust: Trust, server: NatsServer, name: str, role: NodeRole) -> AsyncIterator[Node]:
    node, chance = NodeId(name), random.Random(name)
    address = trust.address(server, node=name, role=role)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(
            NatsCoordination(address, name=name, bucket="cfg", create=role == "server")
        )
        mirror = await stack.enter_async_context(Mirror(bus, clock=CLOCK))
        consensus = ConsensusEngine(bus, mirror, node=node, role=role, clock=CLOCK, random=chance)
        await stack.enter_async_context(consensus)
        advert = Advert(node=node, name=name, role=role, version="0", boot="one", started_at=0.0)
        await written(bus, keys.advert(node), encode(advert))
        network = NetworkManager(bus, node=node, clock=CLOCK, chance=chance)
        loads = LoadReports(bus, node=node, clock=CLOCK, chance=chance, own=lambda: Load(slots=4))
        membership = Membership(
            bus,
            consensus,
            mirror,
            node=node,
            boot="one",
            role=role,
            clock=CLOCK,
            chance=chance,
            usage=lambda: Utilization(cpu=0.5),
        )
        for service in (network, loads, membership):
            await stack.enter_async_context(service)
        yield Node(mirror, membership, loads, network)


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        while not condition():
            await anyio.sleep(0.02)


async def test_a_server_and_a_node_hear_each_other(tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    async with trust.server("s1") as server, _node(trust, server, "s1", "server") as one:
        async with _node(trust, server, "n1", "node") as two:
            await _until(lambda: all(x.status(n) == "online" for x in (one, two) for n in ("s1", "n1")))

            usages = await two.membership.usages()
            assert {node: usage.cpu for node, usage in usages.items()} == {"s1": 0.5, "n1": 0.5}

            for asker, other in ((one, NodeId("n1")), (two, NodeId("s1"))):
                asker.loads.interest([other])
                await _until(lambda a=asker, o=other: a.loads.report(o) is not None)  # type: ignore[misc]

            heard: list[Message] = []

            async def note(message: Message) -> None:
                heard.append(message)

            one.network.subscribe("model-sync", note)
            await two.network.broadcast("model-sync", b"all")
            await _until(lambda: len(heard) == 1)
            await two.network.send_to(NodeId("s1"), "model-sync", b"one")
            assert [(m.sender, m.body, m.direct) for m in heard] == [
                ("n1", b"all", False),
                ("n1", b"one", True),
            ]
            assert (await one.network.connect(NodeId("n1"), "127.0.0.1:7443")).rtt_s < limit_s(1.0)
        await _until(lambda: one.status("n1") == "offline")
        known = one.mirror.state.nodes[NodeId("n1")].member
        assert known is not None
        assert known.reason == "stopped"
