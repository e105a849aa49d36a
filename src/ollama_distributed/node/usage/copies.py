"""Copies of ledgers: of this node's at servers, and of other nodes' here.

Rows are sent as they are, not as they grew: sent twice, they are as sent once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.access.usage import Book
from ollama_distributed.adapters.ledger.files import Copies
from ollama_distributed.adapters.peers.usage import KeepAsk, Kept
from ollama_distributed.base.errors import DiskFull, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.usage import Doubt
from ollama_distributed.node.usage.ledger import Ledger
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger("usage.copies")

NOT_KEPT, NOT_WRITTEN, UNREADABLE = "usage.not_kept", "usage.copy_not_written", "usage.copy_unreadable"
KEEPERS = 3
HOURS_S, DAYS_S = 31 * 86400.0, 400 * 86400.0
"""Of copies; as the settings' defaults."""


class Exchange(Protocol):
    """`adapters.peers.usage.UsageExchange`."""

    async def keep(self, node: NodeId, ask: KeepAsk) -> Kept: ...


class Copy(msgspec.Struct):
    """Of another node's ledger."""

    name: str
    book: Book
    doubts: tuple[Doubt, ...] = ()
    dirty: bool = False


class KeptCopies:
    """`name`: of this node, that people see."""

    def __init__(
        self,
        folder: Path,
        me: NodeId,
        name: str,
        ledger: Ledger,
        exchange: Exchange,
        state: Callable[[], ClusterState],
        wall: Callable[[], float],
    ) -> None:
        self._files = Copies(folder)
        self._me = me
        self._name = name
        self._ledger = ledger
        self._exchange = exchange
        self._state = state
        self._wall = wall
        self._copies: dict[str, Copy] = {}
        self._kept_by: dict[NodeId, int] = {}
        """Keeper -> the batch up to which it has this node's."""

    def __len__(self) -> int:
        return len(self._copies)

    def __iter__(self) -> Iterator[tuple[str, Copy]]:
        return iter(tuple(self._copies.items()))

    async def open(self) -> None:
        for data in await asyncio.to_thread(self._files.read):
            try:
                kept = msgspec.msgpack.decode(data, type=KeepAsk)
            except msgspec.MsgspecError as damaged:
                log.warning(UNREADABLE, reason=str(damaged))
                continue
            self.keep(kept)
            self._copies[kept.ledger].dirty = False

    def keep(self, ask: KeepAsk) -> Kept:
        """Keep a copy of another node's ledger, as far as what is sent follows on what is here."""
        copy = self._copies.get(ask.ledger)
        if copy is None:
            copy = self._copies[ask.ledger] = Copy(name=ask.name, book=Book())
        if ask.since <= copy.book.batch < ask.batch:
            copy.book.replace(ask.batch, ask.rows)
            copy.dirty = True
        if (ask.name, ask.doubts) != (copy.name, copy.doubts):
            copy.name, copy.doubts, copy.dirty = ask.name, ask.doubts, True
        return Kept(batch=copy.book.batch)

    async def send(self) -> None:
        """Have keepers take what changed since they did last."""
        batch = self._ledger.book.batch
        for node in self._keepers():
            if self._kept_by.get(node) == batch:
                continue
            try:
                since = self._kept_by.get(node)
                if since is None:  # it may have a copy from before this start
                    since = (await self._exchange.keep(node, self._ask(batch, batch))).batch
                kept = await self._exchange.keep(node, self._ask(min(since, batch), batch))
            except OllamaDistributedError as away:
                log.debug(NOT_KEPT, node=node, reason=away.message)
                self._kept_by.pop(node, None)
                continue
            self._kept_by[node] = kept.batch

    def _ask(self, since: int, batch: int) -> KeepAsk:
        ledger = self._ledger
        rows = ledger.book.since(since) if since < batch else ()
        return KeepAsk(
            ledger=ledger.id, name=self._name, since=since, batch=batch, rows=rows, doubts=ledger.doubts
        )

    def _keepers(self) -> list[NodeId]:
        state = self._state()
        servers = [node for node in state.servers if node != self._me and state.nodes[node].alive]
        return sorted(servers, key=lambda node: _rank(self._ledger.id, node))[:KEEPERS]

    async def save(self) -> None:
        """Write down those that changed."""
        for ledger, copy in self:
            if not copy.dirty:
                continue
            copy.dirty = False
            now = self._wall()
            copy.book.fold(now - HOURS_S, now - DAYS_S)
            whole = KeepAsk(
                ledger=ledger,
                name=copy.name,
                since=0,
                batch=copy.book.batch,
                rows=copy.book.since(-1),
                doubts=copy.doubts,
            )
            data = msgspec.msgpack.encode(whole)
            try:
                await asyncio.to_thread(self._files.write, ledger, data)
            except DiskFull as full:
                copy.dirty = True
                log.warning(NOT_WRITTEN, reason=full.message)
                return


def _rank(ledger: str, node: NodeId) -> bytes:
    """Rendezvous hashing: keepers stay the same when others come and go."""
    return hashlib.blake2b(f"{ledger}/{node}".encode(), digest_size=8).digest()
