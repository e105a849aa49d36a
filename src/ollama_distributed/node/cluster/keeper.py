"""Keeps a node in its cluster, whichever that is: found, joined, left, removed.

A node always has an identity. Without one it makes a cluster of its own; after it left or was
removed it does that again. One life at a time; inference goes on between two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import structlog

from ollama_distributed.base.errors import Conflict, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import fingerprint
from ollama_distributed.cluster.identity.tokens import JoinToken
from ollama_distributed.cluster.load import LoadReports
from ollama_distributed.cluster.ports import REFUSAL_S
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster import addresses
from ollama_distributed.node.cluster import identity as identities
from ollama_distributed.node.cluster.identity import Identity
from ollama_distributed.node.cluster.parts import Parts
from ollama_distributed.node.cluster.seat import SeatFile
from ollama_distributed.state.cluster import ClusterState

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life
    from ollama_distributed.node.cluster.link import Link
    from ollama_distributed.placement.outcome import Plan

log = structlog.get_logger("cluster.keeper")

FOUNDED = "cluster.founded"
JOINED = "cluster.joined"
LEFT = "cluster.left"
NO_IDENTITY = "cluster.no_identity"

RETRY_S = (1.0, 30.0)
UP_S = 15.0
"""A fresh life has its link and the state within so long, or its caller is told to look again."""


_ALONE = ClusterState()
"""Of a node in no cluster. One object, since what is made of a state is kept as long as it is the same."""


class _Turn:
    """From one life to the next."""

    def __init__(self, then: Callable[[Life], Awaitable[None]]) -> None:
        self.then = then
        """Done to the life that ended."""
        self.failure: Exception | None = None
        """Why it was not; the next life is then in the same cluster."""


class Keeper:
    """`async with`; from `begin` on the node takes part in its cluster."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.life: Life | None = None
        self.trouble = ""
        """Why there is no life."""
        self._seats = SeatFile(parts.data_dir)
        self._turn = anyio.Event()
        """Set to end the present life."""
        self._planned: _Turn | None = None
        """What happens after it."""
        self._stopping = False
        self._next = anyio.Event()
        """Set when a new life begins."""
        self._running: asyncio.Task[None] | None = None
        self._begun = anyio.Event()

    def begin(self) -> None:
        """The API answers: now there is time for the cluster."""
        self._begun.set()

    @property
    def state(self) -> ClusterState:
        return self.life.state if self.life is not None else _ALONE

    @property
    def loads(self) -> LoadReports | None:
        link = self.life.link if self.life is not None else None
        return link.loads if link is not None else None

    @property
    def plan(self) -> Plan | None:
        """Of models' places; None: this node does not lead."""
        link = self.life.link if self.life is not None else None
        return link.placement.plan if link is not None and link.placement is not None else None

    def changed(self) -> None:
        """Something that this node says of itself is different now."""
        if self.life is not None:
            self.life.changed()

    async def __aenter__(self) -> Keeper:
        self._running = asyncio.create_task(self._run(), name="cluster")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._running is not None
        self._stopping = True
        self._turn.set()
        if self.life is None:
            self._running.cancel()
        await asyncio.wait([self._running])
        await end([self._running])

    # ── changes ─────────────────────────────────────────────────────────────────────

    async def join(self, token: JoinToken) -> Life:
        """Join while the node runs. Returns with the new life, its state loaded.

        Raises:
            as `identity.join`; Conflict: it is in another cluster with other nodes, or in that one.
            Unavailable: it is a member now, and its state is not there yet.
        """
        life = self.need_life()
        identities.check_may_join(life.identity, max(len(life.state.nodes), len(life.roster), 1), token)
        await identities.join(self.parts.data_dir, self.parts.node, token, mdns=self.parts.settings.mdns)

        async def adopt(ended: Life) -> None:
            await asyncio.to_thread(_adopt, self._seats, self.parts.data_dir, token)
            await asyncio.to_thread(ended.drop_server_folder)

        return await self._turn_to(adopt)

    async def leave(self) -> Life:
        """Give the identity up and be alone again."""
        return await self._turn_to(self._forget)

    def need_life(self) -> Life:
        """
        Raises:
            Unavailable: the node is between two lives, or has no usable identity.
        """
        if self.life is None:
            raise Unavailable(self.trouble or "this node's part in the cluster is being started")
        return self.life

    async def linked(self) -> tuple[Life, Link]:
        """The life and its link to coordination; at the start of a life waited for a little.

        Raises:
            Unavailable: coordination is not up; the message says why.
        """
        with anyio.move_on_after(REFUSAL_S):
            if self.life is None:
                await self._next.wait()
            if self.life is not None and not self.life.trouble:
                await self.life.up.wait()
        life = self.need_life()
        return life, life.need_link()

    async def settled(self) -> Life:
        """The life, and where it has just begun, its state: waited for a little.

        Raises:
            Unavailable: the node is between two lives, or has no usable identity.
        """
        if not self.state.nodes:
            with contextlib.suppress(Unavailable), anyio.move_on_after(REFUSAL_S):  # `need_life` says so
                _, link = await self.linked()
                await link.mirror.wait_for(lambda state: self.parts.node in state.nodes)
        return self.need_life()

    async def _turn_to(self, then: Callable[[Life], Awaitable[None]]) -> Life:
        if self._planned is not None:
            raise Conflict("this node is joining or leaving already")
        self.need_life()
        following = self._next
        planned = self._planned = _Turn(then)
        self._turn.set()
        try:
            with anyio.fail_after(UP_S):
                await following.wait()
                if planned.failure is not None:
                    raise Unavailable(f"it did not work: {planned.failure}") from planned.failure
                life = self.need_life()
                await life.up.wait()
                await life.need_link().mirror.wait_ready()
        except TimeoutError as late:
            raise Unavailable("done, but the cluster's state is not there yet; see: cluster status") from late
        return life

    # ── lives ───────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        await self._begun.wait()
        pause_s = RETRY_S[0]
        while not self._stopping:
            try:
                life = await asyncio.to_thread(self._new_life)
                self.trouble = ""
                await self._live(life)
                pause_s = RETRY_S[0]
            except Exception as failure:  # the task's root: the node goes on without a cluster
                ours = isinstance(failure, OllamaDistributedError)
                said = str(failure) if ours else repr(failure)
                self.trouble = f"this node's part in the cluster cannot be started: {said}"
                log.exception(NO_IDENTITY, error=said, again_in_s=pause_s, exc_info=not ours)
                self._turn = anyio.Event()
                with anyio.move_on_after(pause_s):
                    await self._turn.wait()
                pause_s = min(pause_s * 2, RETRY_S[1])

    async def _live(self, life: Life) -> None:
        self._turn = anyio.Event()
        if self._stopping:
            return
        try:
            async with life:
                self.life = life
                self._next.set()
                self._next = anyio.Event()
                await self._turn.wait()
            self.life = None
            if self._planned is not None:
                await self._planned.then(life)
        except Exception as failure:
            if self._planned is not None:
                self._planned.failure = failure
            raise
        finally:
            self.life = self._planned = None

    def _new_life(self) -> Life:
        """With the identity on disk, or a new cluster's. Blocking: 0.1 s at the first time."""
        # Imported late: a node's start does not wait for what its cluster needs.
        from ollama_distributed.node.cluster.duties import duties_of
        from ollama_distributed.node.cluster.life import Life

        return Life(
            self.parts, self._identity(), self._seats, on_over=self._on_over, duties=partial(duties_of, self)
        )

    def _identity(self) -> Identity:
        from ollama_distributed.node.cluster.bus import server_folder, sit_alone

        parts, now = self.parts, self.parts.clock.time()
        listen = addresses.parse_listen(parts.settings.cluster_listen)
        hosts = addresses.advertised(parts.settings.advertise, listen)
        identity = identities.restore(parts.data_dir)
        if identity is not None:
            identities.cover(identity, hosts, now)
        else:
            cluster = identities.new_cluster()
            # First the server's seat: a crash in between leaves a folder that nobody reads.
            sit_alone(server_folder(parts.data_dir, cluster))
            identity = identities.found(parts.data_dir, cluster, parts.node, hosts, now)
            log.info(FOUNDED, cluster=identity.cluster)
        self._seats.read(identity.cluster)
        parts.keys.restore(identity.cluster)
        parts.people.restore(identity.cluster)
        return identity

    async def _forget(self, ended: Life) -> None:
        await asyncio.to_thread(identities.forget, ended.identity)
        await asyncio.to_thread(ended.drop_server_folder)
        log.info(LEFT, cluster=ended.identity.cluster)

    def _on_over(self) -> None:
        """This node was removed: its keys are void, and it is alone again."""
        if self._planned is None:
            self._planned = _Turn(self._forget)
            self._turn.set()


