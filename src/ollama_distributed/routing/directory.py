"""Who holds a model, as the replicated state has it.

Standings are kept until the state's nodes or models change, so that a request costs a look
into a dictionary. Of a model that very many nodes hold a draw of those that are online is
enough: two random choices of 8 are as good as two of 10,000.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.plan import LOAD_S, Dice, Standing
from ollama_distributed.routing.ports import ClusterView
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.maps import SortedMap
from ollama_distributed.state.records import HeldModel

MOST_HOLDERS = 8
"""For three tries, each the better of two; each costs a look at its load."""
LOAD_BYTES_PER_S = 1e9
"""Of a model's files into memory: a disk, not a page cache."""
_REMEMBERED = 1024
"""Models whose standings are kept; all are forgotten when so many came together."""


_NOBODY: SortedMap[NodeId, HeldModel] = SortedMap()


class Directory:
    def __init__(self, view: ClusterView, dice: Dice) -> None:
        self._view = view
        self._dice = dice
        self._made_from: tuple[object, object] = (None, None)
        self._standings: dict[str, tuple[Standing, ...]] = {}
        self._online: dict[str, int] = {}
        """How many of them are online."""
        self._digests: dict[str, str] = {}
        """Of the version that counts."""
        self._by_node: dict[str, dict[NodeId, Standing]] = {}
        """Of models with so many holders that they are drawn."""
        self._superseded: dict[str, str] = {}
        """This node's versions that do not count; empty: it does, or there is none."""

    def others(self, model: str) -> tuple[Standing, ...]:
        """Every other node that holds the version that counts, or a draw of them."""
        self._look()
        state = self._view.state()
        key = name_key(model)
        found = self._standings.get(key)
        if found is None:
            if len(self._standings) >= _REMEMBERED:
                self._forget()
            found = self._standings[key] = self._stand(state, key)
        if len(found) <= MOST_HOLDERS:
            return found
        if found[MOST_HOLDERS].status != "online":
            return found[:MOST_HOLDERS]
        online = self._online[key]
        drawn: dict[int, Standing] = {}
        while len(drawn) < MOST_HOLDERS:
            at = self._dice(online)
            drawn[at] = found[at]
        return tuple(drawn.values())

    def named(self, model: str, nodes: Iterable[NodeId]) -> list[Standing]:
        """Those of these nodes that hold it, this one left out; after `others`."""
        key = name_key(model)
        by_node = self._by_node.get(key)
        if by_node is None:
            by_node = self._by_node[key] = {one.node: one for one in self._standings.get(key, ())}
        return [by_node[node] for node in nodes if node in by_node]

    def digest(self, model: str) -> str:
        """Of the version that counts, after `others`; empty: not known."""
        return self._digests.get(name_key(model), "")

    def superseded(self, model: str, digest: str) -> bool:
        """Whether another version counts in the cluster than the one that this node holds and has
        told of. What it has not told of yet is newer than all that the others know."""
        self._look()
        key = name_key(model)
        found = self._superseded.get(key)
        if found is None:
            state = self._view.state()
            own = state.models.get(key, _NOBODY).get(self._view.me)
            counts = state.current(key) if own is not None else None
            old = own is not None and counts is not None and not own.remote and own.digest != counts.digest
            found = self._superseded[key] = own.digest if own is not None and old else ""
        return found == digest

    def labels(self, node: NodeId) -> Mapping[str, str]:
        known = self._view.state().nodes.get(node)
        return known.labels if known is not None else {}

    def draining(self, node: NodeId) -> bool:
        known = self._view.state().nodes.get(node)
        return known is not None and known.draining

    def _look(self) -> None:
        state = self._view.state()
        if self._made_from[0] is not state.nodes or self._made_from[1] is not state.models:
            self._made_from = (state.nodes, state.models)
            self._forget()

    def _forget(self) -> None:
        self._standings.clear()
        self._superseded.clear()
        self._online.clear()
        self._digests.clear()
        self._by_node.clear()

    def _stand(self, state: ClusterState, key: str) -> tuple[Standing, ...]:
        """Those that are online come first."""
        held = state.models.get(key, _NOBODY)
        versions = {model.digest for model in held.values()}
        holders: Sequence[NodeId] = tuple(held) if len(versions) < 2 else state.holders(key)
        found = [
            Standing(
                node=node,
                status=known.status,
                reachable=known.advert is not None and bool(known.advert.hop),
                load_s=LOAD_S + held[node].size_bytes / LOAD_BYTES_PER_S,
                labels=known.labels,
            )
            for node in holders
            if node != self._view.me and (known := state.nodes.get(node)) is not None
        ]
        found.sort(key=lambda one: one.status != "online")
        if holders:
            self._digests[key] = held[holders[0]].digest
        self._online[key] = sum(one.status == "online" for one in found)
        return tuple(found)
