"""What this node gives others of blobs: whole ones, and the checked pieces of those it fetches.

Each question comes from a member of the cluster, over mutual TLS. So many pieces leave at
once, whoever got least is next, and all of it stays below a rate that may change at any
moment: answers to people come first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from anyio import CapacityLimiter, sleep

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import BlobNotFound, Conflict, DeadlineExceeded
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.exchange import (
    MAX_PEERS,
    HaveAnswer,
    HaveAsk,
    PieceAsk,
    PieceHead,
    Put,
    from_bytes,
    to_bytes,
)
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.pieces import Read, Table, make_table
from ollama_distributed.distribution.plan import MIN_PIECE_BYTES, RETRY_S, UPLOADS, Gifts, Slots, everything
from ollama_distributed.distribution.ports import Blobs
from ollama_distributed.models.names import BlobId

NEWS_WAIT_S = 2.0
"""A question after news is answered by then, if only with what is known."""
NEWS_S = 0.05
"""What arrives within this goes out in one answer."""
SLOT_WAIT_S = 2.0
"""Who waits longer for a turn is told to ask others first."""
CHUNK_BYTES = 256 * 1024
"""Written at once: TLS works on it for 0.2 ms."""
SEND_S = 20.0
"""Who takes no more of a piece for so long gives its turn to others."""
READ_BYTES = 4 * 1024 * 1024
FORGET_S = 20.0
"""When nobody asked for so long, the next who ask are a new swarm."""
MAX_SHELVES = 1024
TABLES = 2
"""Made at once: each has two pieces in memory meanwhile, and reads as fast as the disk does."""


class Shelf:
    """What is here of one blob."""

    def __init__(self, blob: BlobId, table: Table, read: Read, has: int, *, only_holder: bool) -> None:
        self.blob = blob
        self.table = table
        self.table_id = table.id()
        self.read = read
        self.has = has
        """Pieces that are here and have the right hash."""
        self.version = 0
        self.peers: dict[NodeId, None] = {}
        self._only_holder = only_holder
        self._gifts = self._new_gifts()
        self._asked_at = float("-inf")
        self._news = asyncio.Event()

    @property
    def whole(self) -> bool:
        return self.has == everything(self.table.pieces)

    def add(self, piece: int) -> None:
        self.has |= 1 << piece
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    def asked_within(self, now: float, length_s: float) -> bool:
        return now - self._asked_at <= length_s

    def gifts(self, now: float) -> Gifts:
        if now - self._asked_at > FORGET_S:
            self._gifts = self._new_gifts()
        self._asked_at = now
        return self._gifts

    async def news(self, seen: int) -> None:
        """Wait until there is more than in version `seen`, but not long."""
        if seen != self.version or self.whole:
            return
        try:
            async with asyncio.timeout(NEWS_WAIT_S):
                await self._news.wait()
        except TimeoutError:
            return
        await sleep(NEWS_S)

    def _new_gifts(self) -> Gifts:
        return Gifts(self.table.pieces, only_holder=self._only_holder)


class _Making:
    """A table on its way."""

    table: Table


class Shelves:
    """Use as a context. `rate`: bytes per second that may leave now; 0: no limit."""

    def __init__(
        self, blobs: Blobs, clock: Clock, *, rate: Callable[[], float] = lambda: 0.0, uploads: int = UPLOADS
    ) -> None:
        self._blobs = blobs
        self._clock = clock
        self._rate = rate
        self._pace = Pace(clock)
        self._slots = Slots(uploads)
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._shelves: dict[BlobId, Shelf] = {}
        self._making: Joints[_Making] = Joints()
        self._makers = asyncio.Semaphore(TABLES)
        self._threads = CapacityLimiter(2)
        self.sent_bytes = 0

    async def close(self) -> None:
        await self._making.close()

    # ── for fetches of this node ────────────────────────────────────────────────────

    def lay(self, blob: BlobId, table: Table, read: Read) -> Shelf:
        """Give on what is being fetched, as it comes."""
        shelf = Shelf(blob, table, read, 0, only_holder=False)
        self._keep(shelf)
        return shelf

    def giving(self) -> set[BlobId]:
        """Blobs that others fetch from here now."""
        now = self._clock.monotonic()
        return {blob for blob, shelf in self._shelves.items() if shelf.asked_within(now, FORGET_S)}

    def clear(self, blob: BlobId) -> None:
        """What is here of it is not to be given any more."""
        self._shelves.pop(blob, None)

    # ── questions of other nodes ────────────────────────────────────────────────────

    async def have(self, node: NodeId, ask: HaveAsk) -> HaveAnswer:
        """
        Raises:
            BlobNotFound: nothing of it is here.
        """
        shelf = await self._shelf(BlobId.parse(ask.blob))
        if ask.fetching:
            shelf.peers.pop(node, None)
            shelf.peers[node] = None
            if len(shelf.peers) > MAX_PEERS:
                del shelf.peers[next(iter(shelf.peers))]
        await shelf.news(ask.seen)
        return HaveAnswer(
            version=shelf.version,
            whole=shelf.whole,
            has=b"" if shelf.whole else to_bytes(shelf.has),
            table_id=shelf.table_id,
            table=shelf.table if ask.table else None,
            peers=tuple(shelf.peers),
        )

    async def piece(
        self, node: NodeId, ask: PieceAsk, tell: Callable[[PieceHead], Awaitable[None]], put: Put
    ) -> None:
        """Send one of the offered pieces: its head, then its bytes.

        Raises:
            BlobNotFound: nothing of it is here.
            Conflict: the asker's table is another one.
        """
        shelf = await self._shelf(BlobId.parse(ask.blob))
        if ask.table_id != shelf.table_id:
            raise Conflict("the tables of pieces differ; one of them is wrong")
        if not await self._turn(node):
            await tell(PieceHead(piece=-1, retry_s=RETRY_S))
            return
        sent, piece, gifts = 0, None, shelf.gifts(self._clock.monotonic())
        try:
            piece = gifts.choose(self._clock.monotonic(), node, from_bytes(ask.offered) & shelf.has)
            if piece is None:
                await tell(PieceHead(piece=-1, retry_s=RETRY_S))
                return
            offset, length = shelf.table.span(piece)
            data = await self._bytes(shelf, offset, min(length, READ_BYTES))
            await tell(PieceHead(piece=piece, length=length))
            while data:
                await self._send(data, put)
                sent += len(data)
                data = await self._bytes(shelf, offset + sent, min(length - sent, READ_BYTES))
        finally:
            if piece is not None and sent < shelf.table.span(piece)[1]:
                gifts.broken(piece, node)
            self._next(node, sent)

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _send(self, data: bytes, put: Put) -> None:
        view = memoryview(data)
        for at in range(0, len(data), CHUNK_BYTES):
            chunk = view[at : at + CHUNK_BYTES]
            self._pace.limit(self._rate())
            await self._pace.take(len(chunk))
            try:
                async with asyncio.timeout(SEND_S):
                    await put(chunk)
            except TimeoutError as late:
                raise DeadlineExceeded("the other node does not take its piece") from late
            self.sent_bytes += len(chunk)

    async def _bytes(self, shelf: Shelf, offset: int, length: int) -> bytes:
        """
        Raises:
            BlobNotFound: it is gone, or shorter than it was.
        """
        if not length:
            return b""
        try:
            data = await self._blobs.read_range(shelf.blob, offset, length)
        except BlobNotFound:
            try:
                data = await shelf.read(offset, length)
            except BlobNotFound:
                if self._shelves.get(shelf.blob) is shelf:
                    self.clear(shelf.blob)
                raise
        if len(data) != length:
            raise BlobNotFound(f'blob "{shelf.blob}" has become shorter')
        return data

    async def _turn(self, node: NodeId) -> bool:
        """False: it did not come in time."""
        ticket, now = self._slots.enter(node)
        if now:
            return True
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(SLOT_WAIT_S):
                await turn
        except BaseException as late:
            if turn.done() and not turn.cancelled():
                self._next(node, 0)  # it came in the same moment
            if not isinstance(late, TimeoutError):
                raise
            return False
        finally:
            del self._turns[ticket]
            self._slots.give_up(ticket)
        return True

    def _next(self, node: NodeId, sent: int) -> None:
        ticket = self._slots.leave(node, sent)
        if ticket is not None:
            turn = self._turns[ticket]
            if not turn.done():
                turn.set_result(None)

    async def _shelf(self, blob: BlobId) -> Shelf:
        shelf = self._shelves.get(blob)
        if shelf is not None:
            self._keep(shelf)
            return shelf
        size = await self._blobs.blob_size(blob)
        if size is None:
            raise BlobNotFound(f'blob "{blob}" not found')

        def read(offset: int, length: int) -> Awaitable[bytes]:
            return self._blobs.read_range(blob, offset, length)

        async def make(making: _Making) -> None:
            async with contextlib.AsyncExitStack() as stack:
                if size > MIN_PIECE_BYTES:
                    await stack.enter_async_context(self._makers)
                making.table = await make_table(size, read, self._threads)

        async with self._making.joined(blob, _Making, make) as joint:
            await joint.result()
        shelf = self._shelves.get(blob)
        if shelf is None:
            table = joint.told.table
            shelf = Shelf(blob, table, read, everything(table.pieces), only_holder=True)
        self._keep(shelf)
        return shelf

    def _keep(self, shelf: Shelf) -> None:
        self._shelves.pop(shelf.blob, None)
        self._shelves[shelf.blob] = shelf
        if len(self._shelves) > MAX_SHELVES:
            del self._shelves[next(iter(self._shelves))]
