"""Questions about audit chains from node to node: both sides of the hop."""

from __future__ import annotations

from ollama_distributed.access.audit.cluster import ClusterAudit
from ollama_distributed.access.audit.copies import Copies
from ollama_distributed.access.audit.ports import (
    CheckAnswer,
    CheckAsk,
    PageAnswer,
    PageAsk,
    TakeAnswer,
    TakeAsk,
)
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer

TAKE, PAGE, CHECK = "audit/take", "audit/page", "audit/check"

TAKE_S = 5.0
PAGE_S = 10.0
"""A long chain is read backwards for what may be rare in it."""
CHECK_S = 120.0
"""Every record is hashed: some 100,000 a second."""


class AuditExchange:
    """Implements `access.audit.ports.Others`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def take(self, node: NodeId, ask: TakeAsk) -> TakeAnswer:
        return await self._pool.ask(node, TAKE, ask, TakeAnswer, deadline_s=TAKE_S, fresh=False)

    async def page(self, node: NodeId, ask: PageAsk) -> PageAnswer:
        return await self._pool.ask(node, PAGE, ask, PageAnswer, deadline_s=PAGE_S, fresh=False)

    async def check(self, node: NodeId, ask: CheckAsk) -> CheckAnswer:
        return await self._pool.ask(node, CHECK, ask, CheckAnswer, deadline_s=CHECK_S, fresh=False)


def open_audit_door(door: PeerDoor, audit: ClusterAudit, copies: Copies) -> None:
    """Answer other nodes' questions; what they send is kept as theirs, whatever it says."""

    async def take(peer: Peer, ask: TakeAsk) -> TakeAnswer:
        return await copies.take(NodeId(peer.node), ask)

    async def page(_peer: Peer, ask: PageAsk) -> PageAnswer:
        return await audit.page_here(ask)

    async def check(_peer: Peer, ask: CheckAsk) -> CheckAnswer:
        return await audit.check_here(ask)

    door.add(TAKE, take, TakeAsk)
    door.add(PAGE, page, PageAsk)
    door.add(CHECK, check, CheckAsk)
