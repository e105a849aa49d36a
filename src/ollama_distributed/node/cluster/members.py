"""Takes nodes out of the cluster. Only servers do; a node that leaves asks one.

A removal voids the node's key first, then its records go: a node that is half removed is
shut out and still listed, and removing it again ends what was begun.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    NotFound,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster.keeper import Keeper
from ollama_distributed.node.cluster.voters import give_up_vote
from ollama_distributed.state.changes import Proposal, RemoveNode, plan_change

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life

log = structlog.get_logger("cluster.members")

LEAVE = "members/leave"
SEEN_S = 2.0
"""For a server to see what the node that leaves has seen."""
ASK_S = 10.0
"""Several compare-and-sets at the server."""


class LeaveClusterAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The node that asks is the one that goes."""

    revision: int = 0
    """Of the state that it knows: in it, it votes no more."""


class Done(msgspec.Struct, frozen=True):
    """It happened."""


class Members:
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._going: set[asyncio.Task[None]] = set()
        self._add_routes(keeper.parts.door)

    def _add_routes(self, door: PeerDoor) -> None:
        async def leave(peer: Peer, ask: LeaveClusterAsk) -> Done:
            life = self._keeper.need_life()
            with anyio.move_on_after(SEEN_S):
                await life.need_link().mirror.reach(ask.revision)
            going = asyncio.create_task(self._remove(life, peer.node, force=True, actor=peer.node))
            self._going.add(going)
            going.add_done_callback(self._gone)
            # Its connection is cut in the middle of this, and that must not end it.
            await asyncio.shield(going)
            return Done()

        door.add(LEAVE, leave, LeaveClusterAsk)

    async def close(self) -> None:
        await end(list(self._going))

    def _gone(self, going: asyncio.Task[None]) -> None:
        self._going.discard(going)
        if not going.cancelled() and (failure := going.exception()) is not None:
            log.warning("members.leaving_failed", reason=str(failure))

    async def remove(self, node: str, *, force: bool, actor: str) -> None:
        """
        Raises:
            Conflict: it lives and `force` is not given; it votes; it is this node itself; this node
                is no server.
            NotFound, Unavailable.
        """
        life, _ = await self._keeper.linked()
        target = life.state.resolve(node)
        if target == self._keeper.parts.node:
            raise Conflict(
                "this is the node that you ask; take it out with: ollama-distributed cluster leave"
            )
        life.need_server()
        await self._remove(life, target, force=force, actor=actor)

    async def leave(self, *, force: bool, actor: str) -> None:
        """
        Raises:
            Conflict: this node is alone, or votes and nobody can take its vote. Unavailable:
                nobody can note it. `force` leaves all the same, and without a word.
        """
        life, me = await self._keeper.settled(), self._keeper.parts.node
        if max(len(life.state.nodes), len(life.roster)) <= 1:
            raise Conflict("this node is alone; there is no cluster to leave")
        others = [node for node in life.state.servers if node != me]
        if life.is_server and not others and not force:
            raise Conflict("this node is the cluster's only server; the others cannot be without it")
        try:
            await give_up_vote(self._keeper, actor=actor)
        except OllamaDistributedError as failure:
            if not force:
                raise
            log.warning("members.left_with_its_vote", actor=actor, reason=failure.message)
        life.leaving = True  # it says nothing more of itself
        try:
            await self._ask_server(life, LEAVE, LeaveClusterAsk(revision=life.state.revision))
        except OllamaDistributedError as failure:
            # Who is removed is cut off at once, perhaps before it is told.
            if not force and not (isinstance(failure, Unavailable) and await life.was_removed()):
                life.leaving = False
                life.changed()
                raise
            log.warning("members.left_without_an_answer", actor=actor, reason=failure.message)
        await self._keeper.leave()

    async def _remove(self, life: Life, node: str, *, force: bool, actor: str) -> None:
        link = life.need_link()
        target = self._known(life, node)
        change = RemoveNode(node=target, force=force)
        if target in life.state.nodes:
            # Checked before anything is void; the leader checks again.
            plan_change(life.state, Proposal(id="check", change=change, actor=actor))
        record = await life.admission.remove(target, actor=actor)
        if record.role == "server":
            # What it knew cannot be taken back: the CA's key was among it.
            log.warning("members.server_removed", node=target, actor=actor)
        if target in life.state.nodes:
            await link.consensus.propose_change(RemoveNode(node=target, force=True), actor=actor)

    def _known(self, life: Life, node: str) -> NodeId:
        try:
            return life.state.resolve(node)
        except NotFound:
            return NodeId(node)  # admitted, but never seen: its key can be voided all the same

    async def _ask_server(self, life: Life, route: str, body: msgspec.Struct) -> None:
        """Ask the leader, else any server that lives."""
        me, state = self._keeper.parts.node, life.state
        leader = life.link.consensus.get_leader() if life.link is not None else None
        servers = sorted(
            (node for node in state.servers if node != me),
            key=lambda node: (node != leader, not state.nodes[node].alive, node),
        )
        failure: OllamaDistributedError = Unavailable("no server of the cluster is known here")
        for server in servers:
            try:
                await self._keeper.parts.pool.ask(server, route, body, Done, deadline_s=ASK_S)
                return
            except (Unavailable, Forbidden) as refused:
                failure = refused
        raise failure
