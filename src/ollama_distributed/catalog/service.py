"""The models of this node: how they come and go. What there is says the index.

Error texts are Ollama's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence

import anyio
import structlog

from ollama_distributed.base.clock import Clock, SystemClock
from ollama_distributed.base.errors import (
    BlobNotFound,
    Conflict,
    InvalidName,
    ModelNotFound,
    Unsupported,
)
from ollama_distributed.catalog.creation import Creation
from ollama_distributed.catalog.entries import read_entry
from ollama_distributed.catalog.index import Index
from ollama_distributed.catalog.ports import ManifestStamp, RemoteModels, Store, StoredManifest
from ollama_distributed.catalog.showing import show_entry, show_remote
from ollama_distributed.catalog.versions import History, history_of_nothing, next_time
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.models.manifest import named_blobs, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName, name_key

log = structlog.get_logger()

_NO_STAMP = ManifestStamp(0.0, 0, 0)
"""Of a manifest that is not on disk yet."""


class Catalog(Index):
    def __init__(
        self,
        store: Store,
        *,
        remotes: Sequence[RemoteModels] = (),
        clock: Clock | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(store, remotes, clock or SystemClock(), on_change)
        self._pinned: Counter[BlobId] = Counter()
        self._history: Callable[[str], History] = history_of_nothing

    def follow(self, history: Callable[[str], History]) -> None:
        """From now on this node's names have versions elsewhere too; by `name_key`."""
        self._history = history

    # ── questions and changes ───────────────────────────────────────────────────────

    async def show(self, name: str, *, verbose: bool = False, system: str = "") -> ShownModel:
        spec = await self.resolve(name)
        entry = self._entries.get(name_key(name))
        if entry is None:
            return show_remote(spec)
        return await show_entry(self._store, entry, verbose=verbose, system=system)

    async def create(self, request: CreateRequest) -> AsyncIterator[CreateStatus]:
        """Make a model; yields what `ollama create` prints, ending with `success`.

        Refusals of the request itself are raised before the first status.
        """
        creation = Creation(self._store, request, self._entry_or_none)
        name = self.settled(creation.target)
        await creation.prepare()
        try:
            with self.pinned(creation.needed()):
                async for status in creation.write_layers():
                    yield status
                yield CreateStatus(status="writing manifest")
                async with self._writing:
                    await creation.check_complete()
                    old = await self._store.read_manifest(name)
                    await self._write(name, creation.manifest_bytes())
                    await self._reread(name)
        except BaseException:
            # Also when the client went away: what was stored for nothing goes.
            with anyio.CancelScope(shield=True):
                await self.forget(creation.made)
            raise
        await self.forget(named_blobs(old.data) if old else set())
        log.info("catalog.created", model=name.display)
        yield CreateStatus(status="success")

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name.

        Raises:
            ModelNotFound: `model "x" not found`.
            InvalidName: `source "x" is invalid`, `destination "x" is invalid`.
        """
        here = self.settled(_parsed(source, f'source "{source}" is invalid'))
        there = self.settled(_parsed(destination, f'destination "{destination}" is invalid'))
        await self._look_again(here)
        entry = self._entries.get(here.key)
        if entry is None:
            if here.key in self._remotes.specs:
                raise Unsupported(f"{source} lives in another engine on this machine and cannot be copied")
            raise ModelNotFound(f'model "{source}" not found')
        if entry.name.key == there.key:
            return
        async with self._writing:
            stored = await self._store.read_manifest(entry.name)
            if stored is None:
                raise ModelNotFound(f'model "{source}" not found')
            old = await self._store.read_manifest(there)
            await self._write(there, stored.data)
            await self._reread(there)
        await self.forget(named_blobs(old.data) if old else set())

    async def delete(self, name: str) -> None:
        """Remove a name, and the blobs that no other name needs.

        Raises:
            ModelNotFound: `model 'x' not found`.
            InvalidName: `name "x" is invalid`.
        """
        target = self.settled(_parsed(name, f'name "{name}" is invalid'))
        if target.key in self._remotes.specs and target.key not in self._entries:
            raise Unsupported(f"{name} lives in another engine on this machine; delete it there")
        async with self._writing:
            stored = await self._store.read_manifest(target)
            if stored is None or not await self._remove(target):
                raise ModelNotFound(f"model '{name}' not found")
        log.info("catalog.deleted", model=target.display)
        await self.forget(named_blobs(stored.data))

    async def has_blob(self, digest: str) -> bool:
        """Raises InvalidName: `invalid digest format`."""
        return await self._store.blob_size(BlobId.parse(digest)) is not None

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        """True: newly made; False: it was there (the chunks are then not read). `size`: how much will
        come, where that is said.

        Raises:
            DigestMismatch: `digest mismatch, expected "...", got "..."`.
            DiskFull: nothing was left behind.
        """
        return await self._store.put_blob(BlobId.parse(digest), chunks, size)

    # ── for models that come from elsewhere (`distribution.ports.Library`) ──────────────

    async def manifest(self, name: ModelName) -> bytes | None:
        stored = await self._store.read_manifest(self.settled(name))
        return None if stored is None else stored.data

    async def examine(self, name: ModelName, manifest: bytes) -> None:
        """Whether a model whose blobs are all here could be served. Raises as `adopt`."""
        for blob in parse_manifest(manifest).blobs():
            if await self._store.blob_size(blob) is None:
                raise BlobNotFound(f'blob "{blob}" not found')
        await read_entry(self._store, name, StoredManifest(manifest, _NO_STAMP))

    async def adopt(self, name: ModelName, manifest: bytes, made_at: float | None = None) -> set[BlobId]:
        """Name a model whose blobs are all here. Returns the blobs that only its last version used.
        `made_at`: when the version that this is a copy of was made; None: it is new.

        Raises:
            InvalidModel: it cannot be served; the message says why. Nothing was changed.
            BlobNotFound: one is not here.
            ModelNotFound: this version was deleted in the whole cluster meanwhile.
            Conflict: a newer version is here.
        """
        target = self.settled(name)
        async with self._writing:
            await self.examine(target, manifest)
            old = await self._store.read_manifest(target)
            if made_at is not None:
                if made_at <= self._history(target.key).deleted_until:
                    raise ModelNotFound(f"model '{name.display}' was deleted meanwhile")
                if old is not None and old.stamp.modified_at > made_at:
                    if old.data != manifest:
                        raise Conflict(f"a newer version of '{name.display}' is here")
                    made_at = old.stamp.modified_at
            await self._write(target, manifest, made_at)
            await self._reread(target)
        log.info("catalog.adopted", model=target.display)
        return (named_blobs(old.data) if old else set()) - named_blobs(manifest)

    # ── what was deleted in the whole cluster ───────────────────────────────────────────

    async def clear(self, key: str, until: float) -> bool:
        """Remove a name, unless its version is newer than that. False: it is."""
        target = self._name_of(key)
        async with self._writing:
            stored = await self._store.read_manifest(target)
            if stored is None or stored.stamp.modified_at > until:
                return False
            await self._remove(target)
        log.info("catalog.deleted", model=target.display)
        await self.forget(named_blobs(stored.data))
        return True

    async def renew(self, key: str) -> None:
        """Make the version that is here a new one."""
        target = self._name_of(key)
        async with self._writing:
            stored = await self._store.read_manifest(target)
            if stored is not None:
                await self._write(target, stored.data)
                await self._reread(target)

    async def forget(self, blobs: Collection[BlobId]) -> None:
        """Remove those that no manifest names and nobody has pinned."""
        if not blobs:
            return
        async with self._writing:
            removed = await self._store.collect(blobs, set(self._pinned))
        if removed:
            log.info("catalog.blobs_removed", blobs=len(removed))

    # ── for whoever looks after the disk (`distribution.disk_ports.Models`) ─────────────

    def in_use(self) -> Collection[BlobId]:
        return self._pinned.keys()

    @contextlib.contextmanager
    def pinned(self, blobs: Collection[BlobId]) -> Iterator[None]:
        """No collection takes these while a create or a pull is under way."""
        self._pinned.update(blobs)
        try:
            yield
        finally:
            self._pinned.subtract(blobs)
            self._pinned += Counter()

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _write(self, name: ModelName, data: bytes, made_at: float | None = None) -> None:
        """While writing. What is new is newer than all that is known of its name."""
        if made_at is None:
            entry = self._entries.get(name.key)
            here_at = entry.stamp.modified_at if entry is not None else 0.0
            made_at = next_time(self._clock.time(), self._history(name.key), here_at)
        await self._store.write_manifest(name, data, made_at)

    async def _remove(self, name: ModelName) -> bool:
        """While writing. False: it was gone."""
        there = await self._store.delete_manifest(name)
        if there:
            self._drop(name.key)
            self._on_change()
        return there


def _parsed(text: str, message: str) -> ModelName:
    try:
        return ModelName.parse(text)
    except InvalidName as exc:
        raise InvalidName(message) from exc
