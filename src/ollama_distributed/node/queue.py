"""The queue of this node, wired: to its settings, to what is loaded, to the other nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import anyio.lowlevel

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.adapters.peers.queues import QueueExchange, open_queue_door
from ollama_distributed.admission.bounds import Bounds
from ollama_distributed.admission.cluster import ClusterQueues
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.queue import (
    Ask,
    QueueAnswer,
    QueuedRow,
    QueueFigures,
    QueueNode,
    QueueWaiting,
    key_of,
)
from ollama_distributed.gateway.queueing import Turn
from ollama_distributed.node.settings import Settings
from ollama_distributed.serving.residents import Ticket
from ollama_distributed.state.cluster import ClusterState

MOST_ROWS = 1024
"""Requests of one node that are told of: twice as many as wait there unless it was set so."""
SLICE = 16
"""Rows made in one turn of the loop: the place of one behind 500 others takes a tenth of a millisecond."""


class Runs(Protocol):
    """`serving.service.Serving`."""

    def names(self) -> dict[str, str]: ...

    @property
    def saturated(self) -> bool: ...


class NodeQueue:
    """Implements `gateway.queue_port.Queues`."""

    def __init__(
        self,
        me: NodeId,
        name: str,
        waiting: Admission[Ticket],
        runs: Runs,
        *,
        pool: PeerPool,
        door: PeerDoor,
        state: Callable[[], ClusterState],
    ) -> None:
        self._me = me
        self._name = name
        self._waiting = waiting
        self._runs = runs
        self._cluster = ClusterQueues(me, self.own, self.own_waiting, QueueExchange(pool), state)
        open_queue_door(door, self.own, self.own_waiting)

    def own(self) -> QueueNode:
        figures = self._waiting.figures()
        return QueueNode(
            node=self._me,
            name=self._name,
            waiting=self._waiting.waiting,
            most=self._waiting.most,
            refused=sum(figures.refused.values()),
            models=self._waiting.rows(self._runs.names(), self._name),
        )

    async def own_waiting(self) -> QueueWaiting:
        rows: list[QueuedRow] = []
        for row in self._waiting.waiters(self._runs.names(), self._name):
            rows.append(row)
            if len(rows) == MOST_ROWS:
                break
            if len(rows) % SLICE == 0:
                await anyio.lowlevel.checkpoint()
        return QueueWaiting(node=self._me, waiting=tuple(rows), began=self._waiting.began_lately())

    async def waiting(self) -> Sequence[QueueWaiting]:
        return await self._cluster.waiting()

    def figures(self) -> QueueFigures:
        return self._waiting.figures()

    async def queue(self, node: str = "") -> QueueAnswer:
        return await self._cluster.queue(node)

    def shed(self, identity: Identity, turn: Turn) -> None:
        """A model with a free slot takes a request whoever waits for others: that one is read first."""
        if not (self._waiting.waiting and self._runs.saturated and self._cluster.alone):
            return
        ask = Ask(key=key_of(identity), team=identity.team, priority=turn.priority)
        if (error := self._waiting.refusal(ask)) is not None:
            raise error


def bounds_of(settings: Settings) -> Bounds:
    return Bounds(
        total=settings.max_queue,
        per_model=settings.queue_per_model,
        per_team=settings.queue_per_team,
        per_key=settings.queue_per_key,
    )
