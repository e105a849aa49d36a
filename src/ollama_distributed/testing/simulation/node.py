"""A simulated node: the real cluster services on a connection that may fail, life after life."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack

import anyio
import msgspec

from ollama_distributed.adapters.coordination.memory import MemoryCoordination
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.config import ConfigManager
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.membership.service import Membership
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.network import Message, MessageType, NetworkManager
from ollama_distributed.cluster.tasks import end
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert
from ollama_distributed.testing.simulation.engine import WatchedEngine
from ollama_distributed.testing.simulation.link import FaultyLink
from ollama_distributed.testing.simulation.rules import Rules
from ollama_distributed.testing.simulation.trace import Trace
from ollama_distributed.testing.virtual_time import EPOCH, VirtualClock

ANNOUNCE_AGAIN_S = 0.5
NEWS: MessageType = "model-sync"
"""The type of the messages that operators have nodes send; any would do."""


class Surroundings(msgspec.Struct, frozen=True):
    """What all nodes of a simulation share."""

    seed: int
    engine: WatchedEngine
    link: FaultyLink
    rules: Rules
    trace: Trace
    removed: Callable[[NodeId], bool]
    """Whether a node was removed from the cluster; in the product the roster says."""


class Life(msgspec.Struct, frozen=True):
    """The services of one life, from start to stop or crash."""

    endpoint: str
    mirror: Mirror
    consensus: ConsensusEngine
    membership: Membership
    config: ConfigManager
    network: NetworkManager


class SimulatedNode:
    def __init__(
        self,
        around: Surroundings,
        node: NodeId,
        *,
        role: NodeRole,
        clock: VirtualClock,
        watched: bool = False,
    ) -> None:
        self.id = node
        self.role: NodeRole = role
        self.clock = clock
        self.lives = 0
        self.gone = False
        """It left for good."""
        self.life: Life | None = None
        """None: it is down, or on its way up or down."""
        self._around = around
        self._watched = watched
        self._stop = anyio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def leads(self) -> bool:
        return self.life is not None and self.life.consensus.is_leader()

    @property
    def boot(self) -> str:
        return f"{self.id}-{self.lives}"

    def advert(self, life: int) -> Advert:
        boot = f"{self.id}-{life}"
        return Advert(node=self.id, name=self.id, role=self.role, version="0", boot=boot, started_at=EPOCH)

    async def start(self) -> None:
        """Begin another life, once the last one is over. Idempotent."""
        if self._ending is not None:
            await asyncio.wait([self._ending])
            self._ending = None
        if self._task is None and not self.gone:
            self.lives += 1
            self._stop = anyio.Event()
            self._around.trace.note("node.start", node=self.id, life=self.lives)
            self._task = asyncio.create_task(self._live(), name=self.boot)
            self._task.add_done_callback(self._ended)

    def crash(self) -> None:
        """All at once: what it said last is under way, nothing else ever gets out."""
        if self._task is not None:
            self._around.trace.note("node.crash", node=self.id, leads=self.leads)
            self._around.rules.counts["crash_of_leader" if self.leads else "crash"] += 1
            self._around.link.bury(f"{self.id}#{self.lives}")
            self.life = None
            self._ending, self._task = asyncio.create_task(end([self._task])), None

    def stop(self) -> None:
        """In good order; it takes a moment, which `start` waits for."""
        if self._task is not None:
            self._around.trace.note("node.stop", node=self.id, leads=self.leads)
            self.life = None
            self._stop.set()
            self._ending, self._task = asyncio.create_task(_over(self._task)), None

    async def ended(self) -> None:
        """Wait until the last life is over."""
        if self._ending is not None:
            await asyncio.wait([self._ending])

    # ── a life ──────────────────────────────────────────────────────────────────────

    async def _live(self) -> None:
        around, clock = self._around, self.clock
        endpoint = f"{self.id}#{self.lives}"
        chance = random.Random(f"{around.seed}/{endpoint}")  # noqa: S311  # repeatable by intent
        stop = self._stop
        async with AsyncExitStack() as stack:
            coordination = await stack.enter_async_context(around.engine.client(endpoint))
            mirror = Mirror(coordination, clock=clock)
            mirror.on_change(self._mirrored)
            await stack.enter_async_context(mirror)
            consensus = ConsensusEngine(
                coordination, mirror, node=self.id, role=self.role, clock=clock, random=chance
            )
            await stack.enter_async_context(consensus)
            consensus.on_leadership(self._leading)
            membership = Membership(
                coordination,
                consensus,
                mirror,
                node=self.id,
                boot=self.boot,
                role=self.role,
                clock=clock,
                chance=chance,
                removed=around.removed,
            )
            await stack.enter_async_context(membership)
            config = ConfigManager(consensus, mirror, validate=lambda _: None)
            network = NetworkManager(coordination, node=self.id, clock=clock, chance=chance)
            network.subscribe(NEWS, self._heard)
            await stack.enter_async_context(network)
            if self._task is asyncio.current_task():  # else it was stopped or crashed meanwhile
                self.life = Life(endpoint, mirror, consensus, membership, config, network)
            async with anyio.create_task_group() as group:
                group.start_soon(self._announce, coordination, mirror)
                if self._watched:
                    group.start_soon(self._watch, coordination)
                await stop.wait()
                group.cancel_scope.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._around.rules.break_(f"{self.id} ended with {error!r}")

    async def _announce(self, coordination: MemoryCoordination, mirror: Mirror) -> None:
        """Keep the advert in the state, as `node/` does."""
        key, value = keys.advert(self.id), encode(self.advert(self.lives))
        state = await mirror.wait_ready()
        while (stored := state.raw.get(key)) is None or stored[0] != value:
            try:
                await coordination.put(key, value, revision=state.revision_of(key))
                return
            except OllamaDistributedError:
                await anyio.sleep(ANNOUNCE_AGAIN_S)
                state = mirror.state

    async def _watch(self, coordination: MemoryCoordination) -> None:
        last = 0
        async with coordination.watch() as events:
            async for event in events:
                last = self._around.rules.watched(self.id, last, event)

    def _mirrored(self, before: ClusterState, after: ClusterState) -> None:
        self._around.rules.mirrored(self.id, before, after, self._around.engine)

    async def _heard(self, message: Message) -> None:
        self._around.rules.heard(self.id, message.sender, message.body)

    def _leading(self, leads: bool) -> None:
        self._around.trace.note("leads" if leads else "steps_down", node=self.id)
        if leads:
            self._around.rules.began_to_lead(self.id)


async def _over(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
