"""Nodes that give each other pieces, in virtual time: real `Swarm` and `Shelves`; links, disks and
misbehaviour of numbers.

world = World(seed=3)
world.node("a", holds=True)
world.node("b", faults="hangs", holds=True)
virtual_time.run(lambda: world.node("c").fetch("a", "b"))
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast
from unittest import mock

from ollama_distributed.adapters.peers.pieces import QUIET_S
from ollama_distributed.base.errors import BlobNotFound, DeadlineExceeded, DigestMismatch, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution import fetching, pieces
from ollama_distributed.distribution.exchange import (
    Exchange,
    HaveAnswer,
    HaveAsk,
    PieceAsk,
    PieceHead,
    from_bytes,
)
from ollama_distributed.distribution.pieces import Table
from ollama_distributed.distribution.plan import MIB, bits, everything, piece_bytes
from ollama_distributed.distribution.ports import Blobs, Partial
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.names import BlobId
from ollama_distributed.testing.virtual_time import VirtualClock

T = TypeVar("T")

Fault = Literal[
    "none",
    "away",
    "silent",
    "hangs",
    "closes",
    "wrong bytes",
    "other piece",
    "too long",
    "forgets",
    "boasts",
    "wrong table",
    "wrong table, gives nothing",
    "slow",
    "chatty",
    "names strangers",
]
LIES: frozenset[Fault] = frozenset({"wrong bytes", "other piece", "too long"})
"""Found out as soon as a piece comes."""
LINK_BYTES_S = 10.0 * MIB
SILENT_S = 5.0
"""After which the hop cuts a connection that says nothing."""


class _Inline:
    """`anyio.to_thread` without threads."""

    @staticmethod
    async def run_sync(work: Callable[..., T], *args: Any, limiter: object = None) -> T:
        return work(*args)


@contextmanager
def without_threads() -> Iterator[None]:
    with mock.patch.object(fetching, "to_thread", _Inline), mock.patch.object(pieces, "to_thread", _Inline):
        yield


class Clock(VirtualClock):
    """Worlds are made before their loop."""

    def monotonic(self) -> float:
        try:
            return super().monotonic()
        except RuntimeError:
            return 0.0


class Disk:
    """Implements `ports.Blobs` as far as giving goes."""

    def __init__(self) -> None:
        self.blobs: dict[BlobId, bytes] = {}

    async def blob_size(self, blob: BlobId) -> int | None:
        return len(self.blobs[blob]) if blob in self.blobs else None

    async def read_range(self, blob: BlobId, offset: int, length: int) -> bytes:
        if blob not in self.blobs:
            raise BlobNotFound("gone")
        return self.blobs[blob][offset : offset + length]


class Half:
    """Implements `ports.Partial`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray(size)
        self.runs: list[tuple[int, int]] = []
        self.twice = 0
        """Bytes that were written again."""

    @property
    def here(self) -> int:
        return sum(end - begin for begin, end in self.runs)

    @property
    def resumed(self) -> bool:
        return False

    def missing(self) -> list[tuple[int, int]]:
        gaps, at = [], 0
        for begin, end in sorted(self.runs):
            if at < begin:
                gaps.append((at, begin))
            at = max(at, end)
        return [*gaps, (at, self.size)] if at < self.size else gaps

    async def write(self, offset: int, *data: bytes | memoryview) -> None:
        whole = b"".join(data)
        run = (offset, offset + len(whole))
        if run in self.runs:
            self.twice += len(whole)
        else:
            self.runs.append(run)
        self.data[offset : offset + len(whole)] = whole

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])


def table_of(content: bytes) -> Table:
    piece = piece_bytes(len(content))
    parts = (content[at : at + piece] for at in range(0, len(content), piece))
    return Table(len(content), piece, b"".join(hashlib.sha256(part).digest() for part in parts))


class Heard:
    """Implements `fetching.Told`."""

    def __init__(self) -> None:
        self.bytes: dict[NodeId, int] = {}
        self.liars: set[NodeId] = set()

    def received(self, node: NodeId, count: int) -> None:
        self.bytes[node] = self.bytes.get(node, 0) + count

    def lied(self, node: NodeId) -> None:
        self.liars.add(node)


class World:
    def __init__(self, *, size: int = 24 * MIB + 5, seed: int = 1) -> None:
        self.chance = random.Random(seed)
        self.content = self.chance.randbytes(size)
        self.blob = BlobId(hashlib.sha256(self.content).hexdigest())
        self.table = table_of(self.content)
        self.nodes: dict[NodeId, Node] = {}

    @functools.cached_property
    def wrong_table(self) -> Table:
        return table_of(bytes(len(self.content)))

    def node(self, name: str, *, holds: bool = False, fault: Fault = "none") -> Node:
        node = self.nodes[NodeId(name)] = Node(self, NodeId(name), fault)
        if holds:
            node.disk.blobs[self.blob] = self.content
        return node


