"""What the API says of a node's disk: how full it is, which models may go, whether files are sound.

Shared by the gateway, which writes it, and the SDK, which reads it. Fields are added with
defaults only.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Kept: TypeAlias = Literal["", "loaded", "recent", "moving", "pinned", "placed", "last"]
"""Why a model stays: in memory; used a moment ago; on its way from or to a node; pinned to this
node; wanted on it by a plan; too few other nodes hold it. Empty: it may go when room is needed."""


class ModelOnDisk(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    size_bytes: int
    frees_bytes: int = 0
    """What no other model on this disk needs."""
    last_used: float = 0.0
    """Last answer, or copy to another node; else its arrival. Seconds since the Unix epoch."""
    kept: Kept = ""
    others: tuple[str, ...] = ()
    """Names of other nodes that are online and hold the same version."""
    damaged: str = ""
    """Why it cannot be served; empty: it can."""


class ScrubRow(msgspec.Struct, frozen=True, kw_only=True):
    """Reading files again to see whether they still are what they were."""

    running: bool = False
    asked: bool = False
    """Somebody asked for all files to be read now."""
    total_bytes: int = 0
    done_bytes: int = 0
    files: int = 0
    corrupt: int = 0
    """Files found damaged in this run."""
    began_at: float | None = None
    ended_at: float | None = None


class DiskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one node; the counts are since its start."""

    total_bytes: int = 0
    """Of the file system that the models are on."""
    free_bytes: int = 0
    used_bytes: int = 0
    """All files of the model store."""
    quota_bytes: int | None = None
    low_water_bytes: int = 0
    coming_bytes: int = 0
    """On their way to the disk; their room is taken already."""
    room_bytes: int = 0
    """What may come without anything going."""
    evictable_bytes: int = 0
    """What models that may go would free."""
    hits: int = 0
    """Requests for a model that was on this disk."""
    misses: int = 0
    """Requests for a model that was not, and so went to another node or failed."""
    evictions: int = 0
    evicted_bytes: int = 0
    refused: int = 0
    """Times that there was no room (507)."""
    scrubbed_bytes: int = 0
    corrupt: int = 0
    """Files found damaged."""
    repaired: int = 0
    """Models made whole again from other nodes."""


class DiskAnswer(DiskFigures, frozen=True, kw_only=True):
    """`GET /api/v1/nodes/{id}/disk`."""

    node: str
    name: str
    partial_bytes: int = 0
    """Half-fetched files; they go first."""
    damaged_bytes: int = 0
    """Damaged files that were taken away; they go with them."""
    other_bytes: int = 0
    """Files that no model names."""
    models: tuple[ModelOnDisk, ...] = ()
    """In the order in which they would go."""
    scrub: ScrubRow = ScrubRow()


class EvictAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/models/{name}/evict`."""

    node: str = ""
    """Its id or name; empty: the one that is asked."""
    last_copy: bool = False
    """Even if no other node holds it."""


class EvictAnswer(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    node: str
    name: str
    freed_bytes: int
