"""Models from and to registries: pull and push of a name, in Ollama's steps and words.

One pull of a name at a time: who asks for the same meanwhile takes part in it. One fetch of a
blob at a time, whichever names need it. What was fetched stays when everyone goes away, and
the next pull takes it up. A blob is visible only whole and checked; the manifest comes last.
Source: Ollama `server/images.go` (PullModel, PushModel).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import anyio
import msgspec
import structlog

from ollama_distributed.base.errors import (
    DigestMismatch,
    DiskFull,
    InvalidModel,
    ModelNotFound,
    OllamaDistributedError,
    RegistryError,
)
from ollama_distributed.distribution.copies import ClusterSource
from ollama_distributed.distribution.joint import Joint, Joints
from ollama_distributed.distribution.ports import Blobs, Library, Origin, Partial, Registry, Status
from ollama_distributed.distribution.progress import Progress
from ollama_distributed.distribution.tally import Tally
from ollama_distributed.models.manifest import Layer, Manifest, parse_manifest
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.stored import sizes_of

log = structlog.get_logger()

TICK_S = 0.06
"""Between two looks at a running transfer; Ollama's."""


class Fetch:
    """A blob on its way: what those who wait for it see."""

    def __init__(
        self, blob: BlobId, size: int, name: ModelName | None, ahead: Callable[[BlobId], int] = lambda _: 0
    ) -> None:
        self.blob = blob
        self.size = size
        self.name = name
        self._ahead = ahead
        """For whom the fetch began: it comes from this name's registry. None: from other nodes."""
        self.partial: Partial | None = None
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """All bytes are here; what remains is to check them."""

    @property
    def here(self) -> int:
        if self.arrived.done():
            return self.size
        return (self.partial.here if self.partial is not None else 0) or self._ahead(self.blob)

    async def finish(self) -> None:
        """All bytes are here; are they right? Raises as `Partial.finish`."""
        assert self.partial is not None
        if not self.arrived.done():
            self.arrived.set_result(None)
        await self.partial.finish()


