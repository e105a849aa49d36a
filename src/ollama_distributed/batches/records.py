"""What a node keeps of files and batches on its disk, and how a line's answer is written."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.batches import Batch, BatchAsk, BatchStatus, FileObject
from ollama_distributed.base.identity import Identity
from ollama_distributed.batches.plan import Owner


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    owner: Owner
    file: FileObject


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    owner: Owner
    batch: Batch
    kept_s: int
    """How long its results are kept once they are there."""
    ending: BatchStatus | None = None
    """It works no more: what is left is to publish its results and to get there."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one node."""

    file_bytes: int
    total_bytes: int
    """All files together, results too."""
    kept_s: int
    """Results and records of batches that ended go after this; files that were sent, when they say so."""
    files: int = 10_000
    open_batches: int = 1_000
    """Not ended yet."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question about one file or batch. Between nodes, `identity` is what the asking node proves."""

    identity: Identity
    id: str


class ReadAsked(msgspec.Struct, frozen=True, kw_only=True):
    identity: Identity
    id: str
    offset: int
    length: int


class ListAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first, unless `oldest`."""

    identity: Identity
    limit: int
    after: str = ""
    after_at: int = 0
    """When that one was made: nodes that do not keep it go by this."""
    oldest: bool = False
    purpose: str = ""


class CreateAsked(msgspec.Struct, frozen=True, kw_only=True):
    identity: Identity
    ask: BatchAsk


class Response(msgspec.Struct, frozen=True, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line was never answered."""

    code: str
    message: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: Response | None = None
    error: LineError | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code >= 400


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a batch whose results are on the disk, by their `custom_id`."""

    completed: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
