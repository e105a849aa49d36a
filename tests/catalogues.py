"""The cluster's catalogue at nodes of one process: deletions reach every node that is there."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.adapters.peers.names import NameExchange, open_names
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.cluster import ClusterCatalog
from ollama_distributed.catalog.versions import Cleaner, history_in
from ollama_distributed.models.held import held_model
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.changes import Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.deleting import DeleteModel
from ollama_distributed.state.records import Holdings
from tests.hop_nodes import HopNode, HopNodes


class Catalogues:
    """`add` each node; `down`: nothing can be agreed on. `now`: of whoever deletes."""

    def __init__(self, nodes: HopNodes) -> None:
        self.nodes = nodes
        self.down = False
        self.away: set[NodeId] = set()
        self.now = 0.0
        self._cleaners: dict[NodeId, tuple[HopNode, Cleaner]] = {}

    def add(self, node: HopNode) -> ClusterCatalog:
        open_names(node.door, node.catalog)
        node.catalog.follow(lambda key: history_in(node.state(), key))
        self._cleaners[node.id] = (node, Cleaner(node.catalog, node.serving.unload))
        return ClusterCatalog(node.catalog, NameExchange(node.pool), node.id, node.state, self)

    def tell(self) -> None:
        """Every node writes what it holds."""
        for node, _ in self._cleaners.values():
            if node.id not in self.away:
                held = Holdings(node=node.id, models=tuple(map(held_model, node.catalog.list())))
                self.nodes.write(state_keys.holdings(node.id), held)

    async def clean(self, member_since: float = 0.0) -> None:
        for node, cleaner in self._cleaners.values():
            if node.id not in self.away:
                await cleaner.clean(self.nodes.state.deleted, member_since)
        self.tell()

    # ── catalog.cluster.Consensus ───────────────────────────────────────────────────

    async def propose(self, change: DeleteModel) -> None:
        if self.down:
            raise Unavailable("the cluster has no leader now")
        state = self.nodes.state
        proposal = Proposal(id=f"p{state.revision}", change=change, actor="a", at=self.now)
        for write in plan_change(state, proposal):
            self.nodes.state = apply(self.nodes.state, write.key, write.value, self.nodes.state.revision + 1)
        await self.clean()

    async def seen(self, predicate: Callable[[ClusterState], bool]) -> None:
        self.tell()
        assert predicate(self.nodes.state)
