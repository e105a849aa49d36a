"""Models from one file (`models.bundle`), as it comes: all that it names, or nothing.

Each blob is hashed while it is written and gets its name only when it is right; what the store
has already is passed over, and need not be in the file at all. Names come last, when every
model has been looked at. On any failure, or when the sender goes away, what came is removed.
The small files may come first (as ours do) or last (as other programs write them).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from typing import Literal

import anyio
import msgspec
import structlog
from anyio import to_thread

from ollama_distributed.base.errors import (
    BlobNotFound,
    Conflict,
    Invalid,
    InvalidModel,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
)
from ollama_distributed.distribution.packing import Resolve
from ollama_distributed.distribution.ports import Library, Store
from ollama_distributed.models import bundle
from ollama_distributed.models.bundle import Listed
from ollama_distributed.models.held import spec_of_name
from ollama_distributed.models.manifest import MAX_MANIFEST_BYTES, Layer, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.tar import Member, TarReader

log = structlog.get_logger()


State = Literal["imported", "replaced", "unchanged"]


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a bundle, as REST shows it."""

    name: str
    digest: str
    size: int
    state: State


class Unpacking:
    def __init__(self, store: Store, library: Library, resolve: Resolve) -> None:
        self._store = store
        self._library = library
        self._resolve = resolve

    async def unpack(
        self, chunks: AsyncIterator[bytes], *, name: str = "", replace: bool = False
    ) -> Sequence[Imported]:
        """`name`: what the one model of the bundle is to be called here; `replace`: other models
        of the same names.

        Raises:
            InvalidModel, DigestMismatch: the file is damaged or is no bundle; says what is wrong.
            Conflict: a name is another model's here.
            Invalid, InvalidName: `name` is none, or the bundle holds several models.
            DiskFull: there is no room for the rest.
        """
        target = ModelName.parse(name) if name else None
        work = _Import(self._store, self._library, self._resolve, target, replace)
        try:
            with ExitStack() as pins:
                done = await work.run(_Members(chunks), pins)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._library.forget(work.made)
            raise
        await self._library.forget(work.made | work.unused)  # also manifests, which were stored as blobs
        log.info("distribution.imported", models=[one.name for one in done], new_blobs=len(work.made))
        return done


