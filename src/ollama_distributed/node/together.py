"""Lets this node's pulls, pushes and creates be those of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.neighbours import NeighbourCalls, open_outside
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.cluster import ClusterCatalog
from ollama_distributed.distribution.bringing import Bringing
from ollama_distributed.distribution.finding import MOST_ASKED
from ollama_distributed.distribution.matchmaker import Matchmaker
from ollama_distributed.distribution.ports import Blobs, Library
from ollama_distributed.distribution.together import Together
from ollama_distributed.node.registries import RegistryTransfers
from ollama_distributed.node.swarm import ModelMoves
from ollama_distributed.state.cluster import ClusterState


def work_together(
    transfers: RegistryTransfers,
    moves: ModelMoves,
    everywhere: ClusterCatalog,
    me: NodeId,
    *,
    store: Blobs,
    library: Library,
    pool: PeerPool,
    door: PeerDoor,
    state: Callable[[], ClusterState],
    clock: Clock,
) -> None:
    """What comes from registries and goes there does so by way of the cluster from now on, where
    there is one. `everywhere`: finds there what models are made from."""
    pulls = transfers.pulls

    def others(key: str = "") -> list[NodeId]:
        """Living nodes, those that hold the model first; of very many the rest is of no matter."""
        now = state()
        found: dict[NodeId, None] = {}
        for node in chain(now.models.get(key, ()), now.nodes):
            if node != me and node in now.nodes and _reachable(now, node):
                found[node] = None
            if len(found) >= MOST_ASKED:
                break
        return list(found)

    def servers() -> list[NodeId]:
        now = state()
        return [node for node in now.servers if _reachable(now, node)]

    neighbours = NeighbourCalls(pool, clock)
    matchmaker = Matchmaker(me, neighbours, servers, clock)
    together = Together(pulls.registry, matchmaker, neighbours, moves.swarm, pulls.fetches, others)
    bringing = Bringing(moves.copying, neighbours, moves.swarm, store, library, others, everywhere.resolve)
    open_outside(door, matchmaker, together, store)
    pulls.go_by(together, bringing)
    transfers.downloads.ask_origins(together.origins)
    everywhere.bring_by(bringing)


def _reachable(state: ClusterState, node: NodeId) -> bool:
    known = state.nodes[node]
    return known.alive and known.advert is not None and bool(known.advert.hop)
