"""Brings a blob from all nodes that have something of it, and gives on what has come.

Pieces are checked by their hash as they arrive and written at once, so that a crash costs
those on their way. A node that sends wrong bytes is asked no more; a node that is slow or gone
is left for others. What is here of an earlier fetch is checked again in the background.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Protocol

import anyio
import structlog
from anyio import CapacityLimiter, to_thread
from anyio.abc import TaskGroup

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    DigestMismatch,
    NotFound,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.exchange import (
    MAX_PEERS,
    Exchange,
    HaveAnswer,
    HaveAsk,
    PieceAsk,
    PieceHead,
    from_bytes,
    to_bytes,
)
from ollama_distributed.distribution.pieces import Table
from ollama_distributed.distribution.plan import (
    FLIGHT_BYTES,
    MAX_FLIGHT,
    MIN_FLIGHT,
    Draw,
    Offer,
    Wants,
    bits,
    set_of,
)
from ollama_distributed.distribution.ports import Partial
from ollama_distributed.distribution.shelves import Shelf, Shelves
from ollama_distributed.models.names import BlobId

log = structlog.get_logger()

PEER_LIED = "distribution.peer_lied"

NOT_YET_S = 0.5
"""A node that has nothing of the blob yet is asked again after this, at first."""
AWAY_S = 5.0
"""The longest wait until a node that was away is asked again; waits double up to it."""
WHOLE_S = 5.0
"""A node that has it all is asked so often whether that is still so."""
STALL_S = 30.0
"""No piece came for so long and nothing is on its way: nobody has it."""
LATE_S = 5.0
"""A piece that is on its way for longer than this, and four times as long as others took, is
asked of another node when nothing else is left to ask for."""
LATE_TIMES = 4.0
LEFT_ALONE_S = 20.0
HASH_THREADS = 4


class Told(Protocol):
    """What is known of a fetch from nodes."""

    def received(self, node: NodeId, count: int) -> None: ...

    def lied(self, node: NodeId) -> None: ...


class _Nobody:
    def received(self, node: NodeId, count: int) -> None: ...

    def lied(self, node: NodeId) -> None: ...


class Swarm:
    """The fetching side; `shelves` is the giving one."""

    def __init__(
        self,
        me: NodeId,
        exchange: Exchange,
        shelves: Shelves,
        clock: Clock,
        draw: Draw,
        *,
        stall_s: float = STALL_S,
    ) -> None:
        self.me = me
        self.exchange = exchange
        self.shelves = shelves
        self.clock = clock
        self.draw = draw
        self.stall_s = stall_s
        self.threads = CapacityLimiter(HASH_THREADS)
        self._liars: dict[tuple[BlobId, NodeId], None] = {}
        self._givers: dict[BlobId, NodeId] = {}
        """Whose tables the fetches of now go by."""

    async def fetch(
        self, blob: BlobId, into: Partial, sources: Collection[NodeId], told: Told | None = None
    ) -> None:
        """Bring what is missing. The digest of the whole is not checked here.

        Raises:
            Unavailable: nobody who can be reached has it.
            RegistryError: all who have it sent wrong bytes.
            DiskFull: there is no room for the rest.
        """
        await _Fetching(self, blob, into, sources, told or _Nobody()).run()

    def disproved(self, blob: BlobId) -> NodeId | None:
        """What was fetched is not this blob though each piece was right: the table was wrong.
        Returns whose it was; that node is not asked for this blob again."""
        self.shelves.clear(blob)
        giver = self._givers.pop(blob, None)
        if giver is not None:
            self.lied(blob, giver, "its table of pieces is of another blob")
        return giver

    def lied(self, blob: BlobId, node: NodeId, what: str) -> None:
        self._liars[blob, node] = None
        if len(self._liars) > 4096:
            del self._liars[next(iter(self._liars))]
        log.warning(PEER_LIED, node=node, blob=blob.digest, what=what)

    def trusted(self, blob: BlobId, node: NodeId) -> bool:
        return (blob, node) not in self._liars

    def goes_by(self, blob: BlobId, giver: NodeId) -> None:
        self._givers[blob] = giver


class _Sending:
    """A piece that is on its way here."""

    def __init__(self, scope: anyio.CancelScope, began: float) -> None:
        self.scope = scope
        self.began = began
        self.retry_s = 0.0


class _Fetching:
    """One blob, from the first question to the last piece."""

    def __init__(
        self, swarm: Swarm, blob: BlobId, into: Partial, sources: Collection[NodeId], told: Told
    ) -> None:
        self._swarm = swarm
        self._blob = blob
        self._into = into
        self._sources = sources
        self._told = told
        self._met: set[NodeId] = set()
        self._away: dict[NodeId, int] = {}
        """How often in a row a node failed."""
        self._table: Table | None = None
        self._shelf: Shelf | None = None
        self._wants: Wants | None = None
        self._checking = False
        self._sending: dict[Offer, _Sending] = {}
        self._piece_s = 0.0
        """How long a piece takes, on average."""
        self._wake = anyio.Event()
        self._moved_at = self._now()
        self._failure: OllamaDistributedError | None = None
        self._tasks: TaskGroup

    def _now(self) -> float:
        return self._swarm.clock.monotonic()

    async def run(self) -> None:
        async with anyio.create_task_group() as self._tasks:
            self._meet(self._sources)
            while self._failure is None and not self._complete():
                self._ask_all()
                await self._woken()
                self._check_progress()
            self._tasks.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _complete(self) -> bool:
        return self._wants is not None and self._wants.done and not self._checking

    def _ask_all(self) -> None:
        if self._wants is None:
            return
        while (offer := self._wants.next_offer(self._now())) is not None:
            self._sending[offer] = _Sending(anyio.CancelScope(), self._now())
            self._tasks.start_soon(self._ask, offer)
        self._hurry()

    async def _woken(self) -> None:
        again = self._wants.retry_at(self._now()) if self._wants is not None else None
        wait_s = 1.0 if again is None else min(1.0, max(0.001, again - self._now()))
        with anyio.move_on_after(wait_s):
            await self._wake.wait()
        self._wake = anyio.Event()

    def _check_progress(self) -> None:
        quiet_s = self._now() - self._moved_at
        if not any(self._swarm.trusted(self._blob, node) for node in self._met):
            self._failure = RegistryError(
                f"every node that has blob {self._blob.digest[:19]} sends wrong bytes"
            )
        elif quiet_s > self._swarm.stall_s and not self._sending and not self._checking:
            self._failure = Unavailable(
                f"no node that can be reached has what is missing of blob {self._blob.digest[:19]}"
            )

    # ── who has what ────────────────────────────────────────────────────────────────

    def _meet(self, nodes: Iterable[NodeId]) -> None:
        for node in nodes:
            if node != self._swarm.me and node not in self._met and len(self._met) < MAX_PEERS:
                self._met.add(node)
                if self._swarm.trusted(self._blob, node):
                    self._tasks.start_soon(self._follow, node)
        if self._wants is not None:
            self._wants.company = len(self._met)

    async def _follow(self, node: NodeId) -> None:
        """Keep up with what a node has of the blob."""
        seen, wait_s = -1, NOT_YET_S
        while self._swarm.trusted(self._blob, node):
            ask = HaveAsk(blob=self._blob.digest, seen=seen, table=self._table is None)
            try:
                answer = await self._swarm.exchange.have(node, ask)
            except OllamaDistributedError as exc:
                seen = -1
                if self._wants is not None and not isinstance(exc, NotFound):
                    self._wants.drop(node)
                await anyio.sleep(wait_s)
                wait_s = min(AWAY_S, 2 * wait_s)
                continue
            wait_s = NOT_YET_S
            if self._fits(node, answer):
                assert self._wants is not None
                self._wants.heard(node, from_bytes(answer.has), whole=answer.whole)
                seen = answer.version
                self._wake.set()
                self._meet(answer.peers)
                if answer.whole:
                    await anyio.sleep(WHOLE_S)
            else:
                await anyio.sleep(AWAY_S)

    def _fits(self, node: NodeId, answer: HaveAnswer) -> bool:
        """The first table is the one to go by."""
        table = answer.table
        if self._table is None:
            if table is None or not table.sound or table.size != self._into.size:
                return False
            if table.id() != answer.table_id:
                return False
            self._begin(node, table)
        assert self._shelf is not None
        return answer.table_id == self._shelf.table_id

    def _begin(self, giver: NodeId, table: Table) -> None:
        self._table = table
        self._swarm.goes_by(self._blob, giver)
        self._shelf = self._swarm.shelves.lay(self._blob, table, self._into.read)
        here, at = 0, 0
        for begin, end in (*self._into.missing(), (table.size, table.size)):
            here |= set_of(table.within(at, begin)) if at < begin else 0
            at = end
        flight = min(MAX_FLIGHT, max(MIN_FLIGHT, FLIGHT_BYTES // table.piece))
        self._wants = Wants(table.pieces, here, self._swarm.draw, flight=flight)
        self._wants.company = len(self._met)
        self._moved_at = self._now()
        if here:
            self._checking = True
            self._tasks.start_soon(self._check_again, table, self._shelf, self._wants, here)

    async def _check_again(self, table: Table, shelf: Shelf, wants: Wants, here: int) -> None:
        """Of an earlier fetch: what is right can be given on, what is not must come again."""
        for piece in bits(here):
            offset, length = table.span(piece)
            data = await self._into.read(offset, length)
            if await to_thread.run_sync(table.right, piece, (data,), limiter=self._swarm.threads):
                shelf.add(piece)
            else:
                wants.lost(piece)
            self._wake.set()
        self._checking = False
        self._wake.set()

    # ── pieces ──────────────────────────────────────────────────────────────────────

    async def _ask(self, offer: Offer) -> None:
        """A task root: what goes wrong with one piece is settled here."""
        sending, wants = self._sending[offer], self._wants
        assert wants is not None
        again_s = 0.0
        try:
            with sending.scope:
                again_s = await self._bring(offer, sending)
            if sending.scope.cancelled_caught:
                again_s = LEFT_ALONE_S
        except DigestMismatch as lie:
            self._swarm.lied(self._blob, offer.node, lie.message)
            self._told.lied(offer.node)
            wants.drop(offer.node)
        except OllamaDistributedError as exc:
            if exc.code == "disk_full":
                self._failure = exc
            failures = self._away[offer.node] = self._away.get(offer.node, 0) + 1
            again_s = min(AWAY_S, NOT_YET_S * 2.0 ** min(failures - 1, 8))
        finally:
            self._sending.pop(offer, None)
            if offer.pieces & ~wants.have:
                wants.failed(offer, self._now() + again_s)
            else:
                wants.arrived(offer)
            self._wake.set()

    async def _bring(self, offer: Offer, sending: _Sending) -> float:
        """Returns in how many seconds the node may be asked again."""
        table, shelf, wants = self._table, self._shelf, self._wants
        assert table is not None
        assert shelf is not None
        assert wants is not None
        ask = PieceAsk(blob=self._blob.digest, table_id=shelf.table_id, offered=to_bytes(offer.pieces))
        data = await self._swarm.exchange.piece(
            offer.node, ask, functools.partial(self._granted, offer, sending, table, wants)
        )
        if data is None:
            return sending.retry_s
        piece = next(bits(offer.pieces))
        if not await to_thread.run_sync(table.right, piece, data, limiter=self._swarm.threads):
            raise DigestMismatch(f"piece {piece} has another hash")
        offset, length = table.span(piece)
        await self._into.write(offset, *data)
        wants.have |= offer.pieces
        shelf.add(piece)
        self._away.pop(offer.node, None)
        self._told.received(offer.node, length)
        now = self._now()
        self._moved_at = now
        took_s = now - sending.began
        self._piece_s = took_s if not self._piece_s else 0.9 * self._piece_s + 0.1 * took_s
        return 0.0

    def _granted(self, offer: Offer, sending: _Sending, table: Table, wants: Wants, head: PieceHead) -> int:
        if head.piece < 0:
            sending.retry_s = min(max(head.retry_s, 0.01), AWAY_S)
            return 0
        sending.began = self._now()
        return table.span(head.piece)[1] if wants.granted(offer, head.piece) else -1

    def _hurry(self) -> None:
        """Nothing is left to ask for but what is on its way: what is late is asked of others."""
        wants = self._wants
        if wants is None or not self._sending or wants.unasked():
            return
        late_s = max(LATE_S, LATE_TIMES * self._piece_s)
        for offer, sending in list(self._sending.items()):
            if self._now() - sending.began > late_s and wants.elsewhere(offer):
                sending.scope.cancel()
