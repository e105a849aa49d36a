"""Nodes that pull from one registry, in virtual time: real `Pulls`, `Together`, `Matchmaker`; a
registry, disks, links and a swarm of numbers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from ollama_distributed.base.errors import (
    DiskFull,
    ModelNotFound,
    OllamaDistributedError,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.fetching import Told
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.matchmaker import Matchmaker
from ollama_distributed.distribution.neighbours import TurnAsk
from ollama_distributed.distribution.ports import Partial
from ollama_distributed.distribution.pulls import Fetch, Pulls
from ollama_distributed.distribution.together import Together
from ollama_distributed.models.manifest import CONFIG_TYPE, MODEL, Layer, Manifest, encode_manifest
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.testing.virtual_time import VirtualClock

MB = 1_000_000
CHUNK = MB
REGISTRY_S = 0.1
"""A megabyte from the registry."""
LINK_S = 0.01
"""A megabyte from a node; and a question."""
T = TypeVar("T")


class Model:
    """A name with blobs of so many megabytes."""

    def __init__(self, name: str, *megabytes: int) -> None:
        self.name = f"registry.example/me/{name}"
        blobs = [(BlobId(hashlib.sha256(f"{size}".encode()).hexdigest()), size * MB) for size in megabytes]
        self.sizes = dict(blobs)
        layers = [Layer(media_type=MODEL, digest=blob.digest, size=size) for blob, size in blobs]
        config = Layer(media_type=CONFIG_TYPE, digest=layers[-1].digest, size=layers[-1].size)
        self.manifest = encode_manifest(Manifest(config=config, layers=tuple(layers)))


class FakeRegistry:
    """One for all nodes; each sees it by `of(node)`."""

    def __init__(self, *models: Model) -> None:
        self.models = {ModelName.parse(model.name).key: model for model in models}
        self.manifests: list[NodeId] = []
        """Who asked for one."""
        self.served: dict[BlobId, int] = {}
        self.by: dict[NodeId, int] = {}
        self.closed_to: dict[NodeId, OllamaDistributedError] = {}
        self.hangs: set[NodeId] = set()
        """For them."""

    def of(self, node: FakeNode) -> SeenRegistry:
        return SeenRegistry(self, node)


class SeenRegistry:
    def __init__(self, registry: FakeRegistry, node: FakeNode) -> None:
        self._registry = registry
        self._node = node

    def check(self, name: ModelName) -> None: ...

    async def manifest(self, name: ModelName) -> bytes:
        self._registry.manifests.append(self._node.id)
        await asyncio.sleep(REGISTRY_S)
        if (error := self._registry.closed_to.get(self._node.id)) is not None:
            raise type(error)(error.message)
        model = self._registry.models.get(name.key)
        if model is None:
            raise ModelNotFound("the registry has no such model")
        return model.manifest

    async def fetch(self, name: ModelName, blob: BlobId, into: Partial) -> None:
        while missing := into.missing():
            await asyncio.sleep(REGISTRY_S)
            if (error := self._registry.closed_to.get(self._node.id)) is not None:
                raise type(error)(error.message)
            while self._node.id in self._registry.hangs:
                await asyncio.sleep(1)
            begin, end = missing[0]
            count = min(CHUNK, end - begin)
            self._registry.served[blob] = self._registry.served.get(blob, 0) + count
            self._registry.by[self._node.id] = self._registry.by.get(self._node.id, 0) + count
            await into.write(begin, bytes(0), bytes(count))

    def disproved(self, name: ModelName, blob: BlobId, /) -> bool:
        return False

    async def read_part(self, *_: object) -> bytes:
        raise AssertionError

    async def send(self, *_: object) -> None:
        raise AssertionError

    async def send_manifest(self, *_: object) -> None:
        raise AssertionError


class FakePartial:
    def __init__(self, node: FakeNode, blob: BlobId, size: int) -> None:
        self._node = node
        self.blob = blob
        self.size = size
        self.resumed = False

    @property
    def here(self) -> int:
        return self._node.halves.get(self.blob, 0)

    def missing(self) -> list[tuple[int, int]]:
        return [(self.here, self.size)] if self.here < self.size else []

    async def write(self, offset: int, *data: bytes | memoryview) -> None:
        if self._node.full:
            raise DiskFull("no space left")
        assert offset == self.here
        self._node.halves[self.blob] = offset + sum(map(len, data))

    async def read(self, offset: int, length: int) -> bytes:
        raise AssertionError

    async def finish(self) -> None:
        await asyncio.sleep(self.size / MB * LINK_S)  # hashing
        assert self.here == self.size
        self._node.blobs[self.blob] = self._node.halves.pop(self.blob)

    async def discard(self) -> None:
        self._node.halves.pop(self.blob, None)


class FakeNode:
    """Its disk, its part in fetching together, and what others ask of it. `Blobs`, `Library`,
    `Swarming` and `Neighbours` in one."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.id = NodeId(name)
        self.alive = True
        self.full = False
        self.blobs: dict[BlobId, int] = {}
        self.halves: dict[BlobId, int] = {}
        self.models: dict[str, bytes] = {}
        self.copied = 0
        """Bytes that came from other nodes."""
        self.seen: list[tuple[float, int]] = []
        """When its pull told how many megabytes."""
        self._asked: set[asyncio.Task[Any]] = set()
        self._begin()

    def _begin(self) -> None:
        fetches: Joints[Fetch] = Joints()
        self.matchmaker = Matchmaker(self.id, self, self.world.servers, VirtualClock())
        registry = self.world.registry.of(self)
        self.together = Together(
            registry, self.matchmaker, self, self, fetches, lambda key: self.world.others(self, key)
        )
        self.pulls = Pulls(registry, self, self, fetches=fetches, origin=self.together, tick_s=0.3)

    async def die(self) -> None:
        """At once, without a word; its half-fetched blobs stay on the disk."""
        self.alive = False
        for task in list(self._asked):
            task.cancel()
        await self.pulls.__aexit__(None, None, None)

    def restart(self) -> None:
        self.alive = True
        self._begin()

    async def pull(self, model: Model) -> list[str]:
        lines = []
        async with aclosing(self.pulls.pull(model.name)) as told:
            async for status in told:
                lines.append(f"{status.status} {status.completed // MB}")
                self.seen.append((asyncio.get_running_loop().time(), status.completed // MB))
        return lines

    # ── Blobs ───────────────────────────────────────────────────────────────────────

    async def blob_size(self, blob: BlobId) -> int | None:
        return self.blobs.get(blob)

    @asynccontextmanager
    async def partial(self, blob: BlobId, size: int) -> AsyncIterator[FakePartial]:
        yield FakePartial(self, blob, size)

    @asynccontextmanager
    async def room(self, blobs: Mapping[BlobId, int]) -> AsyncIterator[None]:
        yield

    async def read_range(self, blob: BlobId, offset: int, length: int) -> bytes:
        raise AssertionError

    async def room_bytes(self) -> int:
        return 10**15

    # ── Library ─────────────────────────────────────────────────────────────────────

    def settled(self, name: ModelName) -> ModelName:
        return name

    @contextmanager
    def pinned(self, blobs: Collection[BlobId]) -> Iterator[None]:
        yield

    async def manifest(self, name: ModelName) -> bytes | None:
        return self.models.get(name.key)

    async def examine(self, name: ModelName, manifest: bytes) -> None: ...

    async def adopt(self, name: ModelName, manifest: bytes, made_at: float | None = None) -> set[BlobId]:
        self.models[name.key] = manifest
        return set()

    async def delete(self, name: str) -> None:
        raise AssertionError

    async def forget(self, blobs: Collection[BlobId]) -> None: ...

    # ── Swarming ────────────────────────────────────────────────────────────────────

    async def fetch(
        self, blob: BlobId, into: Partial, sources: Collection[NodeId], told: Told | None = None
    ) -> None:
        while missing := into.missing():
            begin, end = missing[0]
            count = min(CHUNK, end - begin)
            for source in sources:
                node = self.world.nodes[source]
                if self.world.reaches(self, node) and blob in node.blobs:
                    break
            else:
                await asyncio.sleep(30)
                raise Unavailable("no node that can be reached has what is missing")
            await asyncio.sleep(LINK_S)
            await into.write(begin, bytes(count))
            self.copied += count
            if told is not None:
                told.received(node.id, count)

    def disproved(self, blob: BlobId) -> NodeId | None:
        raise AssertionError

    # ── Neighbours ──────────────────────────────────────────────────────────────────

    async def turn(self, node: NodeId, ask: TurnAsk) -> NodeId | None:
        async def work(there: FakeNode) -> NodeId | None:
            return there.matchmaker.asked(self.id, ask)

        return await self._ask(node, work)

    async def size(self, node: NodeId, blob: str) -> int | None:
        async def work(there: FakeNode) -> int | None:
            return there.blobs.get(BlobId.parse(blob))

        return await self._ask(node, work)

    async def pulled(self, node: NodeId, name: str) -> bytes:
        async def work(there: FakeNode) -> bytes:
            return await there.together.pulled(name)

        return await self._ask(node, work)

    async def follow(self, node: NodeId, blob: str, told: Callable[[int], None]) -> None:
        async def tell(here: int) -> None:
            await asyncio.sleep(LINK_S)
            told(here)

        async def work(there: FakeNode) -> None:
            await there.together.followed(BlobId.parse(blob), tell)

        await self._ask(node, work)

    async def _ask(self, node: NodeId, work: Callable[[FakeNode], Coroutine[Any, Any, T]]) -> T:
        there = self.world.nodes[node]
        await asyncio.sleep(LINK_S)
        if not self.world.reaches(self, there):
            raise Unavailable(f"node {node} cannot be reached")
        task = asyncio.create_task(work(there))
        there._asked.add(task)
        task.add_done_callback(there._asked.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        await asyncio.sleep(LINK_S)
        if task.cancelled() or not self.world.reaches(self, there):
            raise Unavailable(f"node {node} broke off")
        return task.result()


class World:
    def __init__(self, registry: FakeRegistry, *names: str) -> None:
        self.registry = registry
        self.cut: set[frozenset[NodeId]] = set()
        self.known_dead: set[NodeId] = set()
        """Members learn of a death later than it happens."""
        self.nodes: dict[NodeId, FakeNode] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> FakeNode:
        node = self.nodes[NodeId(name)] = FakeNode(self, name)
        return node

    def __getitem__(self, name: str) -> FakeNode:
        return self.nodes[NodeId(name)]

    def servers(self) -> list[NodeId]:
        return [node for node in self.nodes if node not in self.known_dead]

    def others(self, me: FakeNode, key: str) -> list[NodeId]:
        living = [node for node in self.servers() if node != me.id]
        return sorted(living, key=lambda node: key not in self.nodes[node].models)

    def reaches(self, one: FakeNode, other: FakeNode) -> bool:
        return one.alive and other.alive and frozenset({one.id, other.id}) not in self.cut


__all__ = ["MB", "FakeRegistry", "Model", "Unauthenticated", "World"]
