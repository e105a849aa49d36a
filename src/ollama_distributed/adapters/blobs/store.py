"""The model store on disk: Ollama's layout, so that an existing `~/.ollama/models` serves.

`blobs/sha256-<hex>` and `manifests/<host>/<namespace>/<model>/<tag>`. What has its final
name is complete: each write goes to a staging file, is hashed, fsynced, renamed, and its
folder fsynced. Disk work runs in worker threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from anyio import CancelScope, CapacityLimiter, to_thread

from ollama_distributed.adapters.blobs import upkeep
from ollama_distributed.adapters.blobs.folders import (
    Folders,
    Staged,
    harmless,
    listed,
    open_file,
    regular_stat,
    translated,
)
from ollama_distributed.adapters.blobs.partial import PartialFile
from ollama_distributed.base.errors import BlobNotFound, DigestMismatch, InvalidModel, InvalidName
from ollama_distributed.catalog.ports import ManifestStamp, StoredManifest
from ollama_distributed.cluster.tasks import to_its_end
from ollama_distributed.distribution.disk_ports import Leftover, Survey
from ollama_distributed.distribution.room import Boundless, Room
from ollama_distributed.models.gguf import MAX_HEADER_BYTES, Header, NeedMore, read_header
from ollama_distributed.models.manifest import MAX_MANIFEST_BYTES, named_blobs
from ollama_distributed.models.names import BlobId, ModelName

log = structlog.get_logger()
T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_HEADER_READS = (4 << 20, 16 << 20, MAX_HEADER_BYTES)
"""First bytes to read until a header is whole: nearly all fit into the first, none exceeds the last."""
_THREADS = 8
"""Disk work at once; uploads must not take every thread of the process."""
_PART_BYTES = 4 << 20
"""Read at once when a blob is looked at as a whole: hashing it takes 3 ms."""
_MAX_NAMES = 100_000
"""Manifests looked at in one scan; a store with more is damaged or hostile."""


class BlobStore:
    """Ollama's store at `models_dir`. One object per process; closing it ends its use."""

    def __init__(self, models_dir: Path) -> None:
        self._folders = Folders(models_dir)
        self._threads = CapacityLimiter(_THREADS)
        self._room: Room = Boundless()
        removed = self._folders.clean_staging()
        if removed:
            log.info("store.leftovers_removed", files=removed)

    def close(self) -> None:
        self._folders.close()

    def use(self, room: Room) -> None:
        """What is written is asked for there from now on."""
        self._room = room

    # ── manifests ───────────────────────────────────────────────────────────────────

    async def scan(self) -> dict[ModelName, ManifestStamp]:
        return await self._in_thread(lambda: dict(self._scan()))

    async def read_manifest(self, name: ModelName) -> StoredManifest | None:
        def read() -> StoredManifest | None:
            try:
                with self._folders.below(self._folders.manifests, name.parts[:3]) as folder:
                    return _read_manifest(folder, name.tag)
            except (FileNotFoundError, NotADirectoryError):
                return None

        return await self._in_thread(read)

    async def write_manifest(
        self, name: ModelName, data: bytes, modified_at: float | None = None
    ) -> ManifestStamp:
        def write() -> ManifestStamp:
            with self._folders.staged() as staged:
                staged.write(data)
                if modified_at is not None:
                    staged.date(modified_at)
                with self._folders.below(self._folders.manifests, name.parts[:3], create=True) as folder:
                    return _stamp(staged.place(folder, name.tag))

        return await self._in_thread(write)

    async def delete_manifest(self, name: ModelName) -> bool:
        def delete() -> bool:
            try:
                with self._folders.below(self._folders.manifests, name.parts[:3]) as folder:
                    os.unlink(name.tag, dir_fd=folder)
                    os.fsync(folder)
            except (FileNotFoundError, NotADirectoryError):
                return False
            self._prune(name)
            return True

        return await self._in_thread(delete)

    # ── blobs ───────────────────────────────────────────────────────────────────────

    def blob_path(self, blob: BlobId) -> str:
        return str(self._folders.root / "blobs" / blob.filename)

    async def blob_size(self, blob: BlobId) -> int | None:
        def size() -> int | None:
            found = regular_stat(self._folders.blobs, blob.filename)
            return None if found is None else found.st_size

        return await self._in_thread(size)

    async def read_blob(self, blob: BlobId, limit: int) -> bytes:
        def read() -> bytes:
            with self._opened(blob) as (file, size):
                if size > limit:
                    raise InvalidModel(f"blob {blob} is {size} bytes; at most {limit} are read here")
                return _read_exactly(file, size)

        return await self._in_thread(read)

    async def read_header(self, blob: BlobId, *, verbose: bool = False) -> Header:
        def read() -> Header:
            # Read, not mapped: a file that another program cuts short must not kill us (SIGBUS).
            with self._opened(blob) as (file, size):
                for wanted in _HEADER_READS:
                    os.lseek(file, 0, os.SEEK_SET)
                    with contextlib.suppress(NeedMore):  # then with the next, larger part
                        return read_header(_read_exactly(file, min(wanted, size)), size, verbose=verbose)
                raise InvalidModel(f"the GGUF header of blob {blob} is too long")

        return await self._in_thread(read)

    async def put_blob(self, blob: BlobId, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        if await self.blob_size(blob) is not None:
            return False
        async with self._room.growing(size) as growing, self._staged() as staged:
            hasher = hashlib.sha256()

            def take(data: bytes) -> None:
                hasher.update(data)
                staged.write(data)

            pending = bytearray()
            async for chunk in chunks:
                pending += chunk
                if len(pending) >= _CHUNK_BYTES:
                    data, pending = bytes(pending), bytearray()
                    await growing.take(len(data))
                    await self._in_thread(partial(take, data))
            if pending:
                await growing.take(len(pending))
                await self._in_thread(partial(take, bytes(pending)))
            found = BlobId(hasher.hexdigest())
            if found != blob:
                raise DigestMismatch(f'digest mismatch, expected "{blob}", got "{found}"')
            return await self._in_thread(lambda: staged.place_new(self._folders.blobs, blob.filename))

    @contextlib.asynccontextmanager
    async def partial(self, blob: BlobId, size: int) -> AsyncIterator[PartialFile]:
        """See `distribution.ports.Blobs`."""
        async with self.room({blob: size}):
            partial = PartialFile(self._folders, blob, size, self._in_thread)
            try:
                await self._in_thread(partial.open)
                yield partial
            finally:
                with CancelScope(shield=True):
                    await partial.close()

    @contextlib.asynccontextmanager
    async def room(self, blobs: Mapping[BlobId, int]) -> AsyncIterator[None]:
        """See `distribution.ports.Blobs`."""
        async with self._room.room(blobs):
            yield

    async def read_range(self, blob: BlobId, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with self._opened(blob) as (file, _):
                return os.pread(file, length, offset)

        return await self._in_thread(read)

    async def room_bytes(self) -> int:
        return await self._in_thread(self._folders.room_bytes)

    async def put_bytes(self, data: bytes) -> tuple[BlobId, bool]:
        def put() -> tuple[BlobId, bool]:
            blob = BlobId(hashlib.sha256(data).hexdigest())
            if regular_stat(self._folders.blobs, blob.filename) is not None:
                return blob, False
            with self._folders.staged() as staged:
                staged.write(data)
                return blob, staged.place_new(self._folders.blobs, blob.filename)

        return await self._in_thread(put)

    async def collect(self, candidates: Collection[BlobId], keep: Collection[BlobId]) -> list[BlobId]:
        def collect() -> list[BlobId]:
            doomed = set(candidates) - set(keep)
            if doomed:
                try:
                    doomed -= self._referenced()
                except (InvalidModel, OSError) as exc:
                    # What a manifest needs is unknown: nothing may go.
                    log.warning("store.collect_skipped", error=str(exc))
                    return []
            for blob in sorted(doomed):
                with contextlib.suppress(FileNotFoundError):  # it was deleted by hand
                    os.unlink(blob.filename, dir_fd=self._folders.blobs)
            return sorted(doomed)

        return await self._in_thread(collect)

    # ── upkeep (`distribution.disk_ports.Disk`) ─────────────────────────────────────────

    async def survey(self) -> Survey:
        return await self._in_thread(lambda: upkeep.survey(self._folders))

    async def drop_leftover(self, kind: Leftover, blob: BlobId) -> bool:
        drop = upkeep.drop_partial if kind == "partial" else upkeep.drop_damaged
        return await self._in_thread(lambda: drop(self._folders, blob))

    async def take_away(self, blob: BlobId) -> None:
        await self._in_thread(lambda: upkeep.take_away(self._folders, blob))

    async def digest(self, blob: BlobId, between: Callable[[int], Awaitable[None]]) -> str:
        try:
            file = await self._in_thread(lambda: upkeep.open_cold(self._folders, blob))
        except FileNotFoundError as exc:
            raise BlobNotFound(f'blob "{blob}" not found') from exc
        hasher, at = hashlib.sha256(), 0

        def read(offset: int) -> int | None:
            try:
                data = os.pread(file, _PART_BYTES, offset)
            except OSError:
                return None
            hasher.update(data)
            upkeep.forget_pages(file, offset, len(data))
            return len(data)

        try:
            while count := await self._in_thread(partial(read, at)):
                at += count
                await between(count)
        finally:
            os.close(file)
        return "" if count is None else hasher.hexdigest()

    @contextlib.asynccontextmanager
    async def _staged(self) -> AsyncIterator[Staged]:
        """As `Folders.staged`. Removed in a thread too: of a large file that takes a while."""
        with contextlib.ExitStack() as stack:
            staged = await self._in_thread(lambda: stack.enter_context(self._folders.staged()))
            try:
                yield staged
            finally:
                with CancelScope(shield=True):
                    await self._in_thread(staged.discard)

    # ── in a worker thread ──────────────────────────────────────────────────────────

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What was begun ends before its caller does, though that is cancelled."""

        def translating() -> T:
            with translated():
                return work()

        return await to_its_end(to_thread.run_sync(translating, limiter=self._threads))

    @contextlib.contextmanager
    def _opened(self, blob: BlobId) -> Iterator[tuple[int, int]]:
        try:
            file = open_file(self._folders.blobs, blob.filename)
        except FileNotFoundError as exc:
            raise BlobNotFound(f'blob "{blob}" not found') from exc
        try:
            yield file, os.fstat(file).st_size
        finally:
            os.close(file)

    def _scan(self) -> Iterator[tuple[ModelName, ManifestStamp]]:
        seen = 0
        for parts, folder in self._walk(self._folders.manifests, ()):
            for tag in listed(folder):
                seen += 1
                if seen > _MAX_NAMES:
                    log.warning("store.too_many_manifests", limit=_MAX_NAMES)
                    return
                try:
                    name = ModelName.from_parts((*parts, tag))
                except InvalidName:
                    continue  # not a manifest that Ollama would see
                found = regular_stat(folder, tag)
                if found is not None:
                    yield name, _stamp(found)

    def _walk(
        self, folder: int, parts: tuple[str, ...], *, strict: bool = False
    ) -> Iterator[tuple[tuple[str, str, str], int]]:
        """Every folder `host/namespace/model`. What cannot be read is skipped, or, if `strict`, raised."""
        if len(parts) == 3:
            yield (parts[0], parts[1], parts[2]), folder
            return
        for part in listed(folder):
            try:
                with self._folders.below(folder, (part,)) as inner:
                    yield from self._walk(inner, (*parts, part), strict=strict)
            except (FileNotFoundError, NotADirectoryError):
                if strict and not harmless(folder, part):
                    raise
            except OSError as exc:
                if strict:
                    raise
                log.warning("store.folder_skipped", folder="/".join((*parts, part)), error=exc.strerror)

    def _referenced(self) -> set[BlobId]:
        """Every digest that any manifest names, also one that cannot be parsed.

        Raises when a manifest may be there that cannot be read (Ollama follows links, we do not):
        its blobs must not be taken for unused.
        """
        found: set[BlobId] = set()
        for _, folder in self._walk(self._folders.manifests, (), strict=True):
            for tag in listed(folder):
                try:
                    found |= named_blobs(_read_manifest(folder, tag).data)
                except FileNotFoundError:
                    if not harmless(folder, tag):
                        raise
        return found

    def _prune(self, name: ModelName) -> None:
        """Remove the folders of a deleted manifest, up to the first that is still in use."""
        for depth in (2, 1, 0):
            try:
                with self._folders.below(self._folders.manifests, name.parts[:depth]) as folder:
                    os.rmdir(name.parts[depth], dir_fd=folder)
            except OSError:
                return


def _read_manifest(folder: int, tag: str) -> StoredManifest:
    file = open_file(folder, tag)
    try:
        found = os.fstat(file)
        if found.st_size > MAX_MANIFEST_BYTES:
            raise InvalidModel(f"manifest is {found.st_size} bytes; at most {MAX_MANIFEST_BYTES} are read")
        return StoredManifest(_read_exactly(file, found.st_size), _stamp(found))
    finally:
        os.close(file)


def _read_exactly(file: int, size: int) -> bytes:
    pieces: list[bytes] = []
    while size > 0:
        piece = os.read(file, size)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _stamp(found: os.stat_result) -> ManifestStamp:
    return ManifestStamp(found.st_mtime, found.st_size, found.st_ino)
