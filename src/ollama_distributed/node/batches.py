"""Files and batches of a node: from its settings to who works on them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.batches.disk import BatchDisk
from ollama_distributed.adapters.peers.batches import BatchExchange, open_batch_door
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Forbidden, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.batches.cluster import ClusterBatches
from ollama_distributed.batches.files import Files
from ollama_distributed.batches.plan import Owner, Seats
from ollama_distributed.batches.ports import Answer, Asking
from ollama_distributed.batches.records import Limits
from ollama_distributed.batches.service import Batches
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end
from ollama_distributed.models.names import name_key
from ollama_distributed.node.settings import Settings
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.state.cluster import ClusterState

MIB = 1024 * 1024
FOLDER = "batches"


class BatchCare:
    """`everywhere`: for the gateway. Nothing is worked on before `begin`."""

    def __init__(self, everywhere: ClusterBatches, own: Batches) -> None:
        self.everywhere = everywhere
        self._own = own
        self._ask: Asking | None = None
        self._working: asyncio.Task[None] | None = None

    def begin(self, ask: Asking) -> None:
        """`ask`: the node's own inference."""
        self._ask = ask
        work = keep_going("batches", self._own.run)
        self._working = asyncio.create_task(work, name="batches")

    async def ask(self, endpoint: str, body: bytes, identity: Identity, request_id: str, /) -> Answer:
        if self._ask is None:
            raise Unavailable("this node is starting")
        return await self._ask(endpoint, body, identity, request_id)

    async def close(self) -> None:
        if self._working is not None:
            await end([self._working])


def owners(authenticator: Authenticator) -> Callable[[Owner], Identity | None]:
    """Who an owner is now, with the policy of now; None: the key is not good any more."""

    def known(owner: Owner) -> Identity | None:
        try:
            if owner.user or owner.key == owner.role:
                return authenticator.bound(owner.role, owner.team, user=owner.user)
            key = KeyId(owner.key)
            return authenticator.vouch(Identity(owner.role, key, owner.team, owner.user))
        except Forbidden:
            return None

    return known


@asynccontextmanager
async def batch_care(
    settings: Settings,
    me: NodeId,
    *,
    pool: PeerPool,
    door: PeerDoor,
    state: Callable[[], ClusterState],
    loaded: Callable[[], Sequence[LoadedModel]],
    known: Callable[[Owner], Identity | None],
    clock: Clock,
) -> AsyncIterator[BatchCare]:
    """`loaded`: the models in memory here and at other nodes; `known`: who an owner is now."""

    def room(model: str) -> Seats:
        key = name_key(model)
        rows = [row for row in loaded() if name_key(row.spec.name) == key]
        return Seats(
            slots=sum(row.slots for row in rows),
            busy=sum(row.slots_busy for row in rows),
            queued=sum(row.queued for row in rows),
        )

    async def ask(endpoint: str, body: bytes, identity: Identity, request_id: str, /) -> Answer:
        return await care.ask(endpoint, body, identity, request_id)

    limits = Limits(
        file_bytes=round(settings.batch_file_mib * MIB),
        total_bytes=round(settings.batch_disk_mib * MIB),
        kept_s=round(settings.batch_keep),
    )
    disk = BatchDisk(settings.data_dir / FOLDER)
    files = Files(me, settings.name, disk, limits, clock, used_by=lambda file_id: own.uses(file_id))
    own = Batches(
        me,
        settings.name,
        disk,
        files,
        ask=ask,
        room=room,
        known=known,
        limits=limits,
        clock=clock,
        chance=random.Random(),  # noqa: S311  # jitter
    )
    care = BatchCare(ClusterBatches(me, files, own, BatchExchange(pool), state), own)
    await files.start()
    await own.start()
    open_batch_door(door, files, own)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(care.close)
        yield care
