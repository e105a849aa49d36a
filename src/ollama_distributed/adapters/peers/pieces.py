"""Pieces of blobs between nodes: both sides of the hop.

The answer to `pieces/get` is a head, as any result, and then frames whose first byte is 0 and
whose rest is the next bytes of the piece. A refusal in their place ends the piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.calls import Awaited, Sender
from ollama_distributed.adapters.peers.door import PeerDoor, Put
from ollama_distributed.adapters.peers.pool import PeerPool, message
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    DigestMismatch,
    ModelNotFound,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.refusal import Refusal, error_of
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.exchange import (
    CopyAsk,
    HaveAnswer,
    HaveAsk,
    ManifestAsk,
    PieceAsk,
    PieceHead,
    TransferAsk,
    TransferList,
)
from ollama_distributed.distribution.shelves import Shelves

HAVE, PIECE, MANIFEST = "pieces/have", "pieces/get", "models/manifest"
COPY, TRANSFERS = "models/copy", "models/transfers"

QUESTION_S = 10.0
HAVE_S = 600.0
"""The first question about a blob may wait until 500 GB are hashed; pings say it goes on."""
PIECE_S = 900.0
"""16 MiB at 150 kbit/s; who wants it from elsewhere does not wait so long."""
QUIET_S = 30.0
"""Not a byte of a piece came for so long, though its node lives: it is given up. A node that shares a
low rate among eight sends 256 KiB at a time."""
MAX_HEAD_BYTES = 64 * 1024
_LENGTH_BYTES = 4
_DATA = b"\0"
_END = wire.frame(_DATA)

Granted = Callable[[PieceHead], int]


class _Manifest(msgspec.Struct, frozen=True):
    data: bytes


class PieceCall(Awaited):
    """Implements `Call`. `done` is set when the piece is here, or there is none."""

    __slots__ = ("_granted", "_left", "_missing", "_small", "came", "piece")

    def __init__(self, sender: Sender, node: NodeId, asked: bytes, granted: Granted) -> None:
        super().__init__(sender, node, asked)
        self.piece: list[memoryview] | None = None
        """Its bytes as they came: nothing is copied."""
        self.came = 0
        """Of these; pings do not count."""
        self._granted = granted
        self._missing = 0
        self._small = bytearray()
        """Of a frame's beginning, or of one that is no data."""
        self._left = 0
        """Bytes of the data frame that is under way."""

    def heard(self, data: bytes) -> None:
        if self.done.done():
            self._drop()
            return
        view = memoryview(data)
        while len(view) and not self.done.done():
            if self._left:
                part = view[: self._left]
                self._take(part)
                self._left -= len(part)
                view = view[len(part) :]
            else:
                view = self._begin(view)

    def _begin(self, view: memoryview) -> memoryview:
        """Read the beginning of a data frame, or the whole of another. Returns the rest."""
        head = self._small
        view = self._fill(view, _LENGTH_BYTES)
        if len(head) < _LENGTH_BYTES:
            return view
        length = int.from_bytes(head[:_LENGTH_BYTES], "big")
        if not length:
            head.clear()  # a ping
            return view
        view = self._fill(view, _LENGTH_BYTES + 1)
        if head[_LENGTH_BYTES:] == _DATA:
            head.clear()
            self._left = length - 1
            if not self._left:
                self._last()
            return view
        if length > MAX_HEAD_BYTES:
            raise Unavailable(f"node {self.node} sends no pieces")
        view = self._fill(view, _LENGTH_BYTES + length)
        if len(head) == _LENGTH_BYTES + length:
            payload = bytes(head[_LENGTH_BYTES:])
            head.clear()
            self._told(payload)
        return view

    def _fill(self, view: memoryview, until: int) -> memoryview:
        count = max(0, until - len(self._small))
        self._small += view[:count]
        return view[count:]

    def _told(self, payload: bytes) -> None:
        reply = wire.decode_reply(payload)
        if isinstance(reply, Refusal):
            self._settle(error_of(reply))
            return
        if not isinstance(reply, wire.Result):
            raise Unavailable(f"node {self.node} sends no pieces")
        try:
            head = msgspec.msgpack.decode(reply.value, type=PieceHead)
        except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
            raise Unavailable(f"node {self.node} sends no pieces") from failure
        length = self._granted(head)
        if head.piece < 0:
            self._settle(None)
        elif length < 0 or length != head.length or self.piece is not None:
            self._refuse("it sends what was not asked for")
        else:
            self.piece = []
            self._missing = length

    def _take(self, part: memoryview) -> None:
        if self.piece is None or len(part) > self._missing:
            self._refuse("it sends more than a piece")
            return
        self.piece.append(part)
        self.came += len(part)
        self._missing -= len(part)

    def _last(self) -> None:
        if self.piece is not None and not self._missing:
            self._settle(None)
        else:
            self._refuse("it sends less than a piece")

    def _drop(self) -> None:
        """It goes on after its end: this connection is of no more use."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _refuse(self, what: str) -> None:
        error = DigestMismatch(what)
        self.cancel()
        self._settle(error)


class PieceExchange:
    """Implements `distribution.exchange.Exchange`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def have(self, node: NodeId, ask: HaveAsk) -> HaveAnswer:
        return await self._pool.ask(node, HAVE, ask, HaveAnswer, deadline_s=HAVE_S, fresh=False)

    async def piece(self, node: NodeId, ask: PieceAsk, granted: Granted) -> list[memoryview] | None:
        call = PieceCall(self._pool, node, message(PIECE, ask), granted)
        self._pool.send(call, node)
        try:
            async with asyncio.timeout(PIECE_S):
                while not call.done.done():
                    came = call.came
                    await asyncio.wait({call.done}, timeout=QUIET_S)
                    if call.came == came and not call.done.done():
                        raise DeadlineExceeded(f"node {node} sent nothing of a piece for {QUIET_S:g} s")
        except TimeoutError as late:
            raise DeadlineExceeded(f"node {node} did not send a piece within {PIECE_S:g} s") from late
        finally:
            call.cancel()
            if not call.done.cancel():
                call.done.exception()  # looked at, also where a cancelled wait is what is raised
        call.done.result()
        return call.piece

    async def manifest(self, node: NodeId, name: str) -> bytes:
        ask = ManifestAsk(name=name)
        return (await self._pool.ask(node, MANIFEST, ask, _Manifest, deadline_s=QUESTION_S, fresh=False)).data

    async def copy(self, node: NodeId, ask: CopyAsk) -> Transfer:
        return await self._pool.ask(node, COPY, ask, Transfer, deadline_s=QUESTION_S)

    async def transfers(self, node: NodeId, ask: TransferAsk) -> tuple[Transfer, ...]:
        answer = await self._pool.ask(node, TRANSFERS, ask, TransferList, deadline_s=2.0, fresh=False)
        return answer.transfers


