"""Questions about queues from node to node: both sides of the hop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.queue import QueueNode, QueueWaiting
from ollama_distributed.cluster.identity.ca import Peer

SHOW, WAITING = "queue/show", "queue/waiting"
SHOW_S = 2.0
"""Somebody looks on, and a node that is slower says nothing worth the wait."""


class QueueAsk(msgspec.Struct, frozen=True):
    """A question that says all by its name."""


class QueueExchange:
    """Implements `admission.cluster.Others`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def queue(self, node: NodeId) -> QueueNode:
        return await self._pool.ask(node, SHOW, QueueAsk(), QueueNode, deadline_s=SHOW_S, fresh=False)

    async def waiting(self, node: NodeId) -> QueueWaiting:
        return await self._pool.ask(node, WAITING, QueueAsk(), QueueWaiting, deadline_s=SHOW_S, fresh=False)


def open_queue_door(
    door: PeerDoor, own: Callable[[], QueueNode], own_waiting: Callable[[], Awaitable[QueueWaiting]]
) -> None:
    """Answer other nodes' questions about this node's queue."""

    async def show(_peer: Peer, _ask: QueueAsk) -> QueueNode:
        return own()

    async def waiting(_peer: Peer, _ask: QueueAsk) -> QueueWaiting:
        return await own_waiting()

    door.add(SHOW, show, QueueAsk)
    door.add(WAITING, waiting, QueueAsk)
