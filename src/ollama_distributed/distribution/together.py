"""Fetching from outside as one cluster: each byte leaves a registry once.

A node that pulls takes its turn for the name and, one after the other, for each blob that no
node has (`matchmaker`). Who asks for the same meanwhile goes by the manifest that the first one
got, waits until a blob is whole there, and then copies it from nodes, as it does with every blob
that some node has already. A node that fails on the way is followed by one that waited for it,
which goes on with what it has; what the registry itself refuses is refused for all.

A node that is alone, or finds no other, asks the registry as if there were no cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from ollama_distributed.base.errors import (
    ModelNotFound,
    NotFound,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.copies import MAX_NAMES, Given
from ollama_distributed.distribution.downloads import Origins
from ollama_distributed.distribution.fetching import Told
from ollama_distributed.distribution.finding import holding
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.matchmaker import Matchmaker
from ollama_distributed.distribution.neighbours import Neighbours
from ollama_distributed.distribution.ports import Partial, Registry
from ollama_distributed.distribution.pulls import Fetch
from ollama_distributed.models.names import BlobId, ModelName, name_key

log = structlog.get_logger()

PAUSE_S = 0.2
IDLE_LOOKS = 5
"""So often a node whose turn it is may say that it does nothing; then it is another's."""
MAX_FAILURES = 3
"""Of other nodes; after that one gives up waiting for more, and says why."""
STALL_S, CHECK_S = 60.0, 900.0
"""Another node's fetch may stand still for so long, and take so long to check what has come."""
_TICK_S = 0.25


class Swarming(Protocol):
    """`distribution.swarm.Swarm`."""

    async def fetch(
        self, blob: BlobId, into: Partial, sources: Collection[NodeId], told: Told | None = None
    ) -> None: ...

    def disproved(self, blob: BlobId) -> NodeId | None: ...


class _Tries:
    """What one fetch has seen of other nodes."""

    def __init__(self) -> None:
        self.instead_of: NodeId | None = None
        """Whose turn was seen to lead nowhere."""
        self.failed: dict[NodeId, None] = {}
        """Not asked for bytes again."""
        self.idle: dict[NodeId, int] = {}
        self.failures = 0

    def fail(self, node: NodeId, error: OllamaDistributedError) -> None:
        """A node whose turn it was has failed.

        Raises:
            Unavailable: too many have.
        """
        log.info("distribution.takes_over", node=node, error=error.message)
        self.instead_of = node
        self.failed[node] = None
        self.failures += 1
        if self.failures > MAX_FAILURES:
            raise Unavailable(error.message) from error


