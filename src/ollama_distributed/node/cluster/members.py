"""Takes nodes out of the cluster. Who may not act asks one who may.

A removal voids the node's key first, then its records go: a node that is half removed is
shut out and still listed, and removing it again ends what was begun.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

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
from ollama_distributed.state.changes import Proposal, RemoveNode, plan_change

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life

log = structlog.get_logger("cluster.members")

REMOVE, LEAVE = "members/remove", "members/leave"
ASK_S = 10.0
"""Several compare-and-sets at the server."""


class RemoveNodeAsk(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    force: bool = False
    actor: str = ""


class LeaveClusterAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The node that asks is the one that goes."""


class Done(msgspec.Struct, frozen=True):
    """It happened."""


class Members:
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._going: set[asyncio.Task[None]] = set()
        self._add_routes(keeper.parts.door)

    def _add_routes(self, door: PeerDoor) -> None:
        async def remove(peer: Peer, ask: RemoveNodeAsk) -> Done:
            log.info("members.asked", by=peer.node, node=ask.node)
            await self._remove(self._keeper.need_life(), ask.node, force=ask.force, actor=ask.actor)
            return Done()

        async def leave(peer: Peer, _ask: LeaveClusterAsk) -> Done:
            life = self._keeper.need_life()
            going = asyncio.create_task(self._remove(life, peer.node, force=True, actor=peer.node))
            self._going.add(going)
            going.add_done_callback(self._gone)
            # Its connection is cut in the middle of this, and that must not end it.
            await asyncio.shield(going)
            return Done()

        door.add(REMOVE, remove, RemoveNodeAsk)
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
            Conflict: it lives and `force` is not given; it votes; it is this node itself.
            NotFound, Unavailable.
        """
        life, _ = await self._keeper.linked()
        target = life.state.resolve(node)
        if target == self._keeper.parts.node:
            raise Conflict(
                "this is the node that you ask; take it out with: ollama-distributed cluster leave"
            )
        if life.is_server:
            await self._remove(life, target, force=force, actor=actor)
        else:
            await self._ask_server(life, REMOVE, RemoveNodeAsk(node=target, force=force, actor=actor))

    async def leave(self, *, force: bool, actor: str) -> None:
        """
        Raises:
            Conflict: this node is alone, or votes. Unavailable: nobody can note it; `force`
                leaves without a word.
        """
        life, me = self._keeper.need_life(), self._keeper.parts.node
        if max(len(life.state.nodes), len(life.roster)) <= 1:
            raise Conflict("this node is alone; there is no cluster to leave")
        voters = life.state.voters.nodes if life.state.voters else ()
        if me in voters and not force:
            raise Conflict(
                "this node runs a coordination server that the others need; give its vote to another "
                "server first: ollama-distributed cluster voter replace"
            )
        life.leaving = True  # it says nothing more of itself
        try:
            await self._tell(life)
        except OllamaDistributedError as failure:
            # Who is removed is cut off at once, perhaps before it is told.
            if not force and not (isinstance(failure, Unavailable) and await life.was_removed()):
                life.leaving = False
                life.changed()
                raise
            log.warning("members.left_without_an_answer", actor=actor, reason=failure.message)
        await self._keeper.leave()

    async def _tell(self, life: Life) -> None:
        me = self._keeper.parts.node
        others = [node for node in life.state.servers if node != me]
        if others or not life.is_server:
            await self._ask_server(life, LEAVE, LeaveClusterAsk())
        else:
            raise Conflict("this node is the cluster's only server; the others cannot be without it")

    async def _remove(self, life: Life, node: str, *, force: bool, actor: str) -> None:
        link = life.need_link()
        target = self._known(life, node)
        change = RemoveNode(node=target, force=force)
        if target in life.state.nodes:
            # Checked before anything is void; the leader checks again.
            plan_change(life.state, Proposal(id="check", change=change, actor=actor))
        await life.admission.remove(target, actor=actor)
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
