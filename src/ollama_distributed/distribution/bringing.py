"""Brings here what other nodes hold and a request to this node needs: a base, a file, a model to push."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from ollama_distributed.base.errors import BlobNotFound, ModelNotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.finding import holding
from ollama_distributed.distribution.neighbours import Neighbours
from ollama_distributed.distribution.ports import Blobs, Library, Status
from ollama_distributed.distribution.progress import Progress
from ollama_distributed.distribution.pulls import Fetch, Pulls
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.spec import ModelSpec


class Bringing:
    """Implements `pulls.Lender`. `copying`: from other nodes; `others`: those that live;
    `resolve`: the version of a name that counts in the cluster."""

    def __init__(
        self,
        copying: Pulls,
        neighbours: Neighbours,
        swarm: Swarm,
        blobs: Blobs,
        library: Library,
        others: Callable[[], Sequence[NodeId]],
        resolve: Callable[[str], Awaitable[ModelSpec]],
    ) -> None:
        self._copying = copying
        self._neighbours = neighbours
        self._swarm = swarm
        self._blobs = blobs
        self._library = library
        self._others = others
        self._resolve = resolve

    # ── models ──────────────────────────────────────────────────────────────────────

    def model(self, name: str) -> AsyncGenerator[Status]:
        """Copy it here, as a pull does. Closing the iterator ends it."""
        return self._copying.pull(name)

    @asynccontextmanager
    async def version(self, name: ModelName, progress: Progress) -> AsyncIterator[bytes | None]:
        """See `pulls.Lender`. What lies on other nodes is here as long as the context lasts."""
        here = await self._library.manifest(name)
        try:
            counts = await self._resolve(str(name))
        except ModelNotFound:
            yield here
            return
        if here is not None and hashlib.sha256(here).hexdigest() == counts.digest:
            yield here
            return
        async with self._copying.borrowed(name, progress) as data:
            yield data

    # ── files ───────────────────────────────────────────────────────────────────────

    async def has(self, digest: str) -> bool:
        """Whether another node has the blob."""
        return bool(await holding(self._neighbours, BlobId.parse(digest), self._others()))

    async def blob(self, digest: str) -> None:
        """Have it here.

        Raises:
            BlobNotFound: no node that can be reached has it.
        """
        blob = BlobId.parse(digest)
        found = await holding(self._neighbours, blob, self._others())
        if not found:
            raise BlobNotFound(f'blob "{digest}" not found')
        size = next(iter(found.values()))
        givers = [node for node, its in found.items() if its == size]
        async with self._copying.fetches.joined(
            blob, partial(Fetch, blob, size, None), partial(self._fetch, givers)
        ) as joint:
            await joint.result()

    async def _fetch(self, givers: Sequence[NodeId], fetch: Fetch) -> None:
        async with self._blobs.partial(fetch.blob, fetch.size) as coming:
            fetch.partial = coming
            await self._swarm.fetch(fetch.blob, coming, givers)
            await fetch.finish()