class Together:
    """Implements `ports.Origin`. `others`: living nodes but this one, those that hold the model
    first; by `name_key`."""

    def __init__(
        self,
        registry: Registry,
        matchmaker: Matchmaker,
        neighbours: Neighbours,
        swarm: Swarming,
        fetches: Joints[Fetch],
        others: Callable[[str], Sequence[NodeId]],
    ) -> None:
        self._registry = registry
        self._matchmaker = matchmaker
        self._neighbours = neighbours
        self._swarm = swarm
        self._fetches = fetches
        self._others = others
        self._manifests: dict[str, asyncio.Future[bytes]] = {}
        """Of the pulls that run here and are this node's turn."""
        self._mine: dict[BlobId, bool] = {}
        """Blobs that are this node's turn; true: it fetches them from outside, as no node has them."""
        self._news = asyncio.Event()
        """Set when they change."""
        self._ahead: dict[BlobId, int] = {}
        self._given: dict[BlobId, None] = {}
        """Blobs whose bytes came from nodes, until they are checked."""
        self._origins: dict[str, Given] = {}

    def origins(self, name: str) -> Origins:
        """What nodes gave to the last pull of this name."""
        given = self._origins.get(name_key(name))
        return given.origins if given is not None else Origins()

    # ── `ports.Origin` ──────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def manifest(self, name: ModelName) -> AsyncIterator[bytes]:
        self._origins.pop(name.key, None)
        self._origins[name.key] = Given()
        if len(self._origins) > MAX_NAMES:
            del self._origins[next(iter(self._origins))]
        if not self._others(name.key):
            yield await self._registry.manifest(name)
            return
        # There before the turn is: who hears of the turn asks for it at once.
        told = self._manifests[name.key] = asyncio.get_running_loop().create_future()
        told.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with self._matchmaker.turn(f"name/{name.key}") as node:
                if node == self._matchmaker.me:
                    yield await self._first(name, told)
                    return
                told.cancel()
                data = await self._told(node, name)
        finally:
            told.cancel()
            self._manifests.pop(name.key, None)
        yield data

    async def fetch(
        self, name: ModelName, blob: BlobId, into: Partial, finish: Callable[[], Awaitable[None]]
    ) -> None:
        tries = _Tries()
        while others := self._others(name.key):
            async with self._turn(blob, tries) as node:
                asked = [node for node in others if node not in tries.failed]
                found = await holding(self._neighbours, blob, asked)
                givers = [node for node, size in found.items() if size == into.size]
                if node == self._matchmaker.me and not givers:
                    await self._from_outside(name, blob, into, finish)
                    return
            if not givers:
                await self._wait_for(node, blob, into.size, tries)
                continue
            try:
                await self._swarm.fetch(blob, into, givers, self._origins.get(name.key))
                self._given[blob] = None
                await finish()
                del self._given[blob]
                return
            except (Unavailable, RegistryError) as exc:
                tries.failed |= dict.fromkeys(givers)
                log.info("distribution.givers_failed", blob=blob.digest, error=exc.message)
        self._given.pop(blob, None)
        await self._registry.fetch(name, blob, into)
        await finish()

    def ahead(self, blob: BlobId) -> int:
        return self._ahead.get(blob, 0)

    def made_at(self, name: ModelName) -> float | None:  # noqa: ARG002 - the port's
        return None

    def disproved(self, name: ModelName, blob: BlobId) -> bool:
        if blob not in self._given:
            return self._registry.disproved(name, blob)
        del self._given[blob]
        self._swarm.disproved(blob)
        return True

    # ── what other nodes ask ────────────────────────────────────────────────────────

    async def pulled(self, key: str) -> bytes:
        """The manifest of a pull that runs here; waits for it.

        Raises:
            NotFound: none runs. What the registry refused with.
        """
        told = self._manifests.get(key)
        if told is None:
            raise NotFound("this node does not pull that")
        await asyncio.wait({told})
        if told.cancelled():
            raise Unavailable("the pull was given up")
        return told.result()

    async def followed(self, blob: BlobId, tell: Callable[[int], Awaitable[None]]) -> None:
        """Until the blob is whole here. Who follows takes part: the fetch goes on for it.

        Raises:
            NotFound: it is not fetched from outside here. What the fetch fails with.
        """
        while self._mine.get(blob) is False:
            await self._news.wait()
        if blob not in self._mine:
            raise NotFound("this node does not fetch that from outside")
        async with self._fetches.taken_part(blob) as joint:
            while not joint.task.done():
                await tell(joint.told.here)
                await asyncio.wait({joint.task}, timeout=_TICK_S)
            if joint.task.cancelled():
                raise Unavailable("the fetch was given up")
            await joint.result()

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _from_outside(
        self, name: ModelName, blob: BlobId, into: Partial, finish: Callable[[], Awaitable[None]]
    ) -> None:
        self._given.pop(blob, None)
        self._now(blob, outside=True)
        await self._registry.fetch(name, blob, into)
        await finish()

    @asynccontextmanager
    async def _turn(self, blob: BlobId, tries: _Tries) -> AsyncIterator[NodeId]:
        async with self._matchmaker.turn(f"blob/{blob.hex}", instead_of=tries.instead_of) as node:
            if node == self._matchmaker.me:
                self._now(blob, outside=False)
            try:
                yield node
            finally:
                if node == self._matchmaker.me:
                    self._now(blob, outside=None)

    def _now(self, blob: BlobId, *, outside: bool | None) -> None:
        """`outside`: None: it is not this node's turn any more."""
        if outside is None:
            self._mine.pop(blob, None)
        else:
            self._mine[blob] = outside
        self._news.set()
        self._news = asyncio.Event()

    async def _first(self, name: ModelName, told: asyncio.Future[bytes]) -> bytes:
        """The registry's manifest, also for those who wait for it elsewhere."""
        try:
            data = await self._registry.manifest(name)
        except OllamaDistributedError as exc:
            told.set_exception(exc)
            raise
        told.set_result(data)
        return data

    async def _told(self, node: NodeId, name: ModelName) -> bytes:
        """The manifest that another node pulls by, or else the registry's."""
        try:
            return await self._neighbours.pulled(node, name.key)
        except ModelNotFound:
            raise
        except OllamaDistributedError as exc:
            # It is done, or failed at what need not fail here: its own settings, its own network.
            log.info("distribution.manifest_anew", model=name.display, node=node, error=exc.message)
            return await self._registry.manifest(name)

    async def _wait_for(self, node: NodeId, blob: BlobId, size: int, tries: _Tries) -> None:
        """Until another node has fetched the blob, or has failed to.

        Raises:
            RegistryError, ModelNotFound: the registry refuses it, or sends something else.
            Unavailable: the registry cannot be reached, not from other nodes either.
        """
        tries.instead_of = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(STALL_S) as limit:

                def told(here: int) -> None:
                    if here > self._ahead.get(blob, 0):
                        limit.reschedule(loop.time() + (STALL_S if here < size else CHECK_S))
                    self._ahead[blob] = here

                await self._neighbours.follow(node, blob.digest, told)
        except TimeoutError:
            tries.fail(node, Unavailable(f"node {node} fetches {blob.digest[:19]} and does not get on"))
        except (RegistryError, ModelNotFound):
            raise
        except NotFound:
            # It has just ended, or is about to begin; or else it has forgotten that it began.
            tries.idle[node] = tries.idle.get(node, 0) + 1
            if tries.idle[node] >= IDLE_LOOKS:
                tries.instead_of = node
            await asyncio.sleep(PAUSE_S)
        except OllamaDistributedError as exc:
            tries.fail(node, exc)
        finally:
            self._ahead.pop(blob, None)
