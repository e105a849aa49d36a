"""Puts a node into its cluster: the way to the others, and what the gateway shows of all."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import msgspec

from ollama_distributed.adapters.hardware import Sampler, describe
from ollama_distributed.adapters.hardware.owner import OwnerProbe
from ollama_distributed.adapters.identity.tls import peer_of
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.names import NameExchange, open_names
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, RerankRequest
from ollama_distributed.catalog.cluster import ClusterCatalog
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.catalog.versions import Cleaner, history_in
from ollama_distributed.cluster.identity.ports import Audit
from ollama_distributed.cluster.load import Load
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.errors import status_of
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.node.alerts import OwnAlerts
from ollama_distributed.node.cluster.keeper import Keeper
from ollama_distributed.node.cluster.keys import SharedKeys
from ollama_distributed.node.cluster.live import LiveConfig
from ollama_distributed.node.cluster.parts import Parts
from ollama_distributed.node.cluster.service import ClusterService
from ollama_distributed.node.cluster.speaking import Speaking
from ollama_distributed.node.cluster.view import View
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.placing import RULES, Placing
from ollama_distributed.node.polite.service import Politeness
from ollama_distributed.node.polite.settings import policy_of
from ollama_distributed.node.settings import Settings
from ollama_distributed.placement.desk import Desk
from ollama_distributed.placement.ports import Outside
from ollama_distributed.routing.service import Router
from ollama_distributed.serving.cluster import ClusterResidents, load_of
from ollama_distributed.serving.machine import LocalMachine
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.serving.service import Serving
from ollama_distributed.state.changes import Change
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Hardware

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life
    from ollama_distributed.node.cluster.link import Link

SEEN_S = 1.0
"""How long who changed something on another node waits to see it here."""


def of_policy(request: InferenceRequest | EmbedRequest | RerankRequest) -> Mapping[str, str]:
    """Labels that a node must have to see a request: its caller's policy says so."""
    return request.identity.node_labels


class InCluster(msgspec.Struct, frozen=True):
    """A node's own parts, widened to the cluster."""

    source: Router
    catalog: ClusterCatalog
    residents: ClusterResidents
    service: ClusterService
    desk: Desk
    keeper: Keeper
    """To be entered when all else is there: from then on the node takes part."""
    polite: Politeness
    alerts: OwnAlerts
    view: View


class _CurrentTLS:
    """The client side of whichever identity the node has now."""

    def __init__(self, keeper: Callable[[], Keeper]) -> None:
        self._keeper = keeper

    def client(self) -> ssl.SSLContext:
        return self._keeper().need_life().identity.tls.client()

    def check(self, connection: ssl.SSLObject, node: NodeId) -> None:
        """
        Raises:
            Forbidden: another node is there, or one that was removed.
        """
        self._keeper().need_life().roster.check(peer_of(connection, expected=node))


class _Consensus:
    """Whichever this node is linked to now."""

    def __init__(self, node: NodeId, linked: Callable[[], Awaitable[tuple[Life, Link]]]) -> None:
        self._node = node
        self._linked = linked

    async def propose(self, change: Change) -> None:
        _, link = await self._linked()
        await link.consensus.propose_change(change, actor=self._node)

    async def seen(self, predicate: Callable[[ClusterState], bool]) -> None:
        with contextlib.suppress(Unavailable), anyio.move_on_after(SEEN_S):  # it is seen later, then
            _, link = await self._linked()
            await link.mirror.wait_for(predicate)


class _Machine:
    """What this machine is; the GPU driver may take a second to tell, and nothing waits for it."""

    def __init__(self) -> None:
        self.known = Hardware()

    async def look(self, told: Callable[[], None]) -> None:
        self.known = await asyncio.to_thread(describe)
        told()


