"""Questions about disks from node to node: both sides of the hop."""

from __future__ import annotations

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.disk import DiskAnswer, ScrubRow
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.distribution.disk import NodeDisk
from ollama_distributed.distribution.disk_ports import EvictHere, Freed, KeepAsk, NothingAsked, Promise

KEEP, SHOW, EVICT, SCRUB = "disk/keep", "disk/show", "disk/evict", "disk/scrub"

KEEP_S = 3.0
"""Somebody waits for room meanwhile, and other holders can be asked."""
SHOW_S = 5.0
EVICT_S = 30.0
"""Other holders are asked, and a large file is removed."""


class DiskExchange:
    """Implements `distribution.disk_ports.Disks`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def keep(self, node: NodeId, ask: KeepAsk) -> bool:
        return (await self._pool.ask(node, KEEP, ask, Promise, deadline_s=KEEP_S, fresh=False)).kept

    async def disk(self, node: NodeId) -> DiskAnswer:
        return await self._pool.ask(node, SHOW, NothingAsked(), DiskAnswer, deadline_s=SHOW_S, fresh=False)

    async def evict(self, node: NodeId, ask: EvictHere) -> int:
        return (await self._pool.ask(node, EVICT, ask, Freed, deadline_s=EVICT_S)).bytes

    async def scrub(self, node: NodeId) -> ScrubRow:
        return await self._pool.ask(node, SCRUB, NothingAsked(), ScrubRow, deadline_s=SHOW_S)


def open_disk_door(door: PeerDoor, own: NodeDisk) -> None:
    """Answer other nodes' questions about this node's disk."""

    async def keep(peer: Peer, ask: KeepAsk) -> Promise:
        return Promise(kept=await own.evictions.promise(peer.node, ask))

    async def show(_peer: Peer, _ask: NothingAsked) -> DiskAnswer:
        return await own.answer()

    async def evict(peer: Peer, ask: EvictHere) -> Freed:
        if ask.last_copy and peer.role != "server":
            raise Forbidden(
                "only a server of the cluster, or the node itself, lets a last copy go: ask there"
            )
        return Freed(bytes=await own.evictions.evict(ask.model, last_copy=ask.last_copy))

    async def scrub(_peer: Peer, _ask: NothingAsked) -> ScrubRow:
        return own.scrubber.ask()

    door.add(KEEP, keep, KeepAsk)
    door.add(SHOW, show, NothingAsked)
    door.add(EVICT, evict, EvictHere)
    door.add(SCRUB, scrub, NothingAsked)
