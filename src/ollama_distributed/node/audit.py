"""The audit log of a node: its chain on its disk, copies on other nodes, and what the API asks of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from ollama_distributed.access.audit.cluster import ClusterAudit
from ollama_distributed.access.audit.copies import Copies
from ollama_distributed.access.audit.log import AuditLog, Keep
from ollama_distributed.access.audit.retention import Retention
from ollama_distributed.adapters.audit.disk import AuditDisk
from ollama_distributed.adapters.peers.audits import AuditExchange, open_audit_door
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.node.settings import Settings
from ollama_distributed.state.cluster import ClusterState

FOLDER = "audit"


class AuditCare:
    """`chain`: to write to, from the first moment on."""

    def __init__(self, settings: Settings, node: NodeId, clock: Clock) -> None:
        self._name = settings.name
        self._disk = AuditDisk(settings.data_dir / FOLDER)
        keep = Keep(kept_s=settings.audit_kept, part_bytes=int(settings.audit_part_mib * (1 << 20)))
        self.chain = AuditLog(node, self._disk, clock, keep)

    @asynccontextmanager
    async def among(
        self, *, pool: PeerPool, door: PeerDoor, state: Callable[[], ClusterState]
    ) -> AsyncIterator[ClusterAudit]:
        """While it is open, what was noted is written and copied to other nodes; what is old goes."""
        exchange = AuditExchange(pool)
        everywhere = ClusterAudit(self.chain, self._disk, exchange, self._name, state)
        copies = Copies(self.chain, self._disk, exchange, state)
        old = Retention(self.chain, self._disk)
        open_audit_door(door, everywhere, copies)
        await self.chain.start()
        async with AsyncExitStack() as stack:
            for name, run in (
                ("audit", self.chain.run),
                ("audit copies", copies.run),
                ("old audit", old.run),
            ):
                in_background(stack, name, run)
            stack.push_async_callback(self.chain.flush)
            yield everywhere
