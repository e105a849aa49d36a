"""What the catalogue needs of the world: a blob store, and engines with models of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Protocol

import msgspec

from ollama_distributed.models.gguf import Header
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.spec import ModelSpec


class ManifestStamp(msgspec.Struct, frozen=True):
    """What a file system says of a manifest without reading it; changes when it is written."""

    modified_at: float
    """Seconds since the Unix epoch."""
    size: int
    inode: int


class StoredManifest(msgspec.Struct, frozen=True):
    data: bytes
    stamp: ManifestStamp


class Store(Protocol):
    """Ollama's layout on disk, or anything that behaves like it.

    Blobs are complete or absent, manifests are replaced as a whole. Every method may
    raise `DiskFull` when it writes; nothing half-written is left behind then.
    """

    async def scan(self) -> dict[ModelName, ManifestStamp]:
        """All manifests, without reading them."""
        ...

    async def read_manifest(self, name: ModelName) -> StoredManifest | None: ...

    async def write_manifest(
        self, name: ModelName, data: bytes, modified_at: float | None = None
    ) -> ManifestStamp:
        """`modified_at`: of the stamp, seconds since the Unix epoch; None: now."""
        ...

    async def delete_manifest(self, name: ModelName) -> bool:
        """True: it was there. Folders that became empty go too."""
        ...

    def blob_path(self, blob: BlobId) -> str:
        """Absolute path, for a runner."""
        ...

    async def blob_size(self, blob: BlobId) -> int | None:
        """Bytes, or None when it is not here."""
        ...

    async def read_blob(self, blob: BlobId, limit: int) -> bytes:
        """A small blob as a whole.

        Raises:
            BlobNotFound: it is not here.
            InvalidModel: it is over `limit` bytes.
        """
        ...

    async def read_header(self, blob: BlobId, *, verbose: bool = False) -> Header:
        """The GGUF header of a blob.

        Raises:
            BlobNotFound: it is not here.
            InvalidModel: it is no GGUF, or a damaged or hostile one.
        """
        ...

    async def put_blob(self, blob: BlobId, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        """Store what has this digest. True: newly made, False: it was there. `size`: how much will
        come, where that is said: too much of it is refused at once.

        Raises:
            DigestMismatch: the content has another digest.
        """
        ...

    async def put_bytes(self, data: bytes) -> tuple[BlobId, bool]:
        """Store a small content under its own digest; as `put_blob`."""
        ...

    async def collect(self, candidates: Collection[BlobId], keep: Collection[BlobId]) -> list[BlobId]:
        """Delete those of `candidates` that no manifest names and `keep` does not hold."""
        ...


class RemoteModels(Protocol):
    """An engine on this machine that serves models of its own."""

    async def models(self) -> list[ModelSpec]: ...
