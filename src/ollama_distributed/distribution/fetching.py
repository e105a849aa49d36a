"""One blob on its way here: asks nodes for pieces, checks each and writes it, from the first question to
the last piece.

What is here of an earlier fetch is checked again in the background.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.abc import TaskGroup

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    DigestMismatch,
    DiskFull,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.company import AWAY_S, NOT_YET_S, Company
from ollama_distributed.distribution.exchange import Exchange, PieceAsk, PieceHead, to_bytes
from ollama_distributed.distribution.pieces import Table
from ollama_distributed.distribution.plan import (
    FLIGHT_BYTES,
    MAX_FLIGHT,
    MIN_FLIGHT,
    RETRY_S,
    Draw,
    Offer,
    Wants,
    bits,
    span_of,
)
from ollama_distributed.distribution.ports import Partial
from ollama_distributed.distribution.shelves import Shelf, Shelves
from ollama_distributed.distribution.trust import Trust
from ollama_distributed.models.names import BlobId

STALL_S = 30.0
"""No piece came for so long and nothing is on its way: nobody has it."""
GIVE_UP_TIMES = 40
"""No piece came for so many times longer, whatever is promised: 20 minutes. The slowest link that is
worth it brings a piece in 15 (`adapters.peers.pieces.PIECE_S`)."""
LATE_S = 5.0
"""A piece that is on its way for longer than this, and four times as long as others took, is
asked of another node when nothing else is left to ask for, or nothing else may be."""
LATE_TIMES = 4.0
LEFT_ALONE_S = 20.0


class Told(Protocol):
    """What is known of a fetch from nodes."""

    def received(self, node: NodeId, count: int) -> None: ...

    def lied(self, node: NodeId) -> None: ...


class Counting(Told, Protocol):
    """The same, for who counts."""

    def again(self) -> None:
        """A piece that was on its way has to be asked for again."""
        ...


class _Sending:
    """A piece that is on its way here."""

    def __init__(self, began: float) -> None:
        self.scope = anyio.CancelScope()
        self.began = began
        self.granted = False
        """Its bytes come; before that it is only asked for."""
        self.retry_s = 0.0


class Fetching:
    """One fetch; `run` once."""

    def __init__(
        self,
        me: NodeId,
        blob: BlobId,
        into: Partial,
        told: Counting,
        *,
        exchange: Exchange,
        shelves: Shelves,
        trust: Trust,
        clock: Clock,
        draw: Draw,
        threads: CapacityLimiter,
        stall_s: float,
        came: Callable[[int], Awaitable[None]],
    ) -> None:
        """`came`: waits as long as so many bytes are to take."""
        self._blob = blob
        self._into = into
        self._told = told
        self._exchange = exchange
        self._shelves = shelves
        self._trust = trust
        self._clock = clock
        self._draw = draw
        self._threads = threads
        self._stall_s = stall_s
        self._came = came
        self._company = Company(
            me,
            blob,
            into.size,
            exchange=exchange,
            trust=trust,
            clock=clock,
            begin=self._begin,
            woken=self._stir,
        )
        self._failed: dict[NodeId, int] = {}
        """How often in a row a node failed."""
        self._table: Table
        self._shelf: Shelf
        self._wants: Wants | None = None
        self._checking = False
        self._sending: dict[Offer, _Sending] = {}
        self._piece_s = 0.0
        """How long a piece takes, on average."""
        self._wake = anyio.Event()
        self._moved_at = self._now()
        self._failure: OllamaDistributedError | None = None
        self._tasks: TaskGroup

    async def run(self, sources: Collection[NodeId]) -> None:
        """Raises as `Swarm.fetch`."""
        try:
            async with anyio.create_task_group() as self._tasks:
                self._company.meet(sources, self._tasks)
                while self._failure is None and not self._complete():
                    self._ask_all()
                    await self._woken()
                    self._check_progress()
                self._tasks.cancel_scope.cancel()
        finally:
            if self._wants is not None and not self._complete():
                self._shelves.clear(self._blob)  # its bytes cannot be read any more
        if self._failure is not None:
            raise self._failure

    def _now(self) -> float:
        return self._clock.monotonic()

    def _stir(self) -> None:
        self._wake.set()

    def _complete(self) -> bool:
        return self._wants is not None and self._wants.done and not self._checking

    def _ask_all(self) -> None:
        if self._wants is None:
            return
        while (offer := self._wants.next_offer(self._now())) is not None:
            self._sending[offer] = _Sending(self._now())
            self._tasks.start_soon(self._ask, offer, self._wants)
        self._hurry(self._wants)

    async def _woken(self) -> None:
        again = self._wants.retry_at(self._now()) if self._wants is not None else None
        wait_s = 1.0 if again is None else min(1.0, max(0.001, again - self._now()))
        with anyio.move_on_after(wait_s):
            await self._wake.wait()
        self._wake = anyio.Event()

    def _check_progress(self) -> None:
        quiet_s = self._now() - self._moved_at
        if not self._company.trusted:
            self._failure = RegistryError(
                f"every node that has blob {self._blob.digest[:19]} sends wrong bytes"
            )
        elif self._checking or quiet_s <= self._stall_s:
            return
        elif self._company.disagrees and not any(one.granted for one in self._sending.values()):
            self._failure = DigestMismatch(
                f"the table of blob {self._blob.digest[:19]} is another one than that of "
                f"{', '.join(sorted(self._company.disagrees))}, and nobody gives what is missing by it"
            )
        elif not self._sending or quiet_s > GIVE_UP_TIMES * self._stall_s:
            self._failure = Unavailable(
                f"no node that can be reached has what is missing of blob {self._blob.digest[:19]}"
            )

    # ── what is here already ────────────────────────────────────────────────────────

    def _begin(self, giver: NodeId, table: Table) -> Wants:
        self._table = table
        self._trust.goes_by(self._blob, giver)
        self._shelf = self._shelves.lay(self._blob, table, self._into.read)
        here, at = 0, 0
        for begin, end in (*self._into.missing(), (table.size, table.size)):
            here |= span_of(table.within(at, begin)) if at < begin else 0
            at = end
        flight = min(MAX_FLIGHT, max(MIN_FLIGHT, FLIGHT_BYTES // table.piece))
        wants = self._wants = Wants(table.pieces, here, self._draw, flight=flight)
        self._moved_at = self._now()
        if here:
            self._checking = True
            self._tasks.start_soon(self._check_again, wants, here)
        return wants

    async def _check_again(self, wants: Wants, here: int) -> None:
        """Of an earlier fetch: what is right can be given on, what is not must come again."""
        try:
            for piece in bits(here):
                data = await self._into.read(*self._table.span(piece))
                if await to_thread.run_sync(self._table.right, piece, (data,), limiter=self._threads):
                    self._shelf.add(piece)
                else:
                    wants.lost(piece)
                self._stir()
        except OllamaDistributedError as exc:
            self._failure = exc
        self._checking = False
        self._moved_at = self._now()
        self._stir()

    # ── pieces ──────────────────────────────────────────────────────────────────────

    async def _ask(self, offer: Offer, wants: Wants) -> None:
        """A task root: what goes wrong with one piece is settled here."""
        sending = self._sending[offer]
        again_s = 0.0
        try:
            with sending.scope:
                again_s = await self._bring(offer, sending, wants)
            if sending.scope.cancelled_caught:
                again_s = LEFT_ALONE_S
        except DigestMismatch as lie:
            self._trust.lied(self._blob, offer.node, lie.message)
            self._told.lied(offer.node)
            wants.drop(offer.node)
        except DiskFull as exc:
            self._failure = exc
        except OllamaDistributedError:
            failures = self._failed[offer.node] = self._failed.get(offer.node, 0) + 1
            again_s = min(AWAY_S, NOT_YET_S * 2.0 ** min(failures - 1, 8))
        finally:
            self._sending.pop(offer, None)
            if offer.pieces & ~wants.have:
                if sending.granted:
                    self._told.again()
                wants.failed(offer, self._now() + again_s)
            else:
                wants.arrived(offer)
            self._stir()

    async def _bring(self, offer: Offer, sending: _Sending, wants: Wants) -> float:
        """Returns in how many seconds the node may be asked again."""
        table, shelf = self._table, self._shelf
        ask = PieceAsk(blob=self._blob.digest, table_id=shelf.table_id, offered=to_bytes(offer.pieces))
        data = await self._exchange.piece(
            offer.node, ask, functools.partial(self._granted, offer, sending, wants)
        )
        if data is None:
            return sending.retry_s
        piece = next(bits(offer.pieces))
        if not await to_thread.run_sync(table.right, piece, data, limiter=self._threads):
            raise DigestMismatch(f"piece {piece} has another hash")
        offset, length = table.span(piece)
        await self._into.write(offset, *data)
        wants.have |= offer.pieces
        shelf.add(piece)
        self._failed.pop(offer.node, None)
        self._told.received(offer.node, length)
        now = self._now()
        self._moved_at = now
        took_s = now - sending.began
        self._piece_s = took_s if not self._piece_s else 0.9 * self._piece_s + 0.1 * took_s
        self._stir()
        await self._came(length)  # while it waits, its holder is asked for one piece less
        return 0.0

    def _granted(self, offer: Offer, sending: _Sending, wants: Wants, head: PieceHead) -> int:
        if head.piece < 0:
            sending.retry_s = min(max(head.retry_s, RETRY_S / 5), AWAY_S)
            return 0
        sending.began = self._now()
        sending.granted = True
        return self._table.span(head.piece)[1] if wants.granted(offer, head.piece) else -1

    def _hurry(self, wants: Wants) -> None:
        """Nothing more is to be asked for, or may be: what is late is asked of others."""
        if wants.unasked() and not wants.full:
            return
        late_s = max(LATE_S, LATE_TIMES * self._piece_s)
        for offer, sending in list(self._sending.items()):
            if self._now() - sending.began > late_s and wants.elsewhere(offer):
                sending.scope.cancel()
