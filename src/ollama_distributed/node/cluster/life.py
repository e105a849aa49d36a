"""One membership in one cluster: everything between two changes of identity.

The door and the roster come with the identity and stay; the link to coordination is brought
up in the background and brought up again when it cannot be, so that neither the start nor
inference waits for it. What was learned of the state stays when the link is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import anyio
import structlog

from ollama_distributed.adapters.identity.handshake_server import ClusterListener
from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    Invalid,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.cluster.identity.admission import Admission
from ollama_distributed.cluster.identity.tokens import Address, parse_address
from ollama_distributed.cluster.identity.wire import ClusterFacts, ClusterKeys
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.errors import status_of
from ollama_distributed.node.cluster import about, alerts, memory
from ollama_distributed.node.cluster import identity as identities
from ollama_distributed.node.cluster.bus import Bus, server_folder
from ollama_distributed.node.cluster.compared import Compared
from ollama_distributed.node.cluster.front import Front
from ollama_distributed.node.cluster.identity import Identity
from ollama_distributed.node.cluster.link import BUCKET, Link, linked
from ollama_distributed.node.cluster.parts import Parts
from ollama_distributed.node.cluster.records import LateRecords
from ollama_distributed.node.cluster.roster import Roster
from ollama_distributed.node.cluster.seat import Seat, SeatFile
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Advert, Config, Holdings

log = structlog.get_logger("cluster.life")

COORDINATION_DOWN = "cluster.coordination_down"
COORDINATION_UP = "cluster.coordination_up"
REMOVED = "cluster.this_node_was_removed"

RETRY_S = (1.0, 30.0)
STOP_S = 15.0
"""To take the link down in order; nats-server alone may take 10 s to close its files."""
CUT_OFF_S, ASK_AGAIN_S = 10.0, 30.0
"""A node that no coordination server lets in asks a server whether it was removed."""


Duty = Callable[[], Awaitable[None]]
"""A step that is repeated while the link is there."""


class Life:
    """`async with`. `on_over` is called when this node was removed from the cluster."""

    def __init__(
        self,
        parts: Parts,
        identity: Identity,
        seats: SeatFile,
        *,
        on_over: Callable[[], None],
        duties: Callable[[Life, Link], list[tuple[str, Duty]]],
    ) -> None:
        self.parts = parts
        self.identity = identity
        self.seats = seats
        self.link: Link | None = None
        self.bus: Bus | None = None
        """On servers, while it is up."""
        self.up = anyio.Event()
        """Set when the link is there for the first time."""
        self.leaving = False
        self._boot = ""
        """Of the present link: heartbeats are counted from it."""
        self._on_over = on_over
        self._duties = duties
        self.trouble = ""
        """Why coordination is not up."""
        self.compared = Compared()
        self._state, known = memory.recall(parts.data_dir, identity.cluster)
        self._stopping = anyio.Event()
        self._linking: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._opening = anyio.Lock()
        self.records = LateRecords(lambda: self.link.coordination if self.link else None)
        self.roster = Roster(
            identity.cluster, wall=parts.clock.time, on_removed=self._on_removed, on_change=self._on_roster
        )
        self.roster.start_from(known)
        self.roster_changed = anyio.Event()
        self.admission = Admission(
            self.records, keys=self.keys, facts=self.facts, audit=parts.audit, wall=parts.clock.time
        )
        app = ClusterListener(parts.door, self.admission, check_peer=self.roster.check, status_of=status_of)
        self.front = Front(parts, identity, seats, app)

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> ClusterState:
        """The last that was learned, perhaps before this start."""
        if self.link is not None and self.link.mirror.ready:
            self._state = self.link.mirror.state
        return self._state

    @property
    def seat(self) -> Seat:
        return self.seats.now

    def keys(self) -> ClusterKeys:
        """
        Raises:
            Forbidden: this node is no server.
        """
        if self.identity.cluster_keys is None:
            raise Forbidden("this node is no server of the cluster; ask one of them")
        return self.identity.cluster_keys

    def facts(self) -> ClusterFacts:
        """Where the cluster is found: this node first where it admits, then the others that live."""
        servers = [*(self.front.hop() if self.identity.cluster_keys is not None else ())]
        known = [self.state.nodes[node] for node in self.state.servers]
        for node in sorted(known, key=lambda node: (not node.alive, node.id)):
            if node.advert is not None and node.id != self.parts.node:
                servers += node.advert.hop
        servers = servers or list(self.seat.servers)
        given = self.identity.credentials.facts
        return ClusterFacts(
            cluster=self.identity.cluster,
            servers=_addresses(servers) or given.servers,
            nats=tuple(f"tls://{where}" for where in self.bus_addresses()) or given.nats,
        )

    def bus_addresses(self) -> tuple[str, ...]:
        """`host:port` of the coordination servers that there are, as far as this node knows."""
        voters = self.state.voters.nodes if self.state.voters else ()
        known = (self.state.nodes.get(node) for node in voters)
        told = [where for node in known if node and node.advert for where in node.advert.nats]
        return tuple(told) or self.seat.nats

    def advert(self) -> Advert:
        parts, bus = self.parts, self.bus if self.seat.open else None
        return about.advert(
            node=parts.node,
            name=parts.settings.name,
            role=self.identity.role,
            boot=self._boot,
            started_at=parts.started_at,
            hop=self.front.hop(),
            nats=self.front.at(bus.port) if bus is not None else (),
            routes=self.front.at(bus.routes_port) if bus is not None else (),
            api=parts.api,
            hardware=parts.hardware(),
            engines=parts.engines,
            labels=parts.settings.labels,
            rest=parts.rest(),
        )

    def holdings(self) -> Holdings:
        return about.holdings(self.parts.node, self.parts.models())

    @property
    def is_server(self) -> bool:
        return self.identity.cluster_keys is not None

    def need_server(self) -> None:
        """
        Raises:
            Conflict: this node is none; the message names some.
        """
        if not self.is_server:
            servers = ", ".join(self.state.nodes[node].name for node in self.state.servers[:3])
            raise Conflict(
                f"this node is no server of the cluster; do it on one of them: {servers or 'unknown'}"
            )

    def own_alerts(self) -> list[Alert]:
        """What does not work here, for others to know."""
        shared = [*alerts.of_front(self.front.trouble), *alerts.of_damage(self.damaged, self.state)]
        return [*shared, *self.parts.alerts()]

    @property
    def damaged(self) -> tuple[NodeId, ...]:
        """Voters whose server lost records, as far as this one could compare."""
        return self.compared.lost(self.bus.formation if self.bus is not None else None)

    def need_link(self) -> Link:
        """
        Raises:
            Unavailable: coordination is not up; the message says why.
        """
        if self.link is None:
            raise Unavailable(self.trouble or "coordination is still being started")
        return self.link

    def changed(self) -> None:
        """Something that this node says of itself is different now."""
        if self.link is not None:
            self.link.publisher.wake()

    # ── life ────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Life:
        if self._state.config.version:
            self.parts.apply_config(self._state.config)
        if self.seat.open:
            await self.front.try_open()
        chance = self.parts.chance
        self._linking = asyncio.create_task(self._keep_linked(), name="cluster link")
        self._tasks = [
            asyncio.create_task(self._stay_valid(), name="renewal"),
            asyncio.create_task(keep_going("standing", self._ask_standing, chance), name="standing"),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._linking is not None
        await end(self._tasks)
        self._stopping.set()
        if self.link is None:
            self._linking.cancel()  # in the middle of coming up: nothing to take down in order
        await asyncio.wait([self._linking], timeout=STOP_S)
        await end([self._linking])
        await self.front.close()

    async def _keep_linked(self) -> None:
        pause_s = RETRY_S[0]
        while not self._stopping.is_set():
            try:
                async with self._linked():
                    self.trouble = ""
                    log.info(COORDINATION_UP, cluster=self.identity.cluster)
                    pause_s = RETRY_S[0]
                    await self._stopping.wait()
            except (OllamaDistributedError, OSError) as failure:
                reason = getattr(failure, "message", "") or str(failure)
                self._no_link(reason, pause_s)
            except Exception as defect:  # the task's root: the node goes on without coordination
                log.exception(COORDINATION_DOWN)
                self._no_link(f"internal error ({type(defect).__name__}); the log has it", pause_s)
            with anyio.move_on_after(pause_s):
                await self._stopping.wait()
            pause_s = min(pause_s * 2, RETRY_S[1])

    def _no_link(self, reason: str, again_in_s: float) -> None:
        if self._stopping.is_set():
            return
        self.trouble = f"coordination is not up: {reason}"
        log.error(COORDINATION_DOWN, reason=reason, again_in_s=again_in_s)

    @contextlib.asynccontextmanager
    async def _linked(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if self.is_server:
                self.bus = await stack.enter_async_context(self._bus())
            self._boot = random_id()
            link = await stack.enter_async_context(
                linked(
                    self.parts,
                    self.identity,
                    self.roster,
                    urls=self.bus_urls(),
                    boot=self._boot,
                    create=self.bus is not None and self.bus.alone,
                    advert=self.advert,
                    holdings=self.holdings,
                    alerts=self.own_alerts,
                    allowed=lambda: not self.leaving and not self.roster.removed(self.parts.node),
                )
            )
            stack.callback(link.config.on_applied(partial(self._apply, link)))
            running = [
                asyncio.create_task(keep_going(name, step, self.parts.chance), name=name)
                for name, step in self._duties(self, link)
            ]
            stack.push_async_callback(end, running)
            self.link = link
            self.up.set()
            try:
                yield
            finally:
                self._state = link.mirror.state if link.mirror.ready else self._state
                self.link = self.bus = None

    def _apply(self, link: Link, config: Config) -> None:
        if link.mirror.ready:  # before that it is no config, but the lack of one
            self.parts.apply_config(config)

    def _bus(self) -> Bus:
        return Bus(
            self.parts.data_dir,
            self.identity,
            self.keys,
            host=self.front.listen.host,
            is_open=self.seat.open,
            advertise=self.front.hosts()[0],
            program=self.parts.settings.nats_server,
            bucket=BUCKET,
        )

    def bus_urls(self) -> tuple[str, ...]:
        """Where this node connects to coordination: its own server first, then the others'."""
        own = self.bus.urls() if self.bus is not None else ()
        if self.bus is not None and self.bus.alone:
            return own
        others = [f"tls://{where}" for where in self.bus_addresses()]
        return tuple(dict.fromkeys((*own, *others))) or self.identity.credentials.facts.nats

    # ── open to other machines ──────────────────────────────────────────────────────

    async def open(self) -> None:
        """Open the listeners to other machines. Idempotent; kept over restarts.

        Raises:
            Conflict, Invalid: the address cannot be used.
            Unavailable: the coordination server does not come back with it.
        """
        async with self._opening:
            await self.front.open()
            if self.seat.open:
                return
            if self.bus is not None:
                await self.bus.open()
                if self.link is not None:
                    self.link.coordination.update_servers(self.bus_urls())
            await self.seats.change(open=True)
            self.changed()

    async def remember(self) -> None:
        """Keep what is known now for a start without coordination."""
        await asyncio.to_thread(
            memory.remember, self.parts.data_dir, self.identity.cluster, self.state, self.roster.records
        )

    def drop_server_folder(self) -> None:
        """The state of a cluster that this node left. Blocking."""
        shutil.rmtree(server_folder(self.parts.data_dir, self.identity.cluster), ignore_errors=True)

    # ── certificates and removals ───────────────────────────────────────────────────

    async def _stay_valid(self) -> None:
        await identities.keep_valid(
            self.identity,
            facts=self.facts,
            hosts=self.front.hosts,
            wall=self.parts.clock.time,
            renewed=self._on_renewed,
        )
        self._on_removed(self.parts.node)

    async def _on_renewed(self) -> None:
        if self.bus is not None and self.bus.server.running:
            await self.bus.server.reload()

    def _on_removed(self, node: NodeId) -> None:
        """A node was removed: whatever it has open here ends now."""
        if node == self.parts.node:
            if not self.leaving:
                self.leaving = True
                log.error(REMOVED, cluster=self.identity.cluster)
                self._on_over()
            return
        self.front.cut(node)
        self.parts.door.drop(node)
        self.parts.pool.drop(node, "it was removed from the cluster")

    def _on_roster(self) -> None:
        self.parts.keys.check(self.roster.removed)
        self.roster_changed.set()
        self.roster_changed = anyio.Event()

    async def was_removed(self) -> bool:
        """Whether a server says so; False also where none answers."""
        if self.roster.removed(self.parts.node):
            return True
        others = [where for where in self.facts().servers if str(where) not in self.front.hop()]
        try:
            await identities.renew(self.identity, others)
        except Forbidden:
            return True
        except OllamaDistributedError as failure:
            log.info("cluster.no_server_answers", reason=failure.message)
        return False

    async def _ask_standing(self) -> None:
        """Where no coordination server lets this node in: was it removed? A server knows."""
        link = self.link
        if link is None or link.coordination.connected or (self.bus and self.bus.voters):
            await anyio.sleep(1.0)
            return
        await anyio.sleep(CUT_OFF_S)
        if link.coordination.connected or self.leaving:
            return
        if await self.was_removed():
            self._on_removed(self.parts.node)
        await anyio.sleep(ASK_AGAIN_S)


def _addresses(texts: list[str]) -> tuple[Address, ...]:
    found: dict[Address, None] = {}
    for text in texts:
        with contextlib.suppress(Invalid):  # of a node that writes them in another way
            found[parse_address(text)] = None
    return tuple(found)
