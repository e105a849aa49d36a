"""Any node's files and batches, asked at any node: the id says whose they are.

A batch belongs to the node that has its input file. Nothing of it is in the replicated state: while
its node is away it can be neither read nor changed, and the answer says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from ollama_distributed.base.batches import Batch, BatchAsk, BatchList, FileDeleted, FileList, FileObject
from ollama_distributed.base.errors import DeadlineExceeded, NotFound, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.batches.files import MOST_READ_BYTES, Files
from ollama_distributed.batches.plan import check_ask, owner_of
from ollama_distributed.batches.records import Asked, CreateAsked, ListAsked, ReadAsked
from ollama_distributed.batches.service import Batches
from ollama_distributed.state.cluster import ClusterState

AT_ONCE = 32
"""Nodes that are asked for a list at the same time."""

T = TypeVar("T")


class Others(Protocol):
    """The way to other nodes. Each may raise `Unavailable` and `DeadlineExceeded`."""

    async def file(self, node: NodeId, asked: Asked) -> FileObject: ...

    async def files(self, node: NodeId, asked: ListAsked) -> tuple[FileObject, ...]: ...

    async def read(self, node: NodeId, asked: ReadAsked) -> bytes: ...

    async def delete_file(self, node: NodeId, asked: Asked) -> FileDeleted: ...

    async def create(self, node: NodeId, asked: CreateAsked) -> Batch: ...

    async def batch(self, node: NodeId, asked: Asked) -> Batch: ...

    async def batches(self, node: NodeId, asked: ListAsked) -> tuple[Batch, ...]: ...

    async def cancel(self, node: NodeId, asked: Asked) -> Batch: ...


class ClusterBatches:
    def __init__(
        self, me: NodeId, files: Files, batches: Batches, others: Others, state: Callable[[], ClusterState]
    ) -> None:
        self._me = me
        self._files = files
        self._batches = batches
        self._others = others
        self._state = state

    @property
    def file_bytes(self) -> int:
        return self._files.file_bytes

    # ── files ───────────────────────────────────────────────────────────────────────

    async def upload(
        self,
        identity: Identity,
        filename: str,
        chunks: AsyncIterator[bytes],
        *,
        expires_after_s: int | None = None,
    ) -> FileObject:
        """Kept on this node."""
        return await self._files.receive(
            owner_of(identity), filename, chunks, expires_after_s=expires_after_s
        )

    async def file(self, identity: Identity, file_id: str) -> FileObject:
        node, asked = self._of_file(file_id), Asked(identity=identity, id=file_id)
        if node == self._me:
            return self._files.get(asked)
        return await self._at(node, file_id, self._others.file(node, asked))

    async def content(self, identity: Identity, file_id: str) -> tuple[FileObject, AsyncIterator[bytes]]:
        return await self.file(identity, file_id), self._pieces(identity, file_id)

    async def _pieces(self, identity: Identity, file_id: str) -> AsyncIterator[bytes]:
        node, offset = self._of_file(file_id), 0
        while True:
            asked = ReadAsked(identity=identity, id=file_id, offset=offset, length=MOST_READ_BYTES)
            if node == self._me:
                piece = await self._files.read(asked)
            else:
                piece = await self._at(node, file_id, self._others.read(node, asked))
            if not piece:
                return
            yield piece
            offset += len(piece)

    async def delete(self, identity: Identity, file_id: str) -> FileDeleted:
        node, asked = self._of_file(file_id), Asked(identity=identity, id=file_id)
        if node == self._me:
            return await self._files.delete(asked)
        return await self._at(node, file_id, self._others.delete_file(node, asked))

    async def files(
        self, identity: Identity, *, limit: int, after: str = "", oldest: bool = False, purpose: str = ""
    ) -> FileList:
        after_at = (await self.file(identity, after)).created_at if after else 0
        asked = ListAsked(
            identity=identity, limit=limit, after=after, after_at=after_at, oldest=oldest, purpose=purpose
        )
        rows, away = await self._everywhere(self._files.list(asked), lambda n: self._others.files(n, asked))
        rows.sort(key=lambda row: (row.created_at, row.id), reverse=not oldest)
        shown = tuple(rows[:limit])
        return FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(rows) > limit,
            away=away,
        )

    # ── batches ─────────────────────────────────────────────────────────────────────

    async def create(self, identity: Identity, ask: BatchAsk) -> Batch:
        """At the node that has the file."""
        check_ask(ask)
        node, asked = self._of_file(ask.input_file_id), CreateAsked(identity=identity, ask=ask)
        if node == self._me:
            return await self._batches.create(asked)
        return await self._at(node, ask.input_file_id, self._others.create(node, asked))

    async def batch(self, identity: Identity, batch_id: str) -> Batch:
        node, asked = self._of_batch(batch_id), Asked(identity=identity, id=batch_id)
        if node == self._me:
            return self._batches.get(asked)
        return await self._at(node, batch_id, self._others.batch(node, asked))

    async def cancel(self, identity: Identity, batch_id: str) -> Batch:
        node, asked = self._of_batch(batch_id), Asked(identity=identity, id=batch_id)
        if node == self._me:
            return await self._batches.cancel(asked)
        return await self._at(node, batch_id, self._others.cancel(node, asked))

    async def batches(self, identity: Identity, *, limit: int, after: str = "") -> BatchList:
        after_at = (await self.batch(identity, after)).created_at if after else 0
        asked = ListAsked(identity=identity, limit=limit, after=after, after_at=after_at)
        rows, away = await self._everywhere(
            self._batches.list(asked), lambda n: self._others.batches(n, asked)
        )
        rows.sort(key=lambda row: (row.created_at, row.id), reverse=True)
        shown = tuple(rows[:limit])
        return BatchList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(rows) > limit,
            away=away,
        )

    # ── whose it is ─────────────────────────────────────────────────────────────────

    def _of_file(self, file_id: str) -> NodeId:
        return self._node_of(file_id, "file-", "-", f"No such File object: {file_id[:80]}")

    def _of_batch(self, batch_id: str) -> NodeId:
        return self._node_of(batch_id, "batch_", "_", f"No batch found with id '{batch_id[:80]}'.")

    def _node_of(self, text: str, prefix: str, between: str, missing: str) -> NodeId:
        """
        Raises:
            NotFound: no node of this cluster made that id.
        """
        node = NodeId(text.removeprefix(prefix).rpartition(between)[0]) if text.startswith(prefix) else ""
        if node and (node == self._me or node in self._state().nodes):
            return NodeId(node)
        raise NotFound(missing)

    async def _at(self, node: NodeId, what: str, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except (Unavailable, DeadlineExceeded) as failure:
            known = self._state().nodes.get(node)
            name = known.name if known is not None else node
            raise Unavailable(
                f"{what[:80]} is kept by node {name}, which is away; it is there again when the node is"
            ) from failure

    async def _everywhere(
        self, own: Sequence[T], ask: Callable[[NodeId], Awaitable[Sequence[T]]]
    ) -> tuple[list[T], tuple[str, ...]]:
        """The rows of all nodes, and the names of nodes that did not answer."""
        rows: list[T] = [*own]
        away: list[str] = []
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(node: NodeId, name: str) -> None:
            try:
                async with turns:
                    rows.extend(await ask(node))
            except (Unavailable, DeadlineExceeded, NotFound):
                away.append(name)

        others = [node for node in self._state().nodes.values() if node.id != self._me]
        away += [node.name for node in others if not node.alive]
        await asyncio.gather(*(one(node.id, node.name) for node in others if node.alive))
        return rows, tuple(sorted(away))
