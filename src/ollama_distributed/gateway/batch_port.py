"""What the routes of files and batches need of the node (`batches.cluster.ClusterBatches`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from ollama_distributed.base.batches import Batch, BatchAsk, BatchList, FileDeleted, FileList, FileObject
from ollama_distributed.base.identity import Identity


class BatchLane(Protocol):
    """Each raises `NotFound` for what is not there or somebody else's, and `Unavailable` while the
    node that keeps it is away."""

    @property
    def file_bytes(self) -> int:
        """The most that a file may have."""
        ...

    async def upload(
        self,
        identity: Identity,
        filename: str,
        chunks: AsyncIterator[bytes],
        *,
        expires_after_s: int | None = None,
    ) -> FileObject:
        """
        Raises:
            BodyTooLarge, DiskFull, Invalid
        """
        ...

    async def file(self, identity: Identity, file_id: str) -> FileObject: ...

    async def content(self, identity: Identity, file_id: str) -> tuple[FileObject, AsyncIterator[bytes]]: ...

    async def delete(self, identity: Identity, file_id: str) -> FileDeleted:
        """
        Raises:
            Conflict: a batch reads it still.
        """
        ...

    async def files(
        self, identity: Identity, *, limit: int, after: str = "", oldest: bool = False, purpose: str = ""
    ) -> FileList: ...

    async def create(self, identity: Identity, ask: BatchAsk) -> Batch: ...

    async def batch(self, identity: Identity, batch_id: str) -> Batch: ...

    async def cancel(self, identity: Identity, batch_id: str) -> Batch: ...

    async def batches(self, identity: Identity, *, limit: int, after: str = "") -> BatchList: ...
