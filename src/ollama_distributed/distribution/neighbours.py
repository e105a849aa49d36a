"""What nodes ask each other when they fetch the same things from outside, and the port for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ollama_distributed.base.ids import NodeId


class TurnAsk(msgspec.Struct, frozen=True, kw_only=True):
    """To a keeper (`distribution.turns`): whose turn is it?"""

    key: str
    take: bool = False
    """The asker's, if it is nobody's."""
    instead_of: NodeId | None = None
    """Or this node's, which the asker has seen fail."""
    end: bool = False
    """The asker's turn is over."""


class TurnAnswer(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId | None = None


class BlobAsk(msgspec.Struct, frozen=True, kw_only=True):
    blob: str


class BlobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    size: int | None = None
    """Bytes of the whole blob; None: it is not here."""


class PulledAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest that a running pull of this name goes by."""

    name: str


class PulledAnswer(msgspec.Struct, frozen=True, kw_only=True):
    manifest: bytes


class Neighbours(Protocol):
    """Asks other nodes (`adapters.peers.neighbours.NeighbourCalls`).

    Every method may raise `Unavailable` and `DeadlineExceeded` (the node cannot be reached, or
    stopped answering), and what the other node refuses with.
    """

    async def turn(self, node: NodeId, ask: TurnAsk) -> NodeId | None: ...

    async def size(self, node: NodeId, blob: str) -> int | None: ...

    async def pulled(self, node: NodeId, name: str) -> bytes:
        """
        Raises:
            NotFound: it does not pull that.
            ModelNotFound: the registry has no such model.
        """
        ...

    async def follow(self, node: NodeId, blob: str, told: Callable[[int], None]) -> None:
        """Wait until the other node has fetched a blob from outside; it goes on with that as long as
        anybody waits. `told` hears how many bytes it has.

        Raises:
            NotFound: it does not fetch that from outside.
            what its fetch failed with.
        """
        ...
