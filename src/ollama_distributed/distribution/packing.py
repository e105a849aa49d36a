"""Models as one file on their way out: read here, or from nodes that hold them, as the reader takes it.

Each blob is hashed while it leaves. One that is wrong ends the file before its end, so that nobody
takes it for whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
import structlog
from anyio import CapacityLimiter, to_thread

from ollama_distributed.base.errors import DigestMismatch, Invalid, Unsupported
from ollama_distributed.distribution.ports import Blobs, Library
from ollama_distributed.models import bundle, tar
from ollama_distributed.models.bundle import Piece
from ollama_distributed.models.manifest import parse_manifest
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.spec import ModelSpec

log = structlog.get_logger()

READ_BYTES = 1 << 20
"""At once, from the disk to the reader: sending it takes the loop about a millisecond."""
_THREADS = 2


Resolve = Callable[[str], Awaitable[ModelSpec]]
"""The version of a name that counts, wherever it lies; raises `ModelNotFound`."""


class Elsewhere(Protocol):
    """Models of other nodes (`relay.Relay`). `digest`: of the version's manifest, as hex."""

    async def manifest(self, name: ModelName, digest: str) -> bytes:
        """
        Raises:
            ModelNotFound, Unavailable: no node that has this version gives it.
        """
        ...

    def read(
        self, name: ModelName, digest: str, blob: BlobId, size: int
    ) -> AsyncGenerator[bytes | memoryview]:
        """A blob's bytes in order; its own digest is not checked. Raises as `manifest`."""
        ...


class Bundle(msgspec.Struct, frozen=True):
    """Ready to be read, once."""

    models: tuple[str, ...]
    """Their full names."""
    length: int
    """Bytes of the file."""
    chunks: Callable[[], AsyncGenerator[bytes]]


class _Home(msgspec.Struct, frozen=True):
    """The model that a blob is of."""

    name: ModelName
    digest: str


class Packing:
    def __init__(self, blobs: Blobs, library: Library, resolve: Resolve, elsewhere: Elsewhere) -> None:
        self._blobs = blobs
        self._library = library
        self._resolve = resolve
        self._elsewhere = elsewhere
        self._threads = CapacityLimiter(_THREADS)

    async def pack(self, names: Sequence[str]) -> Bundle:
        """
        Raises:
            Invalid: no name, or too many.
            ModelNotFound, Unavailable, Unsupported, InvalidModel: one of them cannot be had.
        """
        if not 1 <= len(names) <= bundle.MAX_MODELS:
            raise Invalid(f"a bundle holds 1 to {bundle.MAX_MODELS} models")
        models: dict[str, tuple[ModelName, bytes]] = {}
        homes: dict[BlobId, _Home] = {}
        for text in names:
            spec = await self._resolve(text)
            if spec.remote is not None:
                raise Unsupported(f"{spec.display} lives in another engine, which has its files")
            name = self._library.settled(ModelName.parse(spec.name))
            data = await self._manifest(name, spec.digest)
            models.setdefault(name.key, (name, data))
            manifest = await to_thread.run_sync(parse_manifest, data, limiter=self._threads)
            homes |= dict.fromkeys(manifest.blobs(), _Home(name, spec.digest))
        pieces, length = await to_thread.run_sync(_laid_out, list(models.values()), limiter=self._threads)
        return Bundle(
            models=tuple(str(name) for name, _ in models.values()),
            length=length,
            chunks=lambda: self._chunks(pieces, homes),
        )

    async def _manifest(self, name: ModelName, digest: str) -> bytes:
        here = await self._library.manifest(name)
        if here is not None and bundle.digest_of(here).hex == digest:
            return here
        return await self._elsewhere.manifest(name, digest)

    async def _chunks(self, pieces: Sequence[Piece], homes: Mapping[BlobId, _Home]) -> AsyncGenerator[bytes]:
        sent = 0
        with self._library.pinned(set(homes)):
            for piece in pieces:
                head = tar.head(piece.name, piece.size)
                yield head
                if isinstance(piece.content, bytes):
                    yield piece.content
                else:
                    async with aclosing(self._blob(piece.content, piece.size, homes)) as parts:
                        async for part in parts:
                            yield part
                yield bytes(tar.padding_bytes(piece.size))
                sent += len(head) + piece.size + tar.padding_bytes(piece.size)
        yield bytes(tar.ending_bytes(sent))

    async def _blob(self, blob: BlobId, size: int, homes: Mapping[BlobId, _Home]) -> AsyncGenerator[bytes]:
        """
        Raises:
            DigestMismatch: what is there is not this blob.
        """
        digest, sent, home = hashlib.sha256(), 0, homes[blob]
        if await self._blobs.blob_size(blob) == size:
            source = self._here(blob, size)
        else:
            source = self._elsewhere.read(home.name, home.digest, blob, size)
        async with aclosing(source) as parts:
            async for part in parts:
                sent += len(part)
                await to_thread.run_sync(digest.update, part, limiter=self._threads)
                yield bytes(part)
        if sent != size or digest.hexdigest() != blob.hex:
            log.warning("distribution.bundle_broke", blob=blob.digest, bytes=sent)
            raise DigestMismatch(f"blob {blob.digest} is damaged where it lies")

    async def _here(self, blob: BlobId, size: int) -> AsyncGenerator[bytes | memoryview]:
        for at in range(0, size, READ_BYTES):
            yield await self._blobs.read_range(blob, at, min(READ_BYTES, size - at))


def _laid_out(models: Sequence[tuple[ModelName, bytes]]) -> tuple[list[Piece], int]:
    """Blocking: thousands of layers take a good part of a second."""
    pieces = bundle.pieces(models)
    return pieces, bundle.length(pieces)