@asynccontextmanager
async def in_cluster(
    settings: Settings,
    node: NodeId,
    *,
    clock: Clock,
    catalog: Catalog,
    serving: Serving,
    engines: Sequence[EngineInfo],
    api: Sequence[str],
    apply: Callable[[Settings], None],
    keys: SharedKeys,
    people: SharedPeople,
    placing: Placing,
    audit: Audit,
    missed: Callable[[], None],
    told: Callable[[Identity], Identity],
    overload: Overload,
    outside: Outside | None = None,
) -> AsyncIterator[InCluster]:
    """What the node is in its cluster. Nothing of it waits for the cluster. `missed`: hears of each
    request for a model that is not on this node's disk. `told`: whom a request of another node is for,
    as this one knows it. `overload`: of its own memory. `outside`: models that no node has."""
    chance, boot, machine, memory = random.Random(), random_id(12), _Machine(), LocalMachine()  # noqa: S311  # jitter
    async with AsyncExitStack() as stack:
        sampler = await stack.enter_async_context(Sampler(clock=clock, chance=chance))

        def usage() -> Utilization:
            busy = sum(model.slots_busy for model in serving.loaded())
            return msgspec.structs.replace(
                sampler.usage(), requests=busy, queued=serving.waiting, overload=overload.told
            )

        alerts = OwnAlerts(settings.name, overload, serving.quarantined, clock)

        def load() -> Load:
            return load_of(
                serving.loaded(),
                boot=boot,
                queued=serving.waiting,
                memory_free_bytes=memory.memory_available_bytes(),
                draining=view.draining(),
            )

        def state() -> ClusterState:
            return keeper.state

        view = View(node, state, lambda: keeper.loads, lambda: polite.rest)
        tls = _CurrentTLS(lambda: keeper)
        speaking = Speaking(node, lambda: keeper, told, clock)
        pool = await stack.enter_async_context(PeerPool(view.addresses, tls, tls.check, speaking.say))
        door = PeerDoor(
            node,
            serving,
            catalog,
            serving.unload,
            draining=lambda: view.draining() or overload.refusing,
            status_of=status_of,
            believe=speaking.believe,
        )
        stack.push_async_callback(door.close)
        keeper = Keeper(
            Parts(
                settings=settings,
                node=node,
                started_at=clock.time(),
                clock=clock,
                chance=chance,
                api=tuple(api),
                engines=engines,
                hardware=lambda: machine.known,
                models=catalog.list,
                loaded=serving.loaded,
                usage=usage,
                alerts=alerts.now,
                load=load,
                rest=lambda: polite.rest,
                pool=pool,
                door=door,
                keys=keys,
                people=people,
                placing=placing,
                audit=audit,
                clean=Cleaner(catalog, serving.unload).clean,
                state_changed=lambda: router.chooser.directory.follow(),
                apply_config=LiveConfig(settings, apply),
            )
        )
        polite = Politeness(policy_of(settings), OwnerProbe(clock), clock, keeper.changed)
        in_background(stack, "the machine's owner", polite.run, chance)
        catalog.follow(lambda key: history_in(keeper.state, key))
        service = ClusterService(keeper)
        stack.push_async_callback(service.close)
        looking = asyncio.create_task(machine.look(keeper.changed), name="hardware")
        stack.push_async_callback(end, [looking])

        async def propose(change: Change, *, actor: str) -> int:
            _, link = await keeper.linked()
            return await link.consensus.propose_change(change, actor=actor)

        open_names(door, catalog)
        everywhere = ClusterCatalog(catalog, NameExchange(pool), node, state, _Consensus(node, keeper.linked))
        policy = settings.routing_policy
        router = Router(
            serving, catalog, pool, view, chance.randrange, missed, clock, policy=policy, wanted=of_policy
        )
        in_background(stack, "probes of replicas", router.probe, chance)
        yield InCluster(
            source=router,
            catalog=everywhere,
            residents=ClusterResidents(serving, view, node, state),
            service=service,
            desk=Desk(
                catalogue=everywhere,
                state=state,
                reports=view,
                propose=propose,
                clock=clock,
                policy=lambda: placing.policy,
                rules=RULES,
                outside=outside,
                figures=lambda: placing.figures(keeper.plan),
            ),
            keeper=keeper,
            polite=polite,
            alerts=alerts,
            view=view,
        )
