"""What models there are on this node, in memory.

The index answers `resolve` and `list`. It is built by `start()`, kept fresh by `refresh()` (which
`run()` repeats), by the catalogue's own writes, and by a look at the disk when a name is missing, so
that what a real Ollama puts into the same store appears.
Error texts are Ollama's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    BlobNotFound,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
)
from ollama_distributed.catalog.entries import Entry, read_entry, stored_model
from ollama_distributed.catalog.ports import RemoteModels, Store, StoredManifest
from ollama_distributed.catalog.remotes import RemoteLists
from ollama_distributed.models.names import BlobId, ModelName, as_spelled, name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.stored import StoredModel

log = structlog.get_logger()

REFRESH_S = 5.0
"""Between two looks at the store: a pull by another program shows up within this."""
_MISS_SCAN_S = 1.0
"""Least time between scans that missing names cause: a flood of them must not become disk load."""


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


class Index:
    """Of one store and the engines beside it. All methods are safe to run at the same time on one
    event loop."""

    def __init__(
        self, store: Store, remotes: Sequence[RemoteModels], clock: Clock, on_change: Callable[[], None]
    ) -> None:
        self._store = store
        self._remotes = RemoteLists(remotes)
        self._clock = clock
        self._on_change = on_change
        self._entries: dict[str, Entry] = {}
        self._broken: dict[str, _Broken] = {}
        self._writing = anyio.Lock()
        """Held while manifests change or are read into the index, and while blobs are collected:
        no collection takes a blob that a manifest is about to name, and no deleted model comes
        back."""
        self._scanning = anyio.Lock()
        self._scanned_at = float("-inf")

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
            with contextlib.suppress(InvalidName):  # no name: there is no such model either
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

    def models(self) -> Mapping[str, float]:
        """When each model on disk was made, by `name_key`."""
        return {key: entry.stamp.modified_at for key, entry in self._entries.items()} | {
            key: broken.stamp.modified_at for key, broken in self._broken.items()
        }

    def stored(self) -> Sequence[StoredModel]:
        found = [entry.stored for entry in self._entries.values()]
        return found + [broken.stored for broken in self._broken.values() if broken.stored is not None]

    def settled(self, name: ModelName) -> ModelName:
        """The spelling that is on disk already, as far as it matches without case.

        Else two names that are equal to people would be two files.
        """
        return as_spelled(name, (*(entry.name for entry in self._entries.values()), *self._broken_names()))

    def _broken_names(self) -> Iterator[ModelName]:
        for full in self._broken:
            yield ModelName.parse(full)

    async def recheck(self, blobs: Collection[BlobId]) -> Sequence[StoredModel]:
        """These were lost, or are here again: look at the models that need them. Returns them."""
        touched = [one for one in self.stored() if not one.blobs.keys().isdisjoint(blobs)]
        async with self._writing:
            for one in touched:
                await self._reread(one.name)
        if touched:
            self._on_change()
        return touched

    # ── for the changes of it ───────────────────────────────────────────────────────

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

    def _name_of(self, key: str) -> ModelName:
        entry = self._entries.get(key)
        return entry.name if entry else ModelName.parse(key)

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
                        self._drop(key)
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

    def _drop(self, key: str) -> None:
        """It is gone from disk."""
        self._entries.pop(key, None)
        self._broken.pop(key, None)
