"""Removes parts of chains whose records need not be kept any more.

Of its own chain a node says so first, in the chain; of a copy it removes only what the chain itself says
was removed, and what by its own clock and settings is old: a node that was broken into cannot have its
copies taken away.
"""

from __future__ import annotations

import anyio
import structlog

from ollama_distributed.access.audit.chain import Head, removal_of
from ollama_distributed.access.audit.log import AuditLog
from ollama_distributed.access.audit.ports import ChainDisk
from ollama_distributed.base.audit import AuditFilter
from ollama_distributed.base.errors import OllamaDistributedError

LOOK_S = 3600.0
"""A part is days long."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Retention:
    """`run` looks now and then, until it is cancelled."""

    def __init__(self, chain: AuditLog, disk: ChainDisk) -> None:
        self._chain = chain
        self._disk = disk
        self._unsaid: dict[str, Head] = {}
        """Ends of copies that did not say of their oldest part that it was removed: to read one again
        is worth it only when it has grown."""

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except OllamaDistributedError as failure:
                log.warning("audit.not_removed", error=failure.message)
            await anyio.sleep(LOOK_S)

    async def step(self) -> None:
        """
        Raises:
            DiskFull, Unavailable
        """
        before, own = self._chain.due_before, self._chain.node
        if before is None:
            return
        while last := await self._due(own, before):
            if not await self._is_said(own, last):
                await self._chain.write(removal_of(last))
            await self._disk.remove_oldest(own, last.seq)
        for node in await self._disk.nodes():
            if node == own:
                continue
            while last := await self._due(node, before):
                end = await self._disk.head(node)
                if self._unsaid.get(node) == end:
                    break
                if not await self._is_said(node, last):
                    self._unsaid[node] = end
                    break
                await self._disk.remove_oldest(node, last.seq)

    async def _due(self, node: str, before: float) -> Head | None:
        """The end of the oldest part, if that is old enough."""
        last = await self._disk.oldest(node)
        return last if last is not None and last.at < before else None

    async def _is_said(self, node: str, last: Head) -> bool:
        said = removal_of(last)
        wanted = AuditFilter(limit=1, since=last.at, action=said.action, object=said.object)
        found = await self._disk.page([node], wanted)
        return any((one.action, one.object) == (said.action, said.object) for one in found)
