"""The files of this node: sent by clients for batches, and results of batches."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable

import structlog

from ollama_distributed.base.batches import FileDeleted, FileObject
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, DiskFull, Invalid, NotFound
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.batches.plan import Owner, may_see, owner_of
from ollama_distributed.batches.ports import Disk, Which
from ollama_distributed.batches.records import Asked, FileRecord, Limits, ListAsked, ReadAsked

MOST_READ_BYTES = 1024 * 1024
"""In one go: what is on its way through a node stays small, whatever a file's size."""
MOST_FILENAME = 255
MIN_KEPT_S, MOST_KEPT_S = 3600, 30 * 24 * 3600
"""OpenAI's bounds of `expires_after`."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Files:
    """`used_by`: the batch that reads a file still."""

    def __init__(
        self,
        node: NodeId,
        name: str,
        disk: Disk,
        limits: Limits,
        clock: Clock,
        *,
        used_by: Callable[[str], str | None],
    ) -> None:
        self._node = node
        self._name = name
        self._disk = disk
        self._limits = limits
        self._clock = clock
        self._used_by = used_by
        self._all: dict[str, FileRecord] = {}
        self._coming_bytes = 0
        self._bytes = 0

    @property
    def file_bytes(self) -> int:
        """The most that one may have."""
        return self._limits.file_bytes

    async def start(self) -> None:
        for record in await self._disk.files():
            self._add(record)

    async def receive(
        self, owner: Owner, filename: str, chunks: AsyncIterator[bytes], *, expires_after_s: int | None = None
    ) -> FileObject:
        """
        Raises:
            Invalid: its name or its life is out of bounds.
            BodyTooLarge: it is longer than a file may be.
            DiskFull: there is no room.
        """
        filename = _CONTROL.sub("_", filename)[:MOST_FILENAME]
        if expires_after_s is not None and not MIN_KEPT_S <= expires_after_s <= MOST_KEPT_S:
            raise Invalid(
                f"expires_after[seconds] is {MIN_KEPT_S} to {MOST_KEPT_S}", param="expires_after[seconds]"
            )
        if len(self._all) >= self._limits.files:
            raise DiskFull(f"this node keeps {self._limits.files} files already; delete some")
        file_id = f"file-{self._node}-{random_id(20)}"
        claim = _Claim(self, chunks)
        try:
            size = await self._disk.receive(file_id, claim.chunks(), most_bytes=self._limits.file_bytes)
            now = int(self._clock.time())
            file = FileObject(
                id=file_id,
                bytes=size,
                created_at=now,
                filename=filename,
                expires_at=None if expires_after_s is None else now + expires_after_s,
                node=self._name,
            )
            record = FileRecord(owner=owner, file=file)
            await self._disk.keep(record)
        except BaseException:
            await self._disk.discard(file_id)
            raise
        finally:
            claim.end()
        self._add(record)
        log.info("file.taken", file=file_id, bytes=size, key_id=owner.key)
        return file

    def get(self, asked: Asked) -> FileObject:
        """
        Raises:
            NotFound: there is none, or it is somebody else's.
        """
        return self._find(asked.identity, asked.id).file

    async def read(self, asked: ReadAsked) -> bytes:
        """A piece of the file, of `MOST_READ_BYTES` at most."""
        file = self._find(asked.identity, asked.id).file
        return await self._disk.read(file.id, max(asked.offset, 0), min(asked.length, MOST_READ_BYTES))

    def list(self, asked: ListAsked) -> list[FileObject]:
        """Newest first unless asked for otherwise, one more than asked for where there are more."""
        asking = owner_of(asked.identity)
        rows = [one.file for one in self._all.values() if may_see(one.owner, asking)]
        if asked.purpose:
            rows = [row for row in rows if row.purpose == asked.purpose]
        rows.sort(key=lambda row: (row.created_at, row.id), reverse=not asked.oldest)
        if asked.after:
            place = (asked.after_at, asked.after)
            rows = [
                row
                for row in rows
                if ((row.created_at, row.id) > place if asked.oldest else (row.created_at, row.id) < place)
            ]
        return rows[: asked.limit + 1]

    async def delete(self, asked: Asked) -> FileDeleted:
        """
        Raises:
            NotFound: as `get`.
            Conflict: a batch reads it still.
        """
        file = self._find(asked.identity, asked.id).file
        batch = self._used_by(file.id)
        if batch is not None:
            raise Conflict(f"{batch} reads this file; cancel it first, or wait for its end")
        await self._remove(file)
        return FileDeleted(id=file.id)

    async def publish(self, owner: Owner, batch_id: str, which: Which, expires_at: int) -> str | None:
        """Make a file of a batch's results; None: it has none. Idempotent."""
        file = FileObject(
            id=f"file-{self._node}-{batch_id.rpartition('_')[2]}{which[0]}",
            bytes=0,
            created_at=int(self._clock.time()),
            filename=f"{batch_id}_{'output' if which == 'output' else 'error'}.jsonl",
            purpose="batch_output",
            expires_at=expires_at,
            node=self._name,
        )
        known = self._all.get(file.id)
        if known is not None:
            return file.id
        record = await self._disk.publish(batch_id, which, FileRecord(owner=owner, file=file))
        if record is None:
            return None
        self._add(record)
        return file.id

    async def sweep(self, now: float) -> None:
        """Let go what has expired."""
        for record in [*self._all.values()]:
            at = record.file.expires_at
            if at is not None and at <= now and self._used_by(record.file.id) is None:
                await self._remove(record.file)

    def claim(self, size: int) -> None:
        """Room for so many more bytes.

        Raises:
            DiskFull: the files of this node would be too many bytes together.
        """
        if self._bytes + self._coming_bytes + size > self._limits.total_bytes:
            raise DiskFull(
                f"the files of batches on this node would be more than {self._limits.total_bytes} bytes; "
                "delete some (batch_disk)"
            )
        self._coming_bytes += size

    def release(self, size: int) -> None:
        self._coming_bytes -= size

    def _find(self, identity: Identity, file_id: str) -> FileRecord:
        record = self._all.get(file_id)
        if record is None or not may_see(record.owner, owner_of(identity)):
            raise NotFound(f"No such File object: {file_id[:80]}")
        return record

    def _add(self, record: FileRecord) -> None:
        self._all[record.file.id] = record
        self._bytes += record.file.bytes

    async def _remove(self, file: FileObject) -> None:
        await self._disk.delete(file.id)
        if self._all.pop(file.id, None) is not None:
            self._bytes -= file.bytes


class _Claim:
    """Claims room for a file as it comes."""

    def __init__(self, files: Files, chunks: AsyncIterator[bytes]) -> None:
        self._files = files
        self._chunks = chunks
        self._claimed = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self._files.claim(len(chunk))
            self._claimed += len(chunk)
            yield chunk

    def end(self) -> None:
        self._files.release(self._claimed)
        self._claimed = 0
