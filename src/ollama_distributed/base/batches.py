"""Files and batches as OpenAI's API says them ("Files", "Batch" of its reference).

Shared by the gateway, which writes it, and the SDK, which reads it. Times are whole seconds since
the Unix epoch. Fields are added with defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

Purpose: TypeAlias = Literal["batch", "batch_output"]
BatchStatus: TypeAlias = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
FINAL: frozenset[BatchStatus] = frozenset({"completed", "failed", "expired", "cancelled"})
Endpoint: TypeAlias = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    bytes: int
    created_at: int
    filename: str
    object: Literal["file"] = "file"
    purpose: Purpose = "batch"
    status: Literal["processed"] = "processed"
    expires_at: int | None = None
    node: str = ""
    """Name of the node that keeps it. Not of OpenAI's."""


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    data: tuple[FileObject, ...]
    object: Literal["list"] = "list"
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
    away: tuple[str, ...] = ()
    """Names of nodes that did not answer: what they keep is not in the list. Not of OpenAI's."""


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchFault(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with an input file."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


class BatchFaults(msgspec.Struct, frozen=True, kw_only=True):
    data: tuple[BatchFault, ...]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    object: Literal["batch"] = "batch"
    status: BatchStatus = "validating"
    errors: BatchFaults | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: Mapping[str, str] | None = None
    node: str = ""
    """Name of the node that works on it. Not of OpenAI's."""


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    data: tuple[Batch, ...]
    object: Literal["list"] = "list"
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
    away: tuple[str, ...] = ()
    """As in `FileList`."""


class ExpiresAfter(msgspec.Struct, frozen=True, kw_only=True):
    seconds: int
    anchor: Literal["created_at"] = "created_at"


class BatchAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
