"""The disk of this node's models: from its settings to who asks it for room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.peers.disks import DiskExchange, open_disk_door
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.amounts import amount_bytes
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Invalid, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.cluster.loops import in_background
from ollama_distributed.distribution.disk import NodeDisk
from ollama_distributed.distribution.disk_ports import Survey
from ollama_distributed.distribution.disks import ClusterDisks
from ollama_distributed.distribution.evicting import Evictions
from ollama_distributed.distribution.exchange import MAX_PEERS, CopyAsk
from ollama_distributed.distribution.room import Limits
from ollama_distributed.distribution.scrub import Pacing, Scrubber
from ollama_distributed.distribution.service import ModelTransfer
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.uses import Uses, UsesRecord
from ollama_distributed.models.names import BlobId, name_key
from ollama_distributed.models.stored import StoredModel
from ollama_distributed.node.data_dir import read_file, write_file
from ollama_distributed.node.settings import Settings
from ollama_distributed.serving.service import Serving
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger()

FILE = "uses.json"
MIB = 1024 * 1024
LOW_WATER_BYTES, LOW_WATER_SHARE = 2 << 30, 0.05
"""Kept free unless the settings say otherwise, whichever is less: enough for the logs, the state and
the swap of others, and not most of a small disk."""


def read_uses(data_dir: Path, clock: Clock) -> Uses:
    """What was used when, as it was written down last. Blocking, small."""
    try:
        return Uses(clock, read_file(data_dir / FILE, UsesRecord))
    except Invalid as damaged:
        log.warning("disk.uses_not_read", error=damaged.message)
        return Uses(clock)


def limits_of(settings: Settings, survey: Survey) -> Limits:
    quota, low = settings.disk_quota, settings.disk_low_water
    return Limits(
        quota_bytes=amount_bytes(quota, survey.total_bytes) if quota else None,
        low_water_bytes=amount_bytes(low, survey.total_bytes)
        if low
        else min(LOW_WATER_BYTES, int(LOW_WATER_SHARE * survey.total_bytes)),
    )


def pacing_of(settings: Settings) -> Pacing:
    return Pacing(every_s=settings.scrub_every, bytes_per_s=settings.scrub_rate_mib * MIB)


class DiskCare:
    """The parts that others of the node need."""

    def __init__(self, own: NodeDisk, everywhere: ClusterDisks, settings: Settings) -> None:
        self.own = own
        self.everywhere = everywhere
        self.settings = settings

    def use(self, settings: Settings) -> None:
        """From now on."""
        self.settings = settings
        self.own.scrubber.use(pacing_of(settings))


@asynccontextmanager
async def disk_care(
    settings: Settings,
    me: NodeId,
    *,
    store: BlobStore,
    catalog: Catalog,
    serving: Serving,
    uses: Uses,
    shelves: Shelves,
    copies: ModelTransfer,
    pool: PeerPool,
    door: PeerDoor,
    state: Callable[[], ClusterState],
    clock: Clock,
) -> AsyncIterator[DiskCare]:
    """While it is open the store asks here for room, and files are read again now and then."""

    def moving() -> set[BlobId]:
        return {*catalog.in_use(), *own.rooms.claimed(), *shelves.giving()}

    def loaded() -> set[str]:
        return {name_key(name) for name in serving.resident}

    def busy() -> bool:
        return bool(serving.waiting) or any(model.slots_busy for model in serving.loaded())

    def warm() -> set[BlobId]:
        names = loaded()
        return {blob for one in catalog.stored() if one.key in names for blob in one.blobs}

    async def whole(model: StoredModel) -> bool:
        for blob, size in model.blobs.items():
            if await store.blob_size(blob) != size:
                return False
        return True

    async def fetch(model: StoredModel, holders: Sequence[NodeId]) -> None:
        ask = CopyAsk(name=str(model.name), sources=tuple(holders)[:MAX_PEERS], digest=model.digest)
        ended = await copies.ended((await copies.copy_here(ask)).id)
        if ended.state != "done":
            raise Unavailable(f"the copy ended as {ended.state}: {ended.error}")

    async def write(record: UsesRecord) -> None:
        await asyncio.to_thread(write_file, settings.data_dir / FILE, record)

    exchange = DiskExchange(pool)
    evictions = Evictions(
        me,
        catalog,
        uses,
        exchange,
        state,
        loaded=loaded,
        moving=moving,
        unload=serving.unload,
        whole=whole,
    )
    scrubber = Scrubber(
        store,
        catalog,
        uses,
        clock,
        pacing_of(settings),
        busy=busy,
        warm=warm,
        holding=evictions.holders,
        fetch=fetch,
    )
    own = NodeDisk(
        me,
        store,
        catalog,
        uses,
        evictions,
        scrubber,
        state=state,
        limits=lambda survey: limits_of(care.settings, survey),
        write=write,
        clock=clock,
    )
    care = DiskCare(own, ClusterDisks(me, own, exchange, state), settings)
    await own.start()
    open_disk_door(door, own)
    store.use(own.rooms)
    async with AsyncExitStack() as stack:
        for name, run in (("disk", own.run), ("scrub", scrubber.run)):
            in_background(stack, name, run)
        yield care
