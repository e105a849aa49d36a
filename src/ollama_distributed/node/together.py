"""Lets this node's pulls be one with those of the others."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.neighbours import NeighbourCalls, open_outside
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.matchmaker import Matchmaker
from ollama_distributed.distribution.ports import Blobs
from ollama_distributed.distribution.pulls import Pulls
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.distribution.together import MOST_ASKED, Together
from ollama_distributed.state.cluster import ClusterState


def pull_together(
    pulls: Pulls,
    me: NodeId,
    *,
    store: Blobs,
    pool: PeerPool,
    door: PeerDoor,
    swarm: Swarm,
    state: Callable[[], ClusterState],
    clock: Clock,
) -> None:
    """`pulls`: from registries; from now on by way of the cluster, where there is one."""

    def others(key: str) -> list[NodeId]:
        """Those with the model's name come first; of very many the rest is of no matter."""
        now = state()
        first = [node for node in now.models.get(key, ()) if node in now.nodes]
        found: dict[NodeId, None] = {}
        for node in (*first, *now.nodes):
            if node != me and now.nodes[node].alive and _reachable(now, node):
                found[node] = None
            if len(found) >= MOST_ASKED:
                break
        return list(found)

    def servers() -> list[NodeId]:
        now = state()
        return [node for node in now.servers if now.nodes[node].alive and _reachable(now, node)]

    neighbours = NeighbourCalls(pool, clock)
    matchmaker = Matchmaker(me, neighbours, servers, clock)
    together = Together(pulls.registry, matchmaker, neighbours, swarm, pulls.fetches, others)
    open_outside(door, matchmaker, together, store)
    pulls.go_by(together)


def _reachable(state: ClusterState, node: NodeId) -> bool:
    advert = state.nodes[node].advert
    return advert is not None and bool(advert.hop)
