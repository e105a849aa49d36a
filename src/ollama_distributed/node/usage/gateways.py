"""Which nodes hold shares of limits, and which can be asked for some: from the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ollama_distributed.access.quotas import holders_of
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState

OFFLINE_KEEPS_S = 300.0
"""A node that is offline holds its shares so long: it may live and only be cut off."""
LOOK_S = 10.0
"""Time alone changes the holders this often at most."""


class Gateways:
    """Implements `access.metering.Gateways` from the state."""

    def __init__(self, me: NodeId, state: Callable[[], ClusterState], wall: Callable[[], float]) -> None:
        self._me = me
        self._state = state
        self._wall = wall
        self._seen: tuple[ClusterState | None, int] = (None, 0)
        self._holders: tuple[NodeId, ...] = (me,)

    def holders(self) -> tuple[NodeId, ...]:
        state, now = self._state(), self._wall()
        seen = (state, int(now // LOOK_S))
        if seen[0] is not self._seen[0] or seen[1] != self._seen[1]:
            self._seen = seen
            there = [
                node.id
                for node in state.nodes.values()
                if node.alive or (node.member is not None and now - node.member.since < OFFLINE_KEEPS_S)
            ]
            servers = [node for node in state.servers if node in there]
            found = holders_of(servers, [node for node in there if node not in servers]) or (self._me,)
            if found != self._holders:
                self._holders = found
        return self._holders

    def living(self, nodes: Sequence[NodeId]) -> Sequence[NodeId]:
        known = self._state().nodes
        return [node for node in nodes if node in known and known[node].alive]
