"""Any node's disk, asked at any node."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.base.disk import DiskAnswer, DiskFigures, EvictAnswer, ScrubRow
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.disk import NodeDisk
from ollama_distributed.distribution.disk_ports import Disks, EvictHere
from ollama_distributed.state.cluster import ClusterState


class ClusterDisks:
    """Nodes by id or by a name that only one has; empty: this one. Every method may raise `NotFound`
    and `Conflict` (there is no such node, or several), `Unavailable` and `DeadlineExceeded`."""

    def __init__(self, me: NodeId, own: NodeDisk, others: Disks, state: Callable[[], ClusterState]) -> None:
        self._me = me
        self._own = own
        self._others = others
        self._state = state

    def figures(self) -> DiskFigures:
        """Of this node, from memory."""
        return self._own.figures()

    async def disk(self, node: str) -> DiskAnswer:
        known = self._known(node)
        return await (self._own.answer() if known == self._me else self._others.disk(known))

    async def evict(self, model: str, node: str, *, last_copy: bool) -> EvictAnswer:
        """
        Raises:
            ModelNotFound: it is not there.
            Conflict: it must stay; says why.
        """
        known = self._known(node)
        if known == self._me:
            freed = await self._own.evictions.evict(model, last_copy=last_copy)
        else:
            freed = await self._others.evict(known, EvictHere(model=model, last_copy=last_copy))
        there = self._state().nodes.get(known)
        name = there.name if there is not None else known
        return EvictAnswer(model=model, node=known, name=name, freed_bytes=freed)

    async def scrub(self, node: str) -> ScrubRow:
        """Begin to read every file there; `disk` tells how far it is."""
        known = self._known(node)
        return self._own.scrubber.ask() if known == self._me else await self._others.scrub(known)

    def _known(self, node: str) -> NodeId:
        return NodeId(node) if node == self._me else self._state().resolve(node) if node else self._me
