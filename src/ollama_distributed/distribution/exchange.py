"""What nodes say to each other about the pieces of a blob, and the port that carries it.

Sets of pieces travel as bytes, the lowest bit of the first byte is piece 0.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.pieces import Table

MAX_PEERS = 32
"""Nodes that one node exchanges pieces of a blob with: enough for any of 10,000 to be near."""


class HaveAsk(msgspec.Struct, frozen=True, kw_only=True):
    blob: str
    seen: int = -1
    """`version` of the last answer: the next comes when there is more, or after a while."""
    table: bool = False
    """Whether the answer is to hold the table."""
    fetching: bool = True
    """The asker has pieces of it too, or will."""


class HaveAnswer(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    whole: bool
    has: bytes = b""
    """Empty if it is whole."""
    table_id: bytes
    table: Table | None = None
    peers: tuple[NodeId, ...] = ()
    """Others that have asked for it."""


class PieceAsk(msgspec.Struct, frozen=True, kw_only=True):
    blob: str
    table_id: bytes
    offered: bytes
    """The holder is to choose one of these."""


class PieceHead(msgspec.Struct, frozen=True, kw_only=True):
    """Then come its bytes."""

    piece: int
    """-1: none of them now."""
    length: int = 0
    retry_s: float = 0.0


class ManifestAsk(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class CopyAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Fetch a model from other nodes."""

    name: str
    sources: tuple[NodeId, ...] = ()
    """Who holds it, for sure; others are found by the replicated state."""
    peers: tuple[NodeId, ...] = ()
    """Who fetches it at the same time."""
    digest: str = ""
    """Of the manifest, as hex: no other version is taken. Empty: whichever comes."""


class TransferAsk(msgspec.Struct, frozen=True, kw_only=True):
    id: str = ""
    """Empty: all."""
    cancel: bool = False


class TransferList(msgspec.Struct, frozen=True, kw_only=True):
    transfers: tuple[Transfer, ...] = ()


class Exchange(Protocol):
    """Asks other nodes (`adapters.peers.pieces.PieceExchange`).

    Every method may raise `Unavailable` and `DeadlineExceeded` (the node cannot be reached, or
    stopped answering), and what the other node refuses with.
    """

    async def have(self, node: NodeId, ask: HaveAsk) -> HaveAnswer:
        """
        Raises:
            BlobNotFound: it has nothing of this blob.
        """
        ...

    async def piece(
        self, node: NodeId, ask: PieceAsk, granted: Callable[[PieceHead], int]
    ) -> list[memoryview] | None:
        """`granted` hears at once which piece comes and says how long it must be (below 0: it is
        not wanted). Returns its bytes in parts. None: none of them now; `granted` heard when to ask
        again.

        Raises:
            DigestMismatch: it sends what was not asked for.
        """
        ...

    async def manifest(self, node: NodeId, name: str) -> bytes: ...

    async def copy(self, node: NodeId, ask: CopyAsk) -> Transfer: ...

    async def transfers(self, node: NodeId, ask: TransferAsk) -> tuple[Transfer, ...]: ...


Put = Callable[[bytes | memoryview], Awaitable[None]]
"""Sends bytes of an answer; waits while the other node does not read."""


def to_bytes(pieces: int) -> bytes:
    return pieces.to_bytes((pieces.bit_length() + 7) // 8, "little")


def from_bytes(pieces: bytes) -> int:
    return int.from_bytes(pieces, "little")
