"""Usage and quotas between nodes: both sides of the hop."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ollama_distributed.access.metering import BorrowAsk, Borrowed
from ollama_distributed.access.remaining import LeftAsk, LeftTold
from ollama_distributed.access.usage import Group
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.usage import By, Doubt, Row
from ollama_distributed.cluster.identity.ca import Peer

BORROW, LEFT, KEEP, ASK = "quota/borrow", "quota/left", "usage/keep", "usage/ask"
BORROW_S = 1.0
LEFT_S = 1.0
KEEP_S = 10.0
ASK_S = 5.0


class KeepAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Keep a copy of what this ledger counted: rows as they are now that changed after `since`."""

    ledger: str
    name: str
    """Of the node, that people see."""
    since: int
    batch: int
    rows: tuple[Row, ...]
    doubts: tuple[Doubt, ...] = ()


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    """What the copy holds now; less than `since`: send what changed after it."""


class UsageAsk(msgspec.Struct, frozen=True, kw_only=True):
    by: tuple[By, ...]
    start: float
    end: float
    key: str = ""
    team: str = ""


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What one ledger has to say."""

    ledger: str
    name: str
    batch: int
    """Of several copies of a ledger the one with the highest counts."""
    groups: tuple[Group, ...]
    doubts: tuple[Doubt, ...] = ()


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """A node's own ledger, and the copies that it keeps."""

    ledgers: tuple[Counted, ...]


class Here(Protocol):
    """This node's side (`node.usage.service.NodeUsage`)."""

    def lend(self, to: NodeId, ask: BorrowAsk) -> Borrowed: ...

    def left(self, ask: LeftAsk) -> LeftTold: ...

    def keep(self, ask: KeepAsk) -> Kept: ...

    async def counts(self, ask: UsageAsk) -> Counts: ...


class UsageExchange:
    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed:
        # Done twice a little of a minute is lost, which is better than a handshake for each.
        return await self._pool.ask(node, BORROW, ask, Borrowed, deadline_s=BORROW_S, fresh=False)

    async def left(self, node: NodeId, ask: LeftAsk) -> LeftTold:
        return await self._pool.ask(node, LEFT, ask, LeftTold, deadline_s=LEFT_S, fresh=False)

    async def keep(self, node: NodeId, ask: KeepAsk) -> Kept:
        return await self._pool.ask(node, KEEP, ask, Kept, deadline_s=KEEP_S, fresh=False)

    async def counts(self, node: NodeId, ask: UsageAsk) -> Counts:
        return await self._pool.ask(node, ASK, ask, Counts, deadline_s=ASK_S, fresh=False)


def open_usage_door(door: PeerDoor, here: Here) -> None:
    async def borrow(peer: Peer, ask: BorrowAsk) -> Borrowed:
        return here.lend(peer.node, ask)

    async def left(_peer: Peer, ask: LeftAsk) -> LeftTold:
        return here.left(ask)

    async def keep(_peer: Peer, ask: KeepAsk) -> Kept:
        return here.keep(ask)

    async def counts(_peer: Peer, ask: UsageAsk) -> Counts:
        return await here.counts(ask)

    door.add(BORROW, borrow, BorrowAsk)
    door.add(LEFT, left, LeftAsk)
    door.add(KEEP, keep, KeepAsk)
    door.add(ASK, counts, UsageAsk)
