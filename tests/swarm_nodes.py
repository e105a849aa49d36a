"""Nodes of one process that copy models to each other over real mutual TLS.

async with swarm(tmp_path) as nodes:
    a, b = await nodes.add("a"), await nodes.add("b")
    await a.hold("big", 8)
    await nodes.done(await a.manager.distribute("big"))
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.errors import Conflict
from ollama_distributed.distribution.bundles import Bundles
from ollama_distributed.distribution.downloads import Downloads, Transfer
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.ports import Status
from ollama_distributed.distribution.pulls import Fetch
from ollama_distributed.distribution.service import ModelManager
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.held import held_model
from ollama_distributed.models.manifest import (
    CONFIG_TYPE,
    MODEL,
    Layer,
    Manifest,
    ModelConfig,
    encode_config,
    encode_manifest,
)
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.scripted import scripted_model
from ollama_distributed.node.swarm import model_moves
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.records import Holdings
from tests.catalogues import Catalogues
from tests.hop_nodes import HopNode, HopNodes, cluster
from tests.limits import SOON_S

DEADLINE_S = SOON_S


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _no_registry(_name: str) -> AsyncGenerator[Status]:
    raise AssertionError("no registry in these tests")
    yield Status(status="")


class SwarmNode:
    def __init__(self, hop: HopNode, catalogues: Catalogues) -> None:
        self.hop = hop
        self.id = hop.id
        self.folder = hop.nodes.folder / hop.id / "models"
        self.names = catalogues.add(hop)
        """The models of all."""
        self.evicted: list[tuple[str, str, bool]] = []
        self.rate = 0.0
        """Bytes per second that leave; 0: no limit."""
        self.manager: ModelManager
        self.shelves: Shelves
        self.swarm: Swarm
        self.bundles: Bundles
        self._life = AsyncExitStack()

    async def begin(self) -> None:
        downloads = Downloads(_no_registry, lambda _: None, SystemClock())
        moves = await self._life.enter_async_context(
            model_moves(
                self.id,
                store=self.hop.store,
                catalog=self.hop.catalog,
                pool=self.hop.pool,
                door=self.hop.door,
                state=self.hop.state,
                resolve=self.names.resolve,
                fetches=Joints[Fetch](),
                downloads=downloads,
                download=downloads.start,
                delete=self.names.delete,
                evict=self.evict,
                leaving=lambda: self.rate,
                coming=lambda: 0.0,
                clock=SystemClock(),
            )
        )
        self.manager, self.shelves, self.swarm = moves.manager, moves.shelves, moves.swarm
        self.bundles = moves.bundles

    async def evict(self, model: str, node: str, /, *, last_copy: bool) -> EvictAnswer:
        """Notes it; no disk is looked after here."""
        self.evicted.append((model, node, last_copy))
        if node == "stays":
            raise Conflict("it is the last copy")
        return EvictAnswer(model=model, node=node, name=f"{node}-name", freed_bytes=1)

    async def end(self) -> None:
        await self._life.aclose()

    async def hold(self, name: str, mebibytes: int, seed: int = 7) -> bytes:
        """Put a model here that the echo engine cannot serve, but every catalogue can read."""
        content = scripted_model("hello") + random.Random(seed).randbytes(mebibytes << 20)
        config = encode_config(ModelConfig(model_format="gguf", model_family="llama"))
        layers = []
        for media, data in ((MODEL, content), (CONFIG_TYPE, config)):
            blob = BlobId(hashlib.sha256(data).hexdigest())
            await self.hop.store.put_blob(blob, chunks(data))
            layers.append(Layer(media_type=media, digest=blob.digest, size=len(data)))
        manifest = encode_manifest(Manifest(config=layers[1], layers=(layers[0],)))
        await self.hop.catalog.adopt(ModelName.parse(name), manifest)
        self.tell()
        return content

    def tell(self) -> None:
        """Write what is here into the state, as a node does."""
        held = Holdings(node=self.id, models=tuple(map(held_model, self.hop.catalog.list())))
        self.hop.nodes.write(state_keys.holdings(self.id), held)

    def content(self, name: str) -> bytes:
        """Of the model's file, read from disk."""
        spec = next(spec for spec in self.hop.catalog.list() if spec.display.startswith(name))
        assert spec.weights is not None
        return Path(spec.weights).read_bytes()

    def staged(self) -> set[str]:
        return {path.name for path in (self.folder / ".ollama-distributed").iterdir()}

    def blobs(self) -> set[str]:
        return {path.name for path in (self.folder / "blobs").iterdir()}


class SwarmNodes:
    def __init__(self, hops: HopNodes) -> None:
        self.hops = hops
        self.catalogues = Catalogues(hops)
        self.all: list[SwarmNode] = []

    async def add(self, name: str) -> SwarmNode:
        node = SwarmNode(await self.hops.add(name), self.catalogues)
        await node.begin()
        self.all.append(node)
        return node

    async def done(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Wait until each has ended, whichever way."""
        return [await self.ended(one) for one in transfers]

    async def ended(self, transfer: Transfer) -> Transfer:
        return await self.when(transfer, lambda now: now.state != "running")

    async def when(self, transfer: Transfer, met: Callable[[Transfer], object]) -> Transfer:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                now = await self.all[0].manager.transfer(transfer.id)
                if met(now):
                    return now
                await asyncio.sleep(0.01)


@asynccontextmanager
async def swarm(folder: Path) -> AsyncIterator[SwarmNodes]:
    async with cluster(folder) as hops:
        nodes = SwarmNodes(hops)
        try:
            yield nodes
        finally:
            for node in nodes.all:
                await node.end()
