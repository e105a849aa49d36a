"""Brings a blob from all nodes that have something of it, and gives on what has come.

Pieces are checked by their hash as they arrive and written at once, so that a crash costs
those on their way. A node that sends wrong bytes is asked no more; a node that is slow or gone
is left for others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from anyio import CapacityLimiter

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.distribution.exchange import Exchange
from ollama_distributed.distribution.fetching import STALL_S, Fetching, Told
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.plan import Draw
from ollama_distributed.distribution.ports import Partial
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.tally import Speed
from ollama_distributed.distribution.trust import Trust
from ollama_distributed.models.names import BlobId

HASH_THREADS = 4


class _Counted:
    """Tells the swarm too."""

    def __init__(self, swarm: Swarm, told: Told | None) -> None:
        self._swarm = swarm
        self._told = told

    def received(self, node: NodeId, count: int) -> None:
        self._swarm.received_bytes += count
        if self._told is not None:
            self._told.received(node, count)

    def lied(self, node: NodeId) -> None:
        if self._told is not None:
            self._told.lied(node)

    def again(self) -> None:
        self._swarm.again += 1


class Swarm:
    """The fetching side; `shelves` is the giving one. `rate`: bytes per second that may come now; 0: no
    limit."""

    def __init__(
        self,
        me: NodeId,
        exchange: Exchange,
        shelves: Shelves,
        clock: Clock,
        draw: Draw,
        *,
        stall_s: float = STALL_S,
        rate: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.me = me
        self.exchange = exchange
        self.shelves = shelves
        self.trust = Trust(clock)
        self.stall_s = stall_s
        self.received_bytes = 0
        self.again = 0
        """Pieces that had to be asked for again."""
        self._sending, self._receiving = Speed(clock), Speed(clock)
        self._clock = clock
        self._draw = draw
        self._rate = rate
        self._pace = Pace(clock)
        self._threads = CapacityLimiter(HASH_THREADS)

    async def fetch(
        self, blob: BlobId, into: Partial, sources: Collection[NodeId], told: Told | None = None
    ) -> None:
        """Bring what is missing. The digest of the whole is not checked here. `sources`: who has
        it or will; others are met through them.

        Raises:
            Unavailable: nobody who can be reached has it.
            RegistryError: all who have it sent wrong bytes.
            DigestMismatch: whose table of pieces it goes by gives no more, and others have another
                table: one of them is wrong (`disproved`, then once more).
            DiskFull: there is no room for the rest.
        """
        fetching = Fetching(
            self.me,
            blob,
            into,
            _Counted(self, told),
            exchange=self.exchange,
            shelves=self.shelves,
            trust=self.trust,
            clock=self._clock,
            draw=self._draw,
            threads=self._threads,
            stall_s=self.stall_s,
            came=self._came,
        )
        await fetching.run(sources)

    def disproved(self, blob: BlobId) -> NodeId | None:
        """What was fetched is not this blob though each piece was right: the table was wrong.
        Returns whose it was; that node is not asked for this blob again soon."""
        self.shelves.clear(blob)
        giver = self.trust.forget(blob)
        if giver is not None:
            self.trust.lied(blob, giver, "its table of pieces is of another blob")
        return giver

    async def _came(self, count: int) -> None:
        """Returns when more may come."""
        self._pace.limit(self._rate())
        await self._pace.take(count)

    def figures(self) -> PieceFigures:
        sent = self.shelves.sent_bytes
        return PieceFigures(
            sent_bytes=sent,
            received_bytes=self.received_bytes,
            again=self.again,
            sent_per_s=self._sending.per_s(sent),
            received_per_s=self._receiving.per_s(self.received_bytes),
            lies=self.trust.lies,
        )

    def trusted(self, blob: BlobId, node: NodeId) -> bool:
        return self.trust.of(blob, node)
