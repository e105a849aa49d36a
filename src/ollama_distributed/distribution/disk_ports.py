"""What looking after a disk needs of the world: the files, the catalogue, the other holders."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from ollama_distributed.base.disk import DiskAnswer, ScrubRow
from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import BlobId
from ollama_distributed.models.stored import StoredModel

Leftover: TypeAlias = Literal["partial", "damaged"]


class StoredFile(msgspec.Struct, frozen=True, gc=False):
    size_bytes: int
    """Of a half-fetched one: what it takes of the disk so far."""
    modified_at: float
    """Seconds since the Unix epoch."""


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the store's disk."""

    total_bytes: int = 0
    """Of the file system."""
    free_bytes: int = 0
    """Of the file system, for us."""
    blobs: Mapping[BlobId, StoredFile] = {}
    partials: Mapping[BlobId, StoredFile] = {}
    """Half-fetched ones."""
    damaged: Mapping[BlobId, StoredFile] = {}
    """Taken away, since they were not what their name says."""
    other_bytes: int = 0
    """Files that are being written, and what others left in the store."""

    @property
    def used_bytes(self) -> int:
        kinds = (self.blobs, self.partials, self.damaged)
        return self.other_bytes + sum(file.size_bytes for kind in kinds for file in kind.values())


class Disk(Protocol):
    """The store's files (`adapters.blobs.store.BlobStore`)."""

    async def survey(self) -> Survey: ...

    async def drop_leftover(self, kind: Leftover, blob: BlobId) -> bool:
        """Remove what is half-fetched or was taken away. False: it is in use, or not there."""
        ...

    async def digest(self, blob: BlobId, between: Callable[[int], Awaitable[None]]) -> str:
        """SHA-256 of what lies on the disk now, read anew, as hex; empty: it cannot be read.
        `between` hears how many bytes were read and returns when the next may be.

        Raises:
            BlobNotFound: it is not here.
        """
        ...

    async def take_away(self, blob: BlobId) -> None:
        """It is damaged: nobody finds it under its name any more."""
        ...


class Models(Protocol):
    """The catalogue of this node (`catalog.service.Catalog`)."""

    def stored(self) -> Sequence[StoredModel]:
        """Those on disk, also those that cannot be served; from memory."""
        ...

    def in_use(self) -> Collection[BlobId]:
        """Blobs that nobody may remove now."""
        ...

    async def delete(self, name: str) -> None: ...

    async def forget(self, blobs: Collection[BlobId]) -> None:
        """Remove those that no manifest names and nobody has pinned."""
        ...

    async def recheck(self, blobs: Collection[BlobId]) -> Sequence[StoredModel]:
        """These were lost, or are here again: look at the models that need them. Returns them."""
        ...


class KeepAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Does the node keep its copy of this, while the asker drops its own?"""

    model: str
    digest: str


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    kept: bool


class NothingAsked(msgspec.Struct, frozen=True):
    """A question that says all by its name."""


class EvictHere(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    last_copy: bool = False


class Freed(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int


class Disks(Protocol):
    """The way to other nodes' disks (`adapters.peers.disks.DiskExchange`). Every method may raise
    `Unavailable` and `DeadlineExceeded`, and what the other node refuses with."""

    async def keep(self, node: NodeId, ask: KeepAsk) -> bool: ...

    async def disk(self, node: NodeId) -> DiskAnswer: ...

    async def evict(self, node: NodeId, ask: EvictHere) -> int: ...

    async def scrub(self, node: NodeId) -> ScrubRow: ...