class Here(Protocol):
    """What others may ask of this node (`distribution.service.ModelTransfer`)."""

    async def manifest_here(self, name: str) -> bytes | None: ...

    async def copy_here(self, ask: CopyAsk) -> Transfer: ...

    def asked(self, ask: TransferAsk) -> tuple[Transfer, ...]: ...


def open_door(
    door: PeerDoor, shelves: Shelves, here: Here, served: Callable[[str], None] = lambda _: None
) -> None:
    """Answer other nodes' questions about pieces and models. `served`: hears which model another
    node begins to fetch."""

    async def have(peer: Peer, ask: HaveAsk) -> HaveAnswer:
        return await shelves.have(peer.node, ask)

    async def piece(peer: Peer, ask: PieceAsk, put: Put) -> bytes:
        last = _END

        async def tell(head: PieceHead) -> None:
            nonlocal last
            frame = wire.reply_frame(wire.Result(msgspec.Raw(wire.encode(head))))
            if head.piece < 0:
                last = frame
            else:
                await put(frame)

        async def send(data: bytes | memoryview) -> None:
            await put(b"".join(((len(data) + 1).to_bytes(_LENGTH_BYTES, "big"), _DATA, data)))

        await shelves.piece(peer.node, ask, tell, send)
        return last

    async def manifest(_peer: Peer, ask: ManifestAsk) -> _Manifest:
        data = await here.manifest_here(ask.name)
        if data is None:
            raise ModelNotFound(f"model '{ask.name}' not found")
        served(ask.name)
        return _Manifest(data)

    async def copy(_peer: Peer, ask: CopyAsk) -> Transfer:
        return await here.copy_here(ask)

    async def transfers(_peer: Peer, ask: TransferAsk) -> TransferList:
        return TransferList(transfers=here.asked(ask))

    door.add(HAVE, have, HaveAsk)
    door.add_stream(PIECE, piece, PieceAsk)
    door.add(MANIFEST, manifest, ManifestAsk)
    door.add(COPY, copy, CopyAsk)
    door.add(TRANSFERS, transfers, TransferAsk)
