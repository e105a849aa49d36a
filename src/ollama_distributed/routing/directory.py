"""Who holds a model, as the replicated state has it.

Standings are kept until the state's nodes or models change, so that a request costs a look
into a dictionary. Of a model that very many nodes hold a draw is enough: two random choices
of 32 are as good as two of 10,000.
"""

from __future__ import annotations

from collections.abc import Sequence

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.plan import Dice, Standing
from ollama_distributed.routing.ports import ClusterView
from ollama_distributed.state.cluster import ClusterState

MOST_HOLDERS = 32
_REMEMBERED = 1024
"""Models whose standings are kept; all are forgotten when so many came together."""


class Directory:
    def __init__(self, view: ClusterView, dice: Dice) -> None:
        self._view = view
        self._dice = dice
        self._made_from: tuple[object, object] = (None, None)
        self._standings: dict[str, tuple[Standing, ...]] = {}

    def others(self, model: str) -> tuple[Standing, ...]:
        """Every other node that holds it, or a draw of them."""
        state = self._view.state()
        made_from = (state.nodes, state.models)
        if self._made_from[0] is not state.nodes or self._made_from[1] is not state.models:
            self._made_from = made_from
            self._standings.clear()
        key = name_key(model)
        found = self._standings.get(key)
        if found is None:
            if len(self._standings) >= _REMEMBERED:
                self._standings.clear()
            found = self._standings[key] = self._stand(state, key)
        if len(found) > MOST_HOLDERS:
            return tuple(found[self._dice(len(found))] for _ in range(MOST_HOLDERS))
        return found

    def draining(self, node: NodeId) -> bool:
        known = self._view.state().nodes.get(node)
        return known is not None and known.draining

    def _stand(self, state: ClusterState, key: str) -> tuple[Standing, ...]:
        holders: Sequence[NodeId] = tuple(state.models.get(key, ()))
        return tuple(
            Standing(
                node=node,
                status=known.status,
                reachable=known.advert is not None and bool(known.advert.hop),
            )
            for node in holders
            if node != self._view.me and (known := state.nodes.get(node)) is not None
        )
