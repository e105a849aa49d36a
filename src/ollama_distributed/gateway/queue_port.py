"""What the gateway needs of the queues (`node.queue.NodeQueue`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.queue import QueueAnswer, QueueFigures, QueueWaiting
from ollama_distributed.gateway.queueing import Turn


class Queues(Protocol):
    def figures(self) -> QueueFigures:
        """Of this node, from memory."""
        ...

    async def queue(self, node: str = "") -> QueueAnswer:
        """Of one node, by id or by a name that only one has; empty: of all that live.

        Raises:
            NotFound, Conflict: there is no such node, or several.
        """
        ...

    async def waiting(self) -> Sequence[QueueWaiting]:
        """Each request that waits, of all nodes that live."""
        ...

    def shed(self, identity: Identity, turn: Turn) -> None:
        """
        Raises:
            QueueFull: whatever the model, a request like that would be refused here, and nobody else
                could take it.
        """
        ...