class Node:
    """`rate`, `coming`: bytes per second that leave, that come; 0: as the link does."""

    def __init__(self, world: World, name: NodeId, fault: Fault) -> None:
        self.world = world
        self.id = name
        self.fault: Fault = fault
        self.disk = Disk()
        self.rate = self.coming = 0.0
        self.clock = Clock()
        self.shelves = Shelves(cast(Blobs, self.disk), self.clock, rate=lambda: self.rate)
        self.asked: dict[str, int] = {"have": 0, "piece": 0}
        self.heard = Heard()
        self.half: Half | None = None
        exchange = cast(Exchange, FakeExchange(self))
        self.swarm = Swarm(
            name, exchange, self.shelves, self.clock, world.chance.randrange, rate=lambda: self.coming
        )
        self._link_free_at = 0.0

    async def fetch(self, *sources: str, blob: BlobId | None = None) -> Half:
        blob = blob or self.world.blob
        self.half = half = self.half or Half(len(self.world.content))
        await self.swarm.fetch(blob, cast(Partial, half), [NodeId(name) for name in sources], self.heard)
        return half

    # ── its link ────────────────────────────────────────────────────────────────────

    async def leave(self, count: int) -> None:
        """So many bytes leave, after those before them."""
        per_s = LINK_BYTES_S / (100 if self.fault == "slow" else 1)
        now = self.clock.monotonic()
        self._link_free_at = max(self._link_free_at, now) + count / per_s
        await asyncio.sleep(self._link_free_at - now)

    # ── what others ask ─────────────────────────────────────────────────────────────

    async def have(self, asker: NodeId, ask: HaveAsk) -> HaveAnswer:
        self.asked["have"] += 1
        await self._there()
        if self.fault == "chatty":
            ask = HaveAsk(blob=ask.blob, seen=-1, table=ask.table)
        answer = await self.shelves.have(asker, ask)
        if self.fault == "names strangers":
            answer = _changed(answer, peers=tuple(NodeId(f"x{number}") for number in range(1000)))
        if self.fault == "boasts":
            answer = _changed(answer, whole=True, has=b"")
        if self.fault.startswith("wrong table"):
            table = self.world.wrong_table
            answer = _changed(answer, table=table, table_id=table.id())
        return answer

    async def piece(
        self,
        asker: NodeId,
        ask: PieceAsk,
        tell: Callable[[PieceHead], Awaitable[None]],
        put: Callable[[bytes | memoryview], Awaitable[None]],
    ) -> None:
        self.asked["piece"] += 1
        await self._there()
        first = next(bits(from_bytes(ask.offered)))
        match self.fault:
            case "boasts" | "wrong table, gives nothing":
                await tell(PieceHead(piece=-1))
            case "forgets":
                raise BlobNotFound("it is not here")
            case "other piece":
                others = bits(everything(self.world.table.pieces) & ~from_bytes(ask.offered))
                await tell(PieceHead(piece=next(others, first + 99), length=MIB))
            case "too long":
                await tell(PieceHead(piece=first, length=3 * MIB))
            case "hangs":
                await tell(PieceHead(piece=first, length=self.world.table.span(first)[1]))
                await put(bytes(1000))
                await asyncio.sleep(QUIET_S)
                raise DeadlineExceeded("nothing came")
            case "closes":
                await tell(PieceHead(piece=first, length=self.world.table.span(first)[1]))
                await put(bytes(1000))
                raise Unavailable("closed")
            case "wrong bytes" | "wrong table":
                length = self.world.table.span(first)[1]
                await tell(PieceHead(piece=first, length=length))
                await put(bytes(length))
            case _:
                await self.shelves.piece(asker, ask, tell, put)

    async def _there(self) -> None:
        if self.fault == "away":
            await asyncio.sleep(0.001)
            raise Unavailable("it is not there")
        if self.fault == "silent":
            await asyncio.sleep(SILENT_S)
            raise Unavailable("it said nothing")


def _changed(answer: HaveAnswer, **changes: Any) -> HaveAnswer:
    return HaveAnswer(**{**{name: getattr(answer, name) for name in answer.__struct_fields__}, **changes})


class FakeExchange:
    """What `adapters.peers.pieces.PieceExchange` does, over links of numbers."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def have(self, node: NodeId, ask: HaveAsk) -> HaveAnswer:
        await asyncio.sleep(0.001)
        return await self._other(node).have(self._node.id, ask)

    async def piece(
        self, node: NodeId, ask: PieceAsk, granted: Callable[[PieceHead], int]
    ) -> list[memoryview] | None:
        other, missing = self._other(node), -1
        parts: list[memoryview] = []

        async def tell(head: PieceHead) -> None:
            nonlocal missing
            length = granted(head)
            if head.piece >= 0:
                if length < 0 or length != head.length:
                    raise DigestMismatch("it sends what was not asked for")
                missing = length

        async def put(data: bytes | memoryview) -> None:
            nonlocal missing
            await other.leave(len(data))
            parts.append(memoryview(bytes(data)))
            missing -= len(data)

        await asyncio.sleep(0.001)
        await other.piece(self._node.id, ask, tell, put)
        return None if missing < 0 else parts

    def _other(self, node: NodeId) -> Node:
        if node not in self._node.world.nodes:
            raise Unavailable("there is no such node")
        return self._node.world.nodes[node]
