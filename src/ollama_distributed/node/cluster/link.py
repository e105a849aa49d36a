"""A node's connection to its cluster's coordination, and the services that live on it.

Brought up in order, taken down in the opposite one. Nothing here is needed for inference: the
state that was learned stays with the node (`life.py`) when the link is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import msgspec

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.session import Address
from ollama_distributed.adapters.identity.nats_access import NodeLogin
from ollama_distributed.base.alerts import Alert
from ollama_distributed.cluster.config import ConfigManager
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.load import LoadReports
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.cluster.membership.service import Membership
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.network import NetworkManager
from ollama_distributed.node.cluster.identity import Identity
from ollama_distributed.node.cluster.live import check_config
from ollama_distributed.node.cluster.parts import Parts
from ollama_distributed.node.cluster.publish import Publisher
from ollama_distributed.node.cluster.roster import Roster
from ollama_distributed.node.placing import RULES
from ollama_distributed.placement.agent import PlacementAgent
from ollama_distributed.placement.service import PlacementService
from ollama_distributed.state.records import Advert, Holdings

BUCKET = "cfg"


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What is there while the link is."""

    coordination: NatsCoordination
    mirror: Mirror
    consensus: ConsensusEngine
    membership: Membership
    loads: LoadReports
    network: NetworkManager
    config: ConfigManager
    publisher: Publisher
    placement: PlacementService | None
    """On servers."""


@asynccontextmanager
async def linked(
    parts: Parts,
    identity: Identity,
    roster: Roster,
    *,
    urls: Sequence[str],
    boot: str,
    create: bool,
    advert: Callable[[], Advert],
    holdings: Callable[[], Holdings],
    alerts: Callable[[], Sequence[Alert]],
    allowed: Callable[[], bool],
) -> AsyncIterator[Link]:
    """Connect to the servers at `urls` (`tls://host:port`), in the background. `boot`: random, of
    this link. `create`: this node runs the only server and makes the state where there is none.

    Raises:
        Unavailable: the state cannot be made.
    """
    node, role, clock, chance = parts.node, identity.role, parts.clock, parts.chance
    login = NodeLogin(identity.tls, identity.keys.nats, identity.jwt, cluster=identity.cluster)
    async with AsyncExitStack() as stack:
        coordination = await stack.enter_async_context(
            NatsCoordination(Address(urls=tuple(urls), login=login), name=node, bucket=BUCKET, create=create)
        )
        mirror = await stack.enter_async_context(Mirror(coordination, clock=clock))
        consensus = await stack.enter_async_context(
            ConsensusEngine(coordination, mirror, node=node, role=role, clock=clock, random=chance)
        )
        in_background(stack, "roster", partial(roster.follow, coordination), chance)
        follow_keys = partial(
            parts.keys.follow, coordination, cluster=identity.cluster, role=role, removed=roster.removed
        )
        in_background(stack, "keys", follow_keys, chance)
        follow_people = partial(
            parts.people.follow, coordination, cluster=identity.cluster, removed=roster.removed
        )
        in_background(stack, "people", follow_people, chance)
        network = await stack.enter_async_context(
            NetworkManager(coordination, node=node, clock=clock, chance=chance)
        )
        stack.callback(network.subscribe("key-uses", parts.keys.uses.hear))
        in_background(stack, "key uses", partial(parts.keys.uses.step, network), chance)
        loads = await stack.enter_async_context(
            LoadReports(coordination, node=node, clock=clock, chance=chance, own=parts.load)
        )
        membership = await stack.enter_async_context(
            Membership(
                coordination,
                consensus,
                mirror,
                node=node,
                boot=boot,
                role=role,
                clock=clock,
                chance=chance,
                usage=parts.usage,
                alerts=alerts,
                loaded=lambda: [model.name for model in parts.loaded()],
                removed=roster.removed,
            )
        )
        publisher = Publisher(
            coordination,
            mirror,
            node=node,
            advert=advert,
            holdings=holdings,
            allowed=allowed,
        )
        stack.callback(mirror.on_change(publisher.look))
        stack.callback(mirror.on_change(lambda *_: parts.state_changed()))
        in_background(stack, "publish", publisher.step, chance)
        if parts.placing.mover is not None:
            await stack.enter_async_context(
                PlacementAgent(
                    coordination,
                    mirror,
                    parts.placing.mover,
                    node=node,
                    clock=clock,
                    chance=chance,
                    counts=parts.placing.counts,
                )
            )
        placement = None
        if role == "server":
            placement = await stack.enter_async_context(
                PlacementService(
                    consensus,
                    mirror,
                    clock=clock,
                    chance=chance,
                    policy=lambda: parts.placing.policy,
                    reports=loads,
                    rules=RULES,
                    offload=anyio.to_thread.run_sync,
                )
            )
        yield Link(
            coordination=coordination,
            mirror=mirror,
            consensus=consensus,
            membership=membership,
            loads=loads,
            network=network,
            config=ConfigManager(consensus, mirror, validate=check_config),
            publisher=publisher,
            placement=placement,
        )
