"""What the routes of disks need of the node (`distribution.disks.ClusterDisks`)."""

from __future__ import annotations

from typing import Protocol

from ollama_distributed.base.disk import DiskAnswer, DiskFigures, EvictAnswer, ScrubRow


class Disks(Protocol):
    """Nodes by id or by a name that only one has; empty: this one. What is asked of another node may
    raise `Unavailable` and `DeadlineExceeded`."""

    def figures(self) -> DiskFigures:
        """Of this node, from memory."""
        ...

    async def disk(self, node: str) -> DiskAnswer: ...

    async def evict(self, model: str, node: str, *, last_copy: bool) -> EvictAnswer:
        """
        Raises:
            ModelNotFound: it is not there.
            Conflict: it must stay; says why.
        """
        ...

    async def scrub(self, node: str) -> ScrubRow:
        """Begin to read every file there."""
        ...
