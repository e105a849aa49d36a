"""Which nodes are asked for which blobs: not those that sent wrong bytes of it lately."""

from __future__ import annotations

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import BlobId

log = structlog.get_logger()

PEER_LIED = "distribution.peer_lied"

DISTRUST_S = 3600.0
"""A node is left alone for so long: its disk may be repaired by then. What it sends is checked again."""
MAX_LIARS = 4096


class Trust:
    """`lies`: how often any node was found out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._liars: dict[tuple[BlobId, NodeId], float] = {}
        """Until when."""
        self._givers: dict[BlobId, NodeId] = {}
        """Whose tables the fetches of now go by."""
        self.lies = 0

    def lied(self, blob: BlobId, node: NodeId, what: str) -> None:
        self.lies += self.of(blob, node)  # several of its pieces may have been on their way
        self._liars.pop((blob, node), None)
        self._liars[blob, node] = self._clock.monotonic() + DISTRUST_S
        if len(self._liars) > MAX_LIARS:
            del self._liars[next(iter(self._liars))]
        log.warning(PEER_LIED, node=node, blob=blob.digest, what=what)

    def of(self, blob: BlobId, node: NodeId) -> bool:
        return self._liars.get((blob, node), 0.0) <= self._clock.monotonic()

    def goes_by(self, blob: BlobId, giver: NodeId) -> None:
        """The pieces of this blob are checked by this node's table."""
        self._givers[blob] = giver

    def forget(self, blob: BlobId) -> NodeId | None:
        """Whose table it was."""
        return self._givers.pop(blob, None)