class _Members:
    """The files of a bundle as they come."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._reader = TarReader()
        self._events: deque[Member | memoryview] = deque()
        self._left = 0
        """Bytes of this file that nobody took yet."""

    async def next(self) -> Member | None:
        """The next file; None: there are no more. What nobody took of this one is passed over."""
        async for _ in self.data():
            pass
        event = await self._event()
        if event is None:
            return None
        assert isinstance(event, Member)
        self._left = event.size
        return event

    async def data(self) -> AsyncGenerator[bytes]:
        """The rest of this file."""
        while self._left:
            event = await self._event()
            if event is None:
                raise InvalidModel("the bundle is cut short: it ends inside a file")
            assert isinstance(event, memoryview)
            self._left -= len(event)
            yield bytes(event)

    async def whole(self, member: Member, limit: int) -> bytes:
        if member.size > limit:
            raise InvalidModel(f"the bundle's {member.name} has {member.size} bytes; {limit} are read")
        return b"".join([part async for part in self.data()])

    async def _event(self) -> Member | memoryview | None:
        while not self._events:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                self._reader.end()
                return None
            self._events.extend(self._reader.feed(chunk))
        return self._events.popleft()


class _Model(msgspec.Struct, frozen=True):
    name: ModelName
    manifest: bytes
    layers: tuple[Layer, ...]
    """The config among them, each once."""


class _Naming(msgspec.Struct, frozen=True):
    state: State
    before: bytes | None
    """The manifest of this name that is here."""
    made_at: float | None = None
    """Of the version in the cluster that this is a copy of; None: it is new."""


class _Import:
    """One bundle."""

    def __init__(
        self, store: Store, library: Library, resolve: Resolve, name: ModelName | None, replace: bool
    ) -> None:
        self._store = store
        self._library = library
        self._resolve = resolve
        self._name = name
        self._replace = replace
        self.made: set[BlobId] = set()
        """Blobs that were not here before."""
        self.unused: set[BlobId] = set()
        """Those that only replaced models needed."""
        self._pins: ExitStack
        self._layout = False
        self._listed: list[Listed] | None = None
        self._sizes: dict[BlobId, int] = {}
        """Of the manifests that it lists; then, with `_models`, of their blobs."""
        self._manifests: dict[BlobId, bytes] = {}
        self._seen: set[BlobId] = set()
        self._models: list[_Model] | None = None
        """As soon as the index and all manifests are known."""

    async def run(self, members: _Members, pins: ExitStack) -> list[Imported]:
        """`pins`: what must stay until the names are written."""
        self._pins = pins
        while (member := await members.next()) is not None:
            if member.name == bundle.LAYOUT:
                bundle.read_layout(await members.whole(member, bundle.MAX_SMALL_BYTES))
                self._layout = True
            elif member.name == bundle.INDEX:
                await self._read_index(await members.whole(member, bundle.MAX_SMALL_BYTES))
            elif member.name.startswith(bundle.BLOBS):
                await self._blob(member, members)
        return await self._name_all()

    # ── as it comes ─────────────────────────────────────────────────────────────────

    async def _read_index(self, data: bytes) -> None:
        if self._listed is not None:
            raise InvalidModel(f"the bundle has two files {bundle.INDEX}")
        self._listed = await to_thread.run_sync(bundle.read_index, data)
        self._sizes = {listed.manifest: listed.size for listed in self._listed}
        if self._name is not None and len(self._listed) != 1:
            raise Invalid(
                f"the bundle holds {len(self._listed)} models; a name can be given to one only", param="name"
            )
        await self._look_ahead()

    async def _blob(self, member: Member, members: _Members) -> None:
        try:
            blob = BlobId(member.name.removeprefix(bundle.BLOBS))
        except InvalidName as exc:
            raise InvalidModel(f"the bundle has a blob {member.name!r}, which is named by no digest") from exc
        if blob in self._seen:
            raise InvalidModel(f"the bundle holds blob {blob} twice")
        self._seen.add(blob)
        size = self._sizes.get(blob)
        if size is not None and size != member.size:
            raise InvalidModel(f"the bundle has {member.size} bytes of blob {blob}; they should be {size}")
        if self._models is None and size is not None:
            data = await members.whole(member, MAX_MANIFEST_BYTES)
            if bundle.digest_of(data) != blob:
                raise InvalidModel(f"the bundle's manifest {blob} has another content")
            self._manifests[blob] = data
            await self._look_ahead()
        elif self._models is None or size is not None:  # without an index yet, it may be wanted
            await self._take(blob, member.size, members)

    async def _take(self, blob: BlobId, size: int, members: _Members) -> None:
        self._pins.enter_context(self._library.pinned((blob,)))
        if await self._store.blob_size(blob) is not None:
            return
        async with aclosing(members.data()) as parts:
            if await self._store.put_blob(blob, parts, size):
                self.made.add(blob)

    async def _look_ahead(self) -> None:
        """Refuse what can be refused before the large files come."""
        if self._listed is None or any(one.manifest not in self._manifests for one in self._listed):
            return
        models = [await self._model(listed) for listed in self._listed]
        self._models = list({model.name.key: model for model in models}.values())
        if len({(model.name.key, model.manifest) for model in models}) > len(self._models):
            raise InvalidModel("the bundle calls two models by one name")
        for model in self._models:
            await self._plan(model)
        self._sizes = {layer.blob: layer.size for model in self._models for layer in model.layers}
        async with self._store.room(self._sizes):
            pass  # there is some; each blob asks for its own again when it comes

    async def _model(self, listed: Listed) -> _Model:
        name = self._name or listed.name
        if name is None:
            raise InvalidModel("the bundle does not say what its model is called; give it a name")
        data = self._manifests[listed.manifest]
        manifest = await to_thread.run_sync(parse_manifest, data)
        layers = {layer.digest: layer for layer in (*manifest.layers, manifest.config)}
        return _Model(self._library.settled(name), data, tuple(layers.values()))

    async def _plan(self, model: _Model) -> _Naming:
        """What naming it means.

        Raises:
            Conflict: the name is another model's.
        """
        here = await self._library.manifest(model.name)
        digest = bundle.digest_of(model.manifest).hex
        try:
            known: ModelSpec | None = await self._resolve(str(model.name))
        except ModelNotFound:
            known = None
        except InvalidModel:  # there is one that cannot be served
            known = None if here == model.manifest else spec_of_name(model.name.key)
        if known is None:
            return _Naming("imported", before=here)
        if known.digest == digest:
            state: State = "unchanged" if here == model.manifest else "imported"
            return _Naming(state, before=here, made_at=known.modified_at)
        if self._replace:
            return _Naming("replaced", before=here)
        raise Conflict(
            f"model '{model.name.display}' is there already and is not the one of the bundle; replace it, or "
            "give the bundle's another name"
        )

    # ── when all is here ────────────────────────────────────────────────────────────

    async def _name_all(self) -> list[Imported]:
        if self._listed is None or not self._layout:
            missing = bundle.INDEX if self._layout else bundle.LAYOUT
            raise InvalidModel(f"the bundle has no {missing}: it is no OCI image layout, or it is cut short")
        for listed in self._listed:
            if listed.manifest not in self._manifests:
                self._manifests[listed.manifest] = await self._stored(listed)
        if self._models is None:
            await self._look_ahead()
        assert self._models is not None
        for model in self._models:
            await self._check(model)
        return await self._adopt(self._models)

    async def _stored(self, listed: Listed) -> bytes:
        """A manifest that came before the index: among the blobs."""
        try:
            data = await self._store.read_range(listed.manifest, 0, listed.size + 1)
        except BlobNotFound as exc:
            raise InvalidModel(f"the bundle lacks manifest {listed.manifest}") from exc
        if len(data) != listed.size:
            raise InvalidModel(f"the bundle's manifest {listed.manifest} is not as long as its index says")
        return data

    async def _check(self, model: _Model) -> None:
        for layer in model.layers:
            size = await self._store.blob_size(layer.blob)
            if size is None:
                raise InvalidModel(f"the bundle lacks blob {layer.digest} of {model.name.display}")
            if size != layer.size:
                raise InvalidModel(
                    f"blob {layer.digest} of {model.name.display} has {size} bytes here; its manifest says "
                    f"{layer.size}"
                )
        await self._library.examine(model.name, model.manifest)

    async def _adopt(self, models: Sequence[_Model]) -> list[Imported]:
        """Name them all, or none."""
        done: list[Imported] = []
        undo: list[tuple[ModelName, bytes | None]] = []
        try:
            for model in models:
                naming = await self._plan(model)
                if naming.state != "unchanged":
                    undo.append((model.name, naming.before))
                    self.unused |= await self._library.adopt(model.name, model.manifest, naming.made_at)
                done.append(
                    Imported(
                        name=model.name.display,
                        digest=bundle.digest_of(model.manifest).hex,
                        size=sum(layer.size for layer in model.layers),
                        state=naming.state,
                    )
                )
        except BaseException:
            with anyio.CancelScope(shield=True):
                for name, before in reversed(undo):
                    await self._take_back(name, before)
            raise
        return done

    async def _take_back(self, name: ModelName, before: bytes | None) -> None:
        try:
            if before is None:
                await self._library.delete(str(name))
            else:
                await self._library.adopt(name, before)
        except ModelNotFound:
            return  # it was not named yet
        except OllamaDistributedError as exc:
            log.warning("distribution.import_not_undone", model=name.display, error=exc.message)
