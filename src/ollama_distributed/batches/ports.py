"""What batches need: a disk that keeps what was said, and somebody to ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from ollama_distributed.base.identity import Identity
from ollama_distributed.batches.plan import Owner, Seats
from ollama_distributed.batches.records import BatchRecord, Done, FileRecord, Result

Which = Literal["output", "errors"]


class Disk(Protocol):
    """Where files and batches are kept. What returned is on the disk.

    Raises:
        DiskFull: there is no room, or it cannot be written; what was there stays.
    """

    async def files(self) -> Sequence[FileRecord]:
        """Those that are whole. Called once, first; removes what a killed node left half done."""
        ...

    async def receive(self, file_id: str, chunks: AsyncIterator[bytes], *, most_bytes: int) -> int:
        """Take a file's bytes as they come; how many. It is there once `keep` was called.

        Raises:
            BodyTooLarge: more than `most_bytes` came.
        """
        ...

    async def keep(self, record: FileRecord) -> None: ...

    async def discard(self, file_id: str) -> None:
        """What was received and will not be kept."""
        ...

    async def read(self, file_id: str, offset: int, length: int) -> bytes: ...

    def lines(self, file_id: str) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        """The lines of a file with their numbers from 1, some at a time; what is longer than a
        line may be is cut just above that."""
        ...

    async def delete(self, file_id: str) -> None: ...

    async def batches(self) -> Sequence[BatchRecord]: ...

    async def save(self, record: BatchRecord) -> None: ...

    async def forget(self, batch_id: str) -> None: ...

    async def done(self, batch_id: str) -> Done:
        """What `append` wrote, of this run of the node and of those before."""
        ...

    async def append(self, batch_id: str, results: Iterable[Result]) -> None: ...

    async def publish(self, batch_id: str, which: Which, record: FileRecord) -> FileRecord | None:
        """Make a file of a batch's results; None: it has none. Again: the same file."""
        ...


class Answer(msgspec.Struct, frozen=True):
    """To one line."""

    status: int
    body: bytes
    retry_after_s: float | None = None
    """The server said when to come again; None: it did not."""


class Asking(Protocol):
    """The node's own inference, asked as its API is, at the lowest priority."""

    async def __call__(self, endpoint: str, body: bytes, identity: Identity, request_id: str, /) -> Answer:
        """Cancel-safe: what runs is stopped."""
        ...


class Room(Protocol):
    def __call__(self, model: str, /) -> Seats:
        """How busy a model is in the cluster, from memory."""
        ...


class Known(Protocol):
    def __call__(self, owner: Owner, /) -> Identity | None:
        """Who an owner is now; None: their key was revoked, or has expired."""
        ...
