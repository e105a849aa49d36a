"""The models of this node: what there is, what it is, and how it comes and goes.

An index in memory answers `resolve` and `list`. It is built by `start()`, kept fresh by
`refresh()` (which `run()` repeats), by its own writes, and by a look at the disk when a
name is missing, so that what a real Ollama puts into the same store appears.
Error texts are Ollama's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import anyio
import structlog

from ollama_distributed.base.clock import Clock, SystemClock
from ollama_distributed.base.errors import (
    BlobNotFound,
    Conflict,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    Unsupported,
)
from ollama_distributed.catalog.creation import Creation
from ollama_distributed.catalog.entries import Entry, read_entry, stored_model
from ollama_distributed.catalog.ports import ManifestStamp, RemoteModels, Store, StoredManifest
from ollama_distributed.catalog.remotes import RemoteLists
from ollama_distributed.catalog.showing import show_entry, show_remote
from ollama_distributed.catalog.versions import History, history_of_nothing, next_time
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.models.manifest import named_blobs, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName, as_spelled, name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.stored import StoredModel

log = structlog.get_logger()

REFRESH_S = 5.0
"""Between two looks at the store: a pull by another program shows up within this."""
_MISS_SCAN_S = 1.0
"""Least time between scans that missing names cause: a flood of them must not become disk load."""
_NO_STAMP = ManifestStamp(0.0, 0, 0)
"""Of a manifest that is not on disk yet."""


class _Broken:
    """A manifest that cannot be served, remembered so that it is not read at each scan."""

    def __init__(self, name: ModelName, stored: StoredManifest, error: OllamaDistributedError) -> None:
        self.stamp = stored.stamp
        self.stored = stored_model(name, stored, error)
        self.error = error
        if isinstance(error, BlobNotFound):
            self.error = BlobNotFound(
                f"model '{name.display}' is damaged ({error.message}); fetch it again: "
                f"ollama-distributed pull {name.display}"
            )


class Catalog:
    """See the module. All methods are safe to run at the same time on one event loop."""

    def __init__(
        self,
        store: Store,
        *,
        remotes: Sequence[RemoteModels] = (),
        clock: Clock | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._remotes = RemoteLists(remotes)
        self._clock = clock or SystemClock()
        self._on_change = on_change
        self._entries: dict[str, Entry] = {}
        self._broken: dict[str, _Broken] = {}
        self._pinned: Counter[BlobId] = Counter()
        self._writing = anyio.Lock()
        """Held while manifests change or are read into the index, and while blobs are collected:
        no collection takes a blob that a manifest is about to name, and no deleted model comes
        back."""
        self._scanning = anyio.Lock()
        self._scanned_at = float("-inf")
        self._history: Callable[[str], History] = history_of_nothing

    def follow(self, history: Callable[[str], History]) -> None:
        """From now on this node's names have versions elsewhere too; by `name_key`."""
        self._history = history

    # ── index ───────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Build the index. Models that cannot be served are logged and left out."""
        await self.refresh()
        log.info("catalog.started", models=len(self._entries), broken=len(self._broken))

    async def run(self, interval_s: float = REFRESH_S) -> None:
        """Keep the index fresh until cancelled."""
        while True:
            await anyio.sleep(interval_s)
            try:
                await self.refresh()
            except (OSError, OllamaDistributedError) as exc:
                log.warning("catalog.refresh_failed", error=str(exc))

    async def refresh(self) -> None:
        """Bring the index up to what is on disk and at the remote engines."""
        await self._refresh_store()
        await self._remotes.refresh()

    async def resolve(self, name: str) -> ModelSpec:
        """The model of this name; from memory when it is known.

        Raises:
            ModelNotFound: there is none, or the name is no name.
            InvalidModel: there is one that cannot be served; the message says why.
        """
        key = name_key(name)
        spec = self._known(key)
        if spec is None:
            with contextlib.suppress(InvalidName):
                await self._look_again(ModelName.parse(name))
            spec = self._known(key)
        if spec is None:
            broken = self._broken.get(key)
            if broken is not None:
                raise broken.error.with_traceback(None)
            raise ModelNotFound(f"model '{name}' not found")
        return spec

    def known(self, name: str) -> ModelSpec | None:
        """From memory; None: `resolve` finds it, or says why not."""
        return self._known(name_key(name))

    def knows(self, name: str) -> bool:
        """Whether there is a model of this name, as far as memory says."""
        return self._known(name_key(name)) is not None

    def version(self, name: str) -> str:
        """The digest of its manifest, as far as memory says; empty: there is no such model."""
        spec = self._known(name_key(name))
        return spec.digest if spec is not None else ""

    def parameters(self, name: str) -> Mapping[str, Any]:
        """The model's own, from memory; none of one that is not known here."""
        spec = self._known(name_key(name))
        return spec.parameters if spec is not None else {}

    def list(self) -> list[ModelSpec]:
        """All models, newest first; remote ones among them."""
        local = [entry.spec for entry in self._entries.values()]
        remote = [spec for key, spec in self._remotes.specs.items() if key not in self._entries]
        return sorted(local + remote, key=lambda spec: (-spec.modified_at, spec.name))

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

    def models(self) -> Mapping[str, float]:
        """When each model on disk was made, by `name_key`."""
        return {key: entry.stamp.modified_at for key, entry in self._entries.items()} | {
            key: broken.stamp.modified_at for key, broken in self._broken.items()
        }

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

    def stored(self) -> Sequence[StoredModel]:
        found = [entry.stored for entry in self._entries.values()]
        return found + [broken.stored for broken in self._broken.values() if broken.stored is not None]

    def in_use(self) -> Collection[BlobId]:
        return self._pinned.keys()

    async def recheck(self, blobs: Collection[BlobId]) -> Sequence[StoredModel]:
        """These were lost, or are here again: look at the models that need them. Returns them."""
        touched = [one for one in self.stored() if not one.blobs.keys().isdisjoint(blobs)]
        async with self._writing:
            for one in touched:
                await self._reread(one.name)
        if touched:
            self._on_change()
        return touched

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
            self._entries.pop(name.key, None)
            self._broken.pop(name.key, None)
            self._on_change()
        return there

    def _known(self, key: str) -> ModelSpec | None:
        entry = self._entries.get(key)
        return entry.spec if entry else self._remotes.specs.get(key)

    async def _entry_or_none(self, name: ModelName) -> Entry | None:
        """For `create --from`: looks at the disk when the name is not known."""
        await self._look_again(name)
        broken = self._broken.get(name.key)
        if name.key not in self._entries and broken is not None:
            raise broken.error.with_traceback(None)
        return self._entries.get(name.key)

    def settled(self, name: ModelName) -> ModelName:
        """The spelling that is on disk already, as far as it matches without case.

        Else two names that are equal to people would be two files.
        """
        return as_spelled(name, (*(entry.name for entry in self._entries.values()), *self._broken_names()))

    def _broken_names(self) -> Iterator[ModelName]:
        for full in self._broken:
            yield ModelName.parse(full)

    async def _look_again(self, name: ModelName) -> None:
        """A name is missing: is it on disk by now? Looks for this spelling, then, at most once
        a second, at all names."""
        if name.key in self._entries:
            return
        if name.key not in self._broken:
            async with self._writing:
                await self._reread(name)
        if name.key not in self._entries and self._may_scan():
            self._broken.pop(name.key, None)
            await self._refresh_store()

    def _may_scan(self) -> bool:
        return self._clock.monotonic() - self._scanned_at >= _MISS_SCAN_S

    async def _refresh_store(self) -> None:
        async with self._scanning:
            self._scanned_at = self._clock.monotonic()
            found = await self._store.scan()
            keys = {name.key for name in found}
            gone = [key for key in (*self._entries, *self._broken) if key not in keys]
            for key in gone:
                # A write of ours may have come after the scan: only what is gone from disk is gone.
                async with self._writing:
                    if await self._store.read_manifest(self._name_of(key)) is None:
                        self._entries.pop(key, None)
                        self._broken.pop(key, None)
            changed = bool(gone)
            for name, stamp in found.items():
                entry, broken = self._entries.get(name.key), self._broken.get(name.key)
                known = entry.stamp if entry else broken.stamp if broken else None
                if known != stamp:
                    async with self._writing:
                        await self._reread(name)
                    changed = True
        if changed:
            self._on_change()

    def _name_of(self, key: str) -> ModelName:
        entry = self._entries.get(key)
        return entry.name if entry else ModelName.parse(key)

    async def _reread(self, name: ModelName) -> None:
        """Read it into the index. Only while writing: what was read must still be on disk after."""
        stored = await self._store.read_manifest(name)
        if stored is None:
            return
        try:
            entry = await read_entry(self._store, name, stored)
        except OllamaDistributedError as exc:
            self._entries.pop(name.key, None)
            self._broken[name.key] = _Broken(name, stored, exc)
            log.warning("catalog.model_unusable", model=name.display, error=exc.message)
            return
        self._broken.pop(name.key, None)
        self._entries[name.key] = entry
        self._on_change()

    @contextlib.contextmanager
    def pinned(self, blobs: Collection[BlobId]) -> Iterator[None]:
        """No collection takes these while a create or a pull is under way."""
        self._pinned.update(blobs)
        try:
            yield
        finally:
            self._pinned.subtract(blobs)
            self._pinned += Counter()


def _parsed(text: str, message: str) -> ModelName:
    try:
        return ModelName.parse(text)
    except InvalidName as exc:
        raise InvalidName(message) from exc