async def join_first(data_dir: Path, node: NodeId, token: JoinToken, *, mdns: bool) -> None:
    """Join before the node starts. Nothing happens where it is in that cluster already.

    Raises:
        as `identity.join`; Conflict: it is in another cluster with other nodes.
    """
    seats = SeatFile(data_dir)
    current = await asyncio.to_thread(identities.restore, data_dir)
    if current is not None:
        seat = await asyncio.to_thread(seats.read, current.cluster)
        if _belongs(current, token):
            log.info(JOINED, cluster=current.cluster, again=True)
            return
        identities.check_may_join(current, seat.members, token)
    await identities.join(data_dir, node, token, mdns=mdns)
    await asyncio.to_thread(_adopt, seats, data_dir, token)


def _adopt(seats: SeatFile, data_dir: Path, token: JoinToken) -> None:
    """Take the identity that the join prepared, and the seat that goes with it. Blocking, small."""
    identity = identities.adopt(data_dir, token.ca_sha256)
    seats.read(identity.cluster)
    given = identity.credentials.facts
    seats.put(
        open=True,
        servers=tuple(map(str, given.servers)),
        nats=tuple(url.partition("://")[2] for url in given.nats),
        members=2,
    )
    log.info(JOINED, cluster=identity.cluster, role=identity.role)


def _belongs(identity: Identity, token: JoinToken) -> bool:
    return any(fingerprint(pem.encode()) == token.ca_sha256 for pem in identity.credentials.authorities)
