"""The queues of the cluster, asked at any node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import anyio

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.queue import QueueAnswer, QueueNode, QueueWaiting
from ollama_distributed.state.cluster import ClusterState

T = TypeVar("T")

MOST_ASKED = 64
"""Nodes of one answer: a rack. In a larger cluster a node is named."""


class Others(Protocol):
    """The way to other nodes (`adapters.peers.queues.QueueExchange`)."""

    async def queue(self, node: NodeId) -> QueueNode:
        """Raises `Unavailable` and `DeadlineExceeded`."""
        ...

    async def waiting(self, node: NodeId) -> QueueWaiting:
        """As `queue`."""
        ...


class ClusterQueues:
    """`own`: what this node's is now, `own_waiting`: each request of it. `state`: the latest,
    `Mirror.state`."""

    def __init__(
        self,
        me: NodeId,
        own: Callable[[], QueueNode],
        own_waiting: Callable[[], Awaitable[QueueWaiting]],
        others: Others,
        state: Callable[[], ClusterState],
    ) -> None:
        self._me = me
        self._own = own
        self._own_waiting = own_waiting
        self._others = others
        self._state = state

    async def queue(self, node: str = "") -> QueueAnswer:
        """Of one node, by its id or a name that only one has; empty: of all that live, this one first.

        Raises:
            NotFound, Conflict: there is no such node, or several.
        """
        asked = [self._known(node)] if node else [self._me, *self._living()]
        return QueueAnswer(nodes=tuple(await _all(asked, self._of)))

    async def waiting(self) -> Sequence[QueueWaiting]:
        """Each request that waits, of all nodes that live, this one first."""
        return await _all([self._me, *self._living()], self._waiting_at)

    def _known(self, node: str) -> NodeId:
        return self._me if node == self._me else self._state().resolve(node)

    def _living(self) -> list[NodeId]:
        nodes = self._state().nodes.values()
        return [one.id for one in nodes if one.id != self._me and one.alive][: MOST_ASKED - 1]

    async def _of(self, node: NodeId) -> QueueNode:
        if node == self._me:
            return self._own()
        try:
            return await self._others.queue(node)
        except OllamaDistributedError as error:
            known = self._state().nodes.get(node)
            return QueueNode(node=node, name=known.name if known is not None else "", error=error.message)

    async def _waiting_at(self, node: NodeId) -> QueueWaiting:
        if node == self._me:
            return await self._own_waiting()
        try:
            return await self._others.waiting(node)
        except OllamaDistributedError as error:
            return QueueWaiting(node=node, error=error.message)

    @property
    def alone(self) -> bool:
        """No other node could take what this one refuses."""
        return not any(one.id != self._me and one.alive for one in self._state().nodes.values())


async def _all(nodes: Sequence[NodeId], of: Callable[[NodeId], Awaitable[T]]) -> list[T]:
    """What each says, asked at once."""
    found: dict[NodeId, T] = {}

    async def ask(one: NodeId) -> None:
        found[one] = await of(one)

    async with anyio.create_task_group() as asking:
        for one in nodes:
            asking.start_soon(ask, one)
    return [found[one] for one in nodes]
