"""What moving models needs of the world: registries, a place for half-fetched blobs, a catalogue.

A blob on its way is a `Partial`: its bytes may come in any order and from anywhere (parts of
a registry's answer, pieces of other nodes). What was noted survives a crash; nobody sees the
blob before `finish` has checked it as a whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol

import msgspec

from ollama_distributed.models.manifest import Layer
from ollama_distributed.models.names import BlobId, ModelName

Told = Callable[[int], None]
"""Called with the bytes that came, or left, just now."""


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a pull or push, in Ollama's words; the wire's form too."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class Partial(Protocol):
    """A blob on its way into the store. For one task group; writes may run at the same time."""

    @property
    def size(self) -> int:
        """Bytes of the whole blob."""
        ...

    @property
    def here(self) -> int:
        """Bytes that are here already, also those of an earlier, broken-off fetch."""
        ...

    @property
    def resumed(self) -> bool:
        """Some bytes are of an earlier fetch."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """What is not here yet, as [begin, end) in order."""
        ...

    async def write(self, offset: int, *data: bytes | memoryview) -> None:
        """Put bytes where they belong. They are noted from time to time, always after they are
        on the disk.

        Raises:
            DiskFull: the rest has no room.
        """
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes that are here; what is missing reads as zeros.

        Raises:
            BlobNotFound: the fetch has ended.
        """
        ...

    async def finish(self) -> None:
        """Check the whole against the digest and make it visible.

        Raises:
            DigestMismatch: what was here is gone, and the next fetch starts over.
        """
        ...

    async def discard(self) -> None:
        """Remove what is here; the next fetch starts over."""
        ...


class Blobs(Protocol):
    """The store's files, as far as moving them goes (`adapters.blobs.store.BlobStore`)."""

    async def blob_size(self, blob: BlobId) -> int | None:
        """Bytes of a whole blob, or None when it is not here."""
        ...

    def partial(self, blob: BlobId, size: int) -> AbstractAsyncContextManager[Partial]:
        """Begin or resume. What is here stays when the context ends before `finish`. Asks for its
        room itself.

        Raises:
            Conflict: another process fetches it into the same store.
            DiskFull: the missing bytes have no room; nothing was made.
        """
        ...

    def room(self, blobs: Mapping[BlobId, int]) -> AbstractAsyncContextManager[None]:
        """Have room for blobs of these sizes while the context lasts (`distribution.room.Room`).

        Raises:
            DiskFull: it cannot be made; nothing was fetched.
        """
        ...

    async def read_range(self, blob: BlobId, offset: int, length: int) -> bytes:
        """Bytes of a whole blob; fewer at its end.

        Raises:
            BlobNotFound: it is not here.
        """
        ...

    async def room_bytes(self) -> int:
        """Free bytes on the store's disk."""
        ...


class Store(Blobs, Protocol):
    """The same, for blobs that come in one go."""

    async def put_blob(self, blob: BlobId, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        """Store what has this digest; checked before it is visible. False: it was there, and
        nothing was read. `size`: how much will come, where that is said.

        Raises:
            DigestMismatch: the content has another digest; nothing stays.
            DiskFull: nothing stays.
        """
        ...


class Registry(Protocol):
    """Where models come from and go to (`adapters.registry.service.Registries`).

    Every method may raise `Forbidden` (the registry, or where it sends us, is not allowed),
    `Unauthenticated`, `Unavailable` (it cannot be reached, or not now) and `RegistryError`
    (it answers what it must not).
    """

    def check(self, name: ModelName) -> None:
        """Whether this name's registry may be asked at all.

        Raises:
            Forbidden: says what to configure.
        """
        ...

    async def manifest(self, name: ModelName) -> bytes:
        """
        Raises:
            ModelNotFound: the registry has no such model.
        """
        ...

    async def fetch(self, name: ModelName, blob: BlobId, into: Partial) -> None:
        """Bring the missing bytes of a blob, in parts, several at once. The digest is not
        checked here."""
        ...

    def disproved(self, name: ModelName, blob: BlobId, /) -> bool:
        """What `fetch` brought is not this blob. True: it may come from elsewhere next time."""
        ...

    async def read_part(self, name: ModelName, layer: Layer, begin: int, end: int, /) -> bytes:
        """The bytes [begin, end) of a blob, to look into it before it is fetched; fewer at its end."""
        ...

    async def send(self, name: ModelName, layer: Layer, source: Blobs, told: Told, /) -> None:
        """Bring a blob to the registry, unless it is there. `told` may hear negative numbers: what
        has to be sent again."""
        ...

    async def send_manifest(self, name: ModelName, data: bytes, /) -> None: ...


class Origin(Protocol):
    """Where what is pulled comes from: a registry, perhaps by way of other nodes
    (`distribution.together.Together`). Raises what `Registry` raises."""

    def manifest(self, name: ModelName) -> AbstractAsyncContextManager[bytes]:
        """To be held while the model is pulled: others who pull it meanwhile get the same."""
        ...

    async def fetch(
        self, name: ModelName, blob: BlobId, into: Partial, finish: Callable[[], Awaitable[None]]
    ) -> None:
        """Bring what is missing of a blob, and finish it.

        Raises:
            DigestMismatch: as `finish`.
        """
        ...

    def ahead(self, blob: BlobId) -> int:
        """Bytes that another node has, for whose fetch of the blob `fetch` waits."""
        ...

    def disproved(self, name: ModelName, blob: BlobId) -> bool:
        """As `Registry.disproved`."""
        ...

    def made_at(self, name: ModelName) -> float | None:
        """When the version was made that the manifest is a copy of; None: it is a new one."""
        ...


class Library(Protocol):
    """The catalogue of this node (`catalog.service.Catalog`)."""

    def settled(self, name: ModelName) -> ModelName:
        """The spelling that is on disk already, as far as it matches without case."""
        ...

    def pinned(self, blobs: Collection[BlobId]) -> AbstractContextManager[None]:
        """No clean-up takes these blobs meanwhile."""
        ...

    async def manifest(self, name: ModelName) -> bytes | None:
        """As stored; None when there is no such model here."""
        ...

    async def examine(self, name: ModelName, manifest: bytes) -> None:
        """Whether a model whose blobs are all here could be adopted. Raises as `adopt`."""
        ...

    async def adopt(self, name: ModelName, manifest: bytes, made_at: float | None = None) -> set[BlobId]:
        """Name a model whose blobs are all here. Returns the blobs that only its last version used.
        `made_at`: when the version that this is a copy of was made; None: it is new.

        Raises:
            InvalidModel: it cannot be served; the message says why. Nothing was changed.
            BlobNotFound: one is not here.
            ModelNotFound: this version was deleted in the whole cluster meanwhile.
            Conflict: a newer version is here.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove a name, and the blobs that no other name needs.

        Raises:
            ModelNotFound: it is not here.
        """
        ...

    async def forget(self, blobs: Collection[BlobId]) -> None:
        """Remove those that no manifest names and nobody has pinned."""
        ...
