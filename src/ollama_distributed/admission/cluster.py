"""The queues of the cluster, asked at any node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.queue import QueueAnswer, QueueNode
from ollama_distributed.state.cluster import ClusterState

MOST_ASKED = 64
"""Nodes of one answer: a rack. In a larger cluster a node is named."""


class Others(Protocol):
    """The way to other nodes (`adapters.peers.queues.QueueExchange`)."""

    async def queue(self, node: NodeId) -> QueueNode:
        """Raises `Unavailable` and `DeadlineExceeded`."""
        ...


class ClusterQueues:
    """`own`: what this node's is now. `state`: the latest, `Mirror.state`."""

    def __init__(
        self, me: NodeId, own: Callable[[], QueueNode], others: Others, state: Callable[[], ClusterState]
    ) -> None:
        self._me = me
        self._own = own
        self._others = others
        self._state = state

    async def queue(self, node: str = "") -> QueueAnswer:
        """Of one node, by its id or a name that only one has; empty: of all that live, this one first.

        Raises:
            NotFound, Conflict: there is no such node, or several.
        """
        asked = [self._known(node)] if node else [self._me, *self._living()]
        found: dict[NodeId, QueueNode] = {}

        async def ask(one: NodeId) -> None:
            found[one] = await self._of(one)

        async with anyio.create_task_group() as asking:
            for one in asked:
                asking.start_soon(ask, one)
        return QueueAnswer(nodes=tuple(found[one] for one in asked))

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

    @property
    def alone(self) -> bool:
        """No other node could take what this one refuses."""
        return not any(one.id != self._me and one.alive for one in self._state().nodes.values())