class Alone:
    """Implements `Origin`: straight from a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @asynccontextmanager
    async def manifest(self, name: ModelName) -> AsyncIterator[bytes]:
        yield await self._registry.manifest(name)

    async def fetch(
        self, name: ModelName, blob: BlobId, into: Partial, finish: Callable[[], Awaitable[None]]
    ) -> None:
        await self._registry.fetch(name, blob, into)
        await finish()

    def ahead(self, blob: BlobId) -> int:  # noqa: ARG002 - the port's
        return 0

    def disproved(self, name: ModelName, blob: BlobId) -> bool:
        return self._registry.disproved(name, blob)

    def made_at(self, name: ModelName) -> float | None:  # noqa: ARG002 - the port's
        return None


class Lender(Protocol):
    """Has what is to be pushed."""

    def version(self, name: ModelName, progress: Progress) -> AbstractAsyncContextManager[bytes | None]:
        """The manifest of the version that counts; its blobs are here as long as the context lasts.
        None: there is no such model."""
        ...


class Owner:
    """Implements `Lender`: what is here anyway."""

    def __init__(self, library: Library) -> None:
        self._library = library

    @asynccontextmanager
    async def version(self, name: ModelName, progress: Progress) -> AsyncIterator[bytes | None]:  # noqa: ARG002 - the port's
        yield await self._library.manifest(name)


class Copied(Alone):
    """From nodes that hold it (`distribution.copies.ClusterSource`)."""

    def __init__(self, source: ClusterSource) -> None:
        super().__init__(source)
        self._source = source

    def made_at(self, name: ModelName) -> float | None:
        return self._source.made_at(name)


class Pulls:
    """Use as a context: at its end running work is cancelled, and what was fetched stays."""

    def __init__(
        self,
        registry: Registry,
        blobs: Blobs,
        library: Library,
        *,
        tick_s: float = TICK_S,
        fetches: Joints[Fetch] | None = None,
        origin: Origin | None = None,
        tally: Tally | None = None,
        kind: str = "pull",
    ) -> None:
        """`fetches`: shared with others that fetch into the same store. `origin`: how to reach the
        registry for what is pulled, if not straight. `kind`: under which pulls are counted."""
        self.registry = registry
        self._origin = Alone(registry) if origin is None else origin
        self._blobs = blobs
        self._library = library
        self._lender: Lender = Owner(library)
        self._tick_s = tick_s
        self._tally = tally or Tally()
        self._kind = kind
        self._work: Joints[Progress] = Joints()
        self.fetches: Joints[Fetch] = Joints() if fetches is None else fetches

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._work.close()
        await self.fetches.close()

    def go_by(self, origin: Origin, lender: Lender) -> None:
        """What is pulled from now on comes that way, and what is pushed may lie on other nodes."""
        self._origin, self._lender = origin, lender

    # ── pull ────────────────────────────────────────────────────────────────────────

    def check(self, name: str) -> None:
        """
        Raises:
            InvalidName, Forbidden: the name is none, or its registry may not be asked.
        """
        self._named(name)

    async def pull(self, name: str) -> AsyncGenerator[Status]:
        """Fetch a model, or what is new of it. Ends when nobody reads any more.

        Raises:
            InvalidName, Forbidden: before the first line.
            ModelNotFound, Unavailable, RegistryError, DiskFull, InvalidModel, …: after it.
        """
        target = self._named(name)
        async with aclosing(self._shared(("pull", target.key), partial(self._pull, target))) as lines:
            async for status in lines:
                yield status

    async def _pull(self, name: ModelName, progress: Progress) -> None:
        progress.tell(Status(status="pulling manifest"))
        async with self._origin.manifest(name) as data:
            await self._adopt(name, data, progress)
        progress.tell(Status(status="success"))

    async def _adopt(self, name: ModelName, data: bytes, progress: Progress) -> None:
        manifest = _parsed(name, data)
        fetched: list[BlobId] = []
        try:
            with self._library.pinned(manifest.blobs()):
                async with self._blobs.room(sizes_of(manifest)):
                    await self._bring(name, (*manifest.layers, manifest.config), progress, fetched)
                progress.tell(Status(status="writing manifest"))
                unused = await self._library.adopt(name, data, self._origin.made_at(name))
        except (DiskFull, InvalidModel, ModelNotFound, RegistryError):
            # Nothing stays of what cannot be used, or was deleted. (What only broke off is taken up
            # next time.)
            await self._library.forget(fetched)
            raise
        if unused:
            progress.tell(Status(status="removing unused layers"))
            await self._library.forget(unused)
        log.info("distribution.pulled", model=name.display, fetched_blobs=len(fetched))

    @asynccontextmanager
    async def borrowed(self, name: ModelName, progress: Progress) -> AsyncIterator[bytes]:
        """The manifest of a model whose blobs are all here as long as the context lasts; what came for
        it goes again, unless it has got a name meanwhile."""
        fetched: list[BlobId] = []
        async with self._origin.manifest(name) as data:
            manifest = _parsed(name, data)
            try:
                with self._library.pinned(manifest.blobs()):
                    async with self._blobs.room(sizes_of(manifest)):
                        await self._bring(name, (*manifest.layers, manifest.config), progress, fetched)
                    yield data
            finally:
                with anyio.CancelScope(shield=True):
                    await self._library.forget(fetched)

    async def _bring(
        self, name: ModelName, layers: Iterable[Layer], progress: Progress, fetched: list[BlobId]
    ) -> None:
        """Have all blobs here, whole. Those that were not are added to `fetched`."""
        async with AsyncExitStack() as stack:
            coming: list[Joint[Fetch]] = []
            for layer in {layer.digest: layer for layer in layers}.values():
                size = await self._blobs.blob_size(layer.blob)
                if size is None:
                    fetched.append(layer.blob)
                    coming.append(await self._arrived(stack, name, layer, progress))
                elif size != layer.size:
                    raise RegistryError(f"{name.host} says {layer.size} of a blob that has {size} bytes")
                progress.tell(_line("pulling", layer, layer.size))
            progress.tell(Status(status="verifying sha256 digest"))
            for joint in coming:
                await joint.result()

    async def _arrived(
        self, stack: AsyncExitStack, name: ModelName, layer: Layer, progress: Progress
    ) -> Joint[Fetch]:
        """A fetch whose bytes are all here. It goes on, to check them, as long as `stack` holds it."""
        while True:
            joint = await stack.enter_async_context(
                self.fetches.joined(layer.blob, partial(self._fetch, layer, name), self._run_fetch)
            )
            fetch = joint.told
            while not (fetch.arrived.done() or joint.task.done()):
                progress.tell(_line("pulling", layer, fetch.here))
                ends = {joint.task, fetch.arrived}
                await asyncio.wait(ends, timeout=self._tick_s, return_when=asyncio.FIRST_COMPLETED)
            if fetch.arrived.done():
                return joint
            try:
                await joint.result()
            except OllamaDistributedError as exc:
                if (fetch.name is not None and fetch.name.key == name.key) or isinstance(exc, DiskFull):
                    raise
                # What failed there, at another name's registry, may work here.
                log.info("distribution.fetch_again", model=name.display, error=exc.message)

    def _fetch(self, layer: Layer, name: ModelName) -> Fetch:
        return Fetch(layer.blob, layer.size, name, self._origin.ahead)

    async def _run_fetch(self, fetch: Fetch) -> None:
        assert fetch.name is not None
        while True:
            async with self._blobs.partial(fetch.blob, fetch.size) as coming:
                fetch.partial = coming
                try:
                    await self._origin.fetch(fetch.name, fetch.blob, coming, fetch.finish)
                    return
                except DiskFull:
                    await coming.discard()
                    raise
                except DigestMismatch as exc:
                    # What an earlier fetch left may be what is wrong; then once more, from nothing.
                    elsewhere = self._origin.disproved(fetch.name, fetch.blob)
                    if not (coming.resumed or elsewhere):
                        raise RegistryError(exc.message) from exc
                    log.warning("distribution.wrong_bytes", blob=fetch.blob.digest)

    # ── push ────────────────────────────────────────────────────────────────────────

    async def push(self, name: str) -> AsyncGenerator[Status]:
        """Send a model of this node to its registry. Ends when nobody reads any more.

        Raises:
            InvalidName, Forbidden: before the first line.
            ModelNotFound, Unauthenticated, Unavailable, RegistryError: after it.
        """
        target = self._named(name)
        async with aclosing(self._shared(("push", target.key), partial(self._push, target))) as lines:
            async for status in lines:
                yield status

    async def _push(self, name: ModelName, progress: Progress) -> None:
        progress.tell(Status(status="retrieving manifest"))
        async with self._lender.version(name, progress) as data:
            if data is None:
                progress.tell(Status(status="couldn't retrieve manifest"))
                raise ModelNotFound(f"model '{name.display}' not found")
            await self._send_model(name, data, progress)
        log.info("distribution.pushed", model=name.display)
        progress.tell(Status(status="success"))

    async def _send_model(self, name: ModelName, data: bytes, progress: Progress) -> None:
        manifest = parse_manifest(data)
        with self._library.pinned(manifest.blobs()):
            for layer in {layer.digest: layer for layer in (*manifest.layers, manifest.config)}.values():
                await self._send(name, layer, progress)
            progress.tell(Status(status="pushing manifest"))
            await self.registry.send_manifest(name, data)

    async def _send(self, name: ModelName, layer: Layer, progress: Progress) -> None:
        sent = 0

        def told(count: int) -> None:
            nonlocal sent
            sent += count
            progress.tell(_line("pushing", layer, sent))

        told(0)
        await self.registry.send(name, layer, self._blobs, told)
        progress.tell(_line("pushing", layer, layer.size))

    async def _shared(
        self, key: tuple[str, str], run: Callable[[Progress], Coroutine[Any, Any, None]]
    ) -> AsyncGenerator[Status]:
        """The lines of a work that others may follow too."""
        kind = self._kind if key[0] == "pull" else key[0]

        async def counted(progress: Progress) -> None:
            await self._tally.count(kind, run(progress))

        async with (
            self._work.joined(key, Progress, counted) as joint,
            aclosing(joint.told.follow(joint.task)) as lines,
        ):
            async for status in lines:
                yield status

    def _named(self, text: str) -> ModelName:
        """The name in the spelling that is on disk, if its registry may be asked."""
        asked = ModelName.parse(text)
        self.registry.check(asked)
        return msgspec.structs.replace(self._library.settled(asked), scheme=asked.scheme)


def _parsed(name: ModelName, data: bytes) -> Manifest:
    try:
        return parse_manifest(data)
    except InvalidModel as exc:
        raise RegistryError(f"{name.host} sends no manifest of a model: {exc.message}") from exc


def _line(verb: str, layer: Layer, completed: int) -> Status:
    return Status(
        status=f"{verb} {layer.blob.hex[:12]}", digest=layer.digest, total=layer.size, completed=completed
    )
