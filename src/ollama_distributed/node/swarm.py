"""How models move between this node and others: pieces over the hop, transfers, where models are."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import msgspec

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pieces import PieceExchange, open_door
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.distribution.bundles import Bundles
from ollama_distributed.distribution.copies import ClusterSource
from ollama_distributed.distribution.downloads import Downloads, Transfer
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.packing import Resolve
from ollama_distributed.distribution.pulls import Copied, Fetch, Pulls
from ollama_distributed.distribution.relay import Relay
from ollama_distributed.distribution.service import Evict, ModelManager, ModelTransfer
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.distribution.tally import Tally
from ollama_distributed.node.settings import Settings
from ollama_distributed.state.cluster import ClusterState

MIB = 1024 * 1024


class Uplink:
    """How fast pieces may leave and come: slower while people wait for words."""

    def __init__(self, settings: Settings, busy: Callable[[], bool]) -> None:
        self._settings = settings
        self._busy = busy

    def use(self, settings: Settings) -> None:
        self._settings = settings

    def leaving(self) -> float:
        """Bytes per second; 0: no limit."""
        limits = (self._settings.share_rate_mib * MIB, self.coming())
        return min((limit for limit in limits if limit), default=0.0)

    def coming(self) -> float:
        """Checking and writing takes processor and disk, too."""
        return self._settings.share_rate_busy_mib * MIB if self._busy() else 0.0


class ModelMoves(msgspec.Struct, frozen=True):
    manager: ModelManager
    shelves: Shelves
    """What this node gives others."""
    swarm: Swarm
    """What it fetches from them."""
    bundles: Bundles
    """Models in one file."""
    copying: Pulls
    """Models from other nodes."""


@asynccontextmanager
async def model_moves(
    me: NodeId,
    *,
    store: BlobStore,
    catalog: Catalog,
    pool: PeerPool,
    door: PeerDoor,
    state: Callable[[], ClusterState],
    fetches: Joints[Fetch],
    downloads: Downloads,
    download: Callable[[str], Transfer],
    delete: Callable[[str], Awaitable[None]],
    evict: Evict,
    leaving: Callable[[], float],
    coming: Callable[[], float],
    clock: Clock,
    resolve: Resolve | None = None,
    tally: Tally | None = None,
    served: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[ModelMoves]:
    """`fetches`, `downloads`: of registries, into the same store. `delete`: of a name in the whole
    cluster. `leaving`, `coming`: bytes per second that may leave now for other nodes, and come from
    them (0: no limit). `resolve`: the version of a name that counts in the cluster; None: this
    node's own. `served`: hears which model another node begins to fetch."""

    def holders(key: str) -> Iterable[NodeId]:
        now = state()
        return [node for node in now.holders(key) if now.nodes[node].alive]

    def made_at(key: str, digest: str) -> float | None:
        now = state()
        known = (*now.models.get(key, {}).values(), *now.leftovers.get(key, {}).values())
        return max((held.modified_at for held in known if held.digest == digest), default=None)

    shelves = Shelves(store, clock, rate=leaving)
    exchange = PieceExchange(pool)
    swarm = Swarm(me, exchange, shelves, clock, random.randrange, rate=coming)
    source = ClusterSource(swarm, exchange, holders, made_at)
    try:
        async with (
            Pulls(
                source, store, catalog, fetches=fetches, origin=Copied(source), tally=tally, kind="copy"
            ) as copying,
            Downloads(
                copying.pull,
                copying.check,
                clock,
                make_id=lambda: f"{me}.{random_id()}",
                kind="copy",
                node=me,
                origins=source.origins,
            ) as copies,
        ):
            transfers = ModelTransfer(me, exchange, source, copies, downloads, catalog, state)
            open_door(door, shelves, transfers, served)
            bundles = Bundles(store, catalog, resolve or catalog.resolve, Relay(me, exchange, state))
            manager = ModelManager(
                me, transfers, exchange, state, download, clock.time, swarm.figures, delete, evict
            )
            yield ModelMoves(manager, shelves, swarm, bundles, copying)
    finally:
        await shelves.close()
