"""What the audit log needs: a disk on which chains grow, and the other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from ollama_distributed.access.audit.chain import Checked, Head
from ollama_distributed.base.audit import AuditFilter, AuditRecord, ChainReport
from ollama_distributed.base.ids import NodeId


class Part(msgspec.Struct, frozen=True):
    """The newest part of a chain."""

    size_bytes: int
    began_at: float
    """`at` of its first record."""


class ChainDisk(Protocol):
    """Chains on this node's disk, its own and copies of others', each by its node's id."""

    async def head(self, node: str) -> Head:
        """Where a chain ends. Half a line at its end, which nobody was told of, is cut off.

        Raises:
            Unavailable: its end cannot be read; nothing may be written after it.
        """
        ...

    async def append(self, node: str, records: Sequence[AuditRecord]) -> None:
        """On the disk when it returns. A record with the action `chain.PART` begins a new part. When it
        raises, of the last part that was begun nothing is there.

        Raises:
            DiskFull, Unavailable
        """
        ...

    async def part(self, node: str) -> Part | None:
        """None: there is no record yet."""
        ...

    async def oldest(self, node: str) -> Head | None:
        """The last record of the oldest part; None: there is no other part, or it cannot be read."""
        ...

    async def remove_oldest(self, node: str, seq: int) -> None:
        """The oldest part, if `seq` is its last record."""
        ...

    async def remove(self, node: str) -> None:
        """All of a copy."""
        ...

    async def nodes(self) -> Sequence[str]:
        """Whose chains are here."""
        ...

    async def page(self, nodes: Sequence[str], wanted: AuditFilter) -> Sequence[AuditRecord]:
        """The newest first, one more than asked for where there are more."""
        ...

    async def after(self, node: str, seq: int, most: int) -> Sequence[AuditRecord]:
        """The oldest first."""
        ...

    async def check(self, node: str, expect: Mapping[int, str], due_before: float | None = None) -> Checked:
        """As `chain.check`, over all parts."""
        ...


class TakeAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Records of the asking node for who keeps a copy; none: where does the copy end?"""

    records: tuple[AuditRecord, ...] = ()


class TakeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    seq: int
    hash: str


class PageAsk(msgspec.Struct, frozen=True, kw_only=True):
    wanted: AuditFilter
    copies: tuple[str, ...] = ()
    """Of these nodes too, which are away."""


class PageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    records: tuple[AuditRecord, ...]
    copies: tuple[str, ...] = ()
    """Of which of them it has a copy."""


class CheckAsk(msgspec.Struct, frozen=True, kw_only=True):
    own: bool
    """The node's own chain; else the copies that it keeps."""
    expect: dict[str, str] = {}
    """Of its own: number of a record -> hash, as copies have it."""


class CheckAnswer(msgspec.Struct, frozen=True, kw_only=True):
    chains: tuple[ChainReport, ...]


class Others(Protocol):
    """Each may raise `Unavailable` and `DeadlineExceeded`."""

    async def take(self, node: NodeId, ask: TakeAsk) -> TakeAnswer: ...

    async def page(self, node: NodeId, ask: PageAsk) -> PageAnswer: ...

    async def check(self, node: NodeId, ask: CheckAsk) -> CheckAnswer: ...
