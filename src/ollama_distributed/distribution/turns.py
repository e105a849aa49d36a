"""Whose turn it is to fetch something from outside: what one node remembers for the others.

Nothing of it is replicated or on disk. A key (a name, a blob) is kept by the nodes with the
highest weight for it, as rendezvous hashing has it (Thaler and Ravishankar 1998): all nodes that
know of the same servers find the same keepers, and when one goes most keys stay where they are.
A wrong answer costs a second download, never a wrong byte. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from ollama_distributed.base.ids import NodeId

LEASE_S = 6.0
"""A turn that is not renewed ends: four renewals."""
MOST = 10_000
"""Turns that one node remembers; past that the one that ends first is forgotten."""


def rank(key: str, nodes: Iterable[NodeId]) -> list[NodeId]:
    """The keepers of a key, first the one that decides."""

    def weight(node: NodeId) -> tuple[bytes, NodeId]:
        return hashlib.blake2b(f"{key}\0{node}".encode(), digest_size=8).digest(), node

    return sorted(nodes, key=weight, reverse=True)


class Turns:
    """`now`: monotonic seconds of the node that remembers."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[NodeId, float]] = {}
        """Who, and until when; those that were renewed last come last."""

    def holder(self, key: str, now: float) -> NodeId | None:
        held = self._held.get(key)
        return held[0] if held is not None and now < held[1] else None

    def take(self, key: str, node: NodeId, now: float, *, instead_of: NodeId | None = None) -> NodeId:
        """Whose turn it is from now on: `node`'s, if it was nobody's, its own, or that of the node
        which it has seen fail."""
        holder = self.holder(key, now)
        if holder not in (None, node, instead_of):
            assert holder is not None
            return holder
        self._held.pop(key, None)
        self._held[key] = (node, now + LEASE_S)
        if len(self._held) > MOST:
            del self._held[next(iter(self._held))]
        return node

    def end(self, key: str, node: NodeId) -> None:
        """Nothing happens unless it is this node's."""
        if self._held.get(key, (None,))[0] == node:
            del self._held[key]
