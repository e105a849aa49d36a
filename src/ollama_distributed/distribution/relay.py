"""Reads blobs that other nodes hold, piece after piece, and keeps nothing of them.

For who wants a model's bytes once (a bundle for another cluster): the disk of this node need
not have room for it. Each piece is checked by the table of the node that gives it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import structlog
from anyio import CapacityLimiter, sleep, to_thread

from ollama_distributed.base.errors import (
    DigestMismatch,
    ModelNotFound,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.tasks import end
from ollama_distributed.distribution.exchange import Exchange, HaveAsk, PieceAsk, PieceHead, to_bytes
from ollama_distributed.distribution.pieces import Table
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger()

BUSY_TRIES = 120
"""A node that gives others their pieces first is asked so often for one; half a minute and more."""
MAX_WAIT_S = 5.0
_THREADS = 2


class Relay:
    """Implements `packing.Elsewhere`."""

    def __init__(self, me: NodeId, exchange: Exchange, state: Callable[[], ClusterState]) -> None:
        self._me = me
        self._exchange = exchange
        self._state = state
        self._threads = CapacityLimiter(_THREADS)

    async def manifest(self, name: ModelName, digest: str) -> bytes:
        failure: OllamaDistributedError = ModelNotFound(f"no node that lives has model '{name.display}'")
        for node in self._holders(name, digest):
            try:
                data = await self._exchange.manifest(node, str(name))
            except OllamaDistributedError as exc:
                failure = exc
                continue
            if hashlib.sha256(data).hexdigest() == digest:
                return data
            failure = Unavailable(f"node {node} has another version of '{name.display}' by now")
        raise failure

    async def read(
        self, name: ModelName, digest: str, blob: BlobId, size: int
    ) -> AsyncGenerator[bytes | memoryview]:
        at = 0
        failure: OllamaDistributedError = Unavailable(f"no node that lives has blob {blob.digest[:19]}")
        for node in self._holders(name, digest):
            try:
                async with aclosing(self._from(node, blob, size, at)) as parts:
                    async for part in parts:
                        at += len(part)
                        yield part
            except OllamaDistributedError as exc:
                log.info("distribution.relay_broke", node=node, blob=blob.digest, at=at, error=exc.message)
                failure = exc
            else:
                return
        raise failure

    def _holders(self, name: ModelName, digest: str) -> Sequence[NodeId]:
        state = self._state()
        held = state.models.get(name.key)
        return [
            node
            for node, model in (held.items() if held else ())
            if node != self._me and model.digest == digest and node in state.nodes and state.nodes[node].alive
        ]

    async def _from(self, node: NodeId, blob: BlobId, size: int, begin: int) -> AsyncGenerator[memoryview]:
        if begin == size:
            return
        answer = await self._exchange.have(node, HaveAsk(blob=blob.digest, table=True, fetching=False))
        table = answer.table
        if table is None or not table.sound or table.size != size or table.id() != answer.table_id:
            raise RegistryError(f"node {node} has another blob under {blob.digest[:19]}")
        first = begin // table.piece
        skip = begin - first * table.piece
        coming = asyncio.ensure_future(self._piece(node, blob, table, first))
        try:
            for piece in range(first, table.pieces):
                data = await coming
                if piece + 1 < table.pieces:  # it comes while this one leaves
                    coming = asyncio.ensure_future(self._piece(node, blob, table, piece + 1))
                for part in data:
                    rest, skip = part[skip:], max(0, skip - len(part))
                    if len(rest):
                        yield rest
        finally:
            await end((coming,))
            if not coming.cancelled():
                coming.exception()  # nobody asks for this one any more

    async def _piece(self, node: NodeId, blob: BlobId, table: Table, piece: int) -> list[memoryview]:
        """
        Raises:
            DigestMismatch: it is not what the table says.
            Unavailable: the node has no turn for it.
        """
        ask = PieceAsk(blob=blob.digest, table_id=table.id(), offered=to_bytes(1 << piece))
        wait_s = 0.0

        def granted(head: PieceHead) -> int:
            nonlocal wait_s
            wait_s = min(max(head.retry_s, 0.05), MAX_WAIT_S)
            return table.span(piece)[1] if head.piece == piece else -1

        for _ in range(BUSY_TRIES):
            data = await self._exchange.piece(node, ask, granted)
            if data is not None:
                if not await to_thread.run_sync(table.right, piece, data, limiter=self._threads):
                    raise DigestMismatch(f"node {node} sends a piece that has another hash")
                return data
            await sleep(wait_s)
        raise Unavailable(f"node {node} is busy with others")
