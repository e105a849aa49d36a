"""Who holds a model, as the replicated state has it.

The holders of each model that is asked for are kept, and when the state changes only the nodes that
changed are looked at again, before the next request comes: a request costs a look into a dictionary
whatever else goes on. Of a model that very many nodes hold a draw is enough: two random choices of 6 are
as good as two of 10,000. Those that have it in memory, as they last told the cluster, are drawn before
those that would have to load it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.plan import LOAD_S, NO_LABELS, Dice, Standing
from ollama_distributed.routing.ports import ClusterView
from ollama_distributed.routing.rosters import MOST_HOLDERS, Rank, Roster, Versions
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.holders import Holders
from ollama_distributed.state.maps import SortedMap
from ollama_distributed.state.records import HeldModel

LOAD_BYTES_PER_S = 1e9
"""Of a model's files into memory: a disk, not a page cache."""
_REMEMBERED = 1024
"""Models whose holders are kept; all are forgotten when so many came together."""
_MOST_CHANGED = 64
"""Nodes between two looks; when more changed, all is made anew."""
_MOST_UNASKED = 1024
"""So often a model's holders are put right for nobody; then they are forgotten, and made anew when asked for.
That takes as long as to put them right for as many nodes."""

_NOBODY: SortedMap[NodeId, HeldModel] = SortedMap()


def _alike(was: NodeState, known: NodeState) -> bool:
    """Whether nothing changed that a choice goes by but what is in its memory."""
    return (was.advert is known.advert and was.member is known.member and was.intent is known.intent) or (
        was.status,
        _reachable(was),
        was.labels,
    ) == (known.status, _reachable(known), known.labels)


def _reachable(known: NodeState) -> bool:
    return known.advert is not None and bool(known.advert.hop)


def _loaded(known: NodeState) -> frozenset[str]:
    return frozenset([one.model for one in known.placed.loaded]) if known.placed is not None else frozenset()


class _Holders:
    """Of a model."""

    __slots__ = ("digest", "roster", "superseded", "unasked", "versions")

    def __init__(self, versions: Versions) -> None:
        self.versions = versions
        """Of all that hold the model, this node too."""
        self.digest = versions.newest
        """Of the version that counts."""
        self.roster = Roster()
        """The others that hold it."""
        self.superseded = ""
        """The version that this node holds, if another one counts."""
        self.unasked = 0
        """How often it was put right since a request went by it."""


class Directory:
    def __init__(self, view: ClusterView, dice: Dice) -> None:
        self._view = view
        self._dice = dice
        self._nodes: SortedMap[NodeId, NodeState] = SortedMap()
        self._models: Holders = SortedMap()
        """As they were when `_known` was last put right."""
        self._known: dict[str, _Holders] = {}

    def others(self, model: str, wanted: Mapping[str, str] = NO_LABELS) -> tuple[Standing, ...]:
        """Every other node that holds the version that counts; of very many a draw, of those with the
        labels that are wanted if there are any."""
        roster = self._of(model).roster
        if wanted and len(roster) > MOST_HOLDERS:
            roster = roster.labelled(wanted) or roster
        return roster.some(self._dice)

    def everyone(self, model: str) -> list[Standing]:
        """Every other node that holds the version that counts, those that have it in memory first; the
        same order at every node."""
        return self._of(model).roster.everyone()

    def warm(self, model: str) -> frozenset[NodeId]:
        """Those of them that had it in memory when they last told the cluster."""
        return self._of(model).roster.warm

    def named(self, model: str, nodes: Iterable[NodeId]) -> list[Standing]:
        """Those of these nodes that hold it, this one left out."""
        roster = self._of(model).roster
        return [roster[node] for node in nodes if node in roster]

    def digest(self, model: str) -> str:
        """Of the version that counts; empty: not known."""
        return self._of(model).digest

    def superseded(self, model: str, digest: str) -> bool:
        """Whether another version counts in the cluster than the one that this node holds and has
        told of. What it has not told of yet is newer than all that the others know."""
        return self._of(model).superseded == digest

    def labels(self, node: NodeId) -> Mapping[str, str]:
        known = self._view.state().nodes.get(node)
        return known.labels if known is not None else {}

    def draining(self, node: NodeId) -> bool:
        known = self._view.state().nodes.get(node)
        return known is not None and known.draining

    def follow(self) -> None:
        """Put right what the state's changes touch. Called after each, so that no request does it."""
        state = self._view.state()
        if state.nodes is not self._nodes or state.models is not self._models:
            self._follow(state)

    def _of(self, model: str) -> _Holders:
        key, state = name_key(model), self._view.state()
        if state.nodes is not self._nodes or state.models is not self._models:
            self._follow(state)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[key] = self._made(state, key)
        found.unasked = 0
        return found

    def _follow(self, state: ClusterState) -> None:
        were, self._nodes = self._nodes, state.nodes
        before, self._models = self._models, state.models
        changed = state.nodes.differences(were)
        if len(changed) > _MOST_CHANGED:
            self._known.clear()
            return
        touched: dict[str, set[NodeId]] = {}
        for key in state.models.differences(before):
            if key in self._known:
                held = state.models.get(key, _NOBODY)
                touched[key] = set(held.differences(before.get(key, _NOBODY)))
        for node in changed:
            for key in self._concerned(were.get(node), state.nodes.get(node)):
                touched.setdefault(key, set()).add(node)
        for key, some in touched.items():
            if not self._put_right(state, key, some):
                del self._known[key]

    def _concerned(self, was: NodeState | None, known: NodeState | None) -> list[str]:
        """Models that the node holds of which a choice may be another one now."""
        if known is None or known.holdings is None:
            return []
        names = [model.name for model in known.holdings.models if model.name in self._known]
        if not names or was is None or not _alike(was, known):
            return names
        moved = _loaded(was) ^ _loaded(known)
        return [name for name in names if name in moved]

    def _put_right(self, state: ClusterState, key: str, nodes: Iterable[NodeId]) -> bool:
        """Whether it was worth it: somebody asks, and the version that counts is still the same one."""
        kept, held = self._known[key], state.models.get(key, _NOBODY)
        kept.unasked += 1
        if kept.unasked > _MOST_UNASKED:
            return False
        changed = [(node, state.nodes.get(node), held.get(node)) for node in nodes]
        for node, known, model in changed:
            if model is None:
                kept.versions.drop(node)
            else:
                kept.versions.put(_rank(node, known, model))
        if kept.versions.newest != kept.digest:
            return False
        for node, known, model in changed:
            self._put(kept, key, node, known, model)
        return True

    def _made(self, state: ClusterState, key: str) -> _Holders:
        held = state.models.get(key, _NOBODY)
        every = [(node, state.nodes.get(node), model) for node, model in held.items()]
        made = _Holders(Versions([_rank(node, known, model) for node, known, model in every]))
        for node, known, model in every:
            self._put(made, key, node, known, model)
        return made

    def _put(
        self, kept: _Holders, key: str, node: NodeId, known: NodeState | None, model: HeldModel | None
    ) -> None:
        """As the state has it now; None: the node does not hold the model."""
        counts = model is not None and (model.digest == kept.digest or model.remote)
        if node == self._view.me:
            kept.superseded = model.digest if model is not None and not counts else ""
        elif model is None or known is None or not counts:
            kept.roster.drop(node)
        else:
            standing = Standing(
                node=node,
                status=known.status,
                reachable=_reachable(known),
                load_s=LOAD_S + model.size_bytes / LOAD_BYTES_PER_S,
                labels=known.labels,
            )
            loaded = known.placed.loaded if known.placed is not None else ()
            kept.roster.put(standing, warm=any(one.model == key for one in loaded))


def _rank(node: NodeId, known: NodeState | None, model: HeldModel) -> Rank:
    return known is not None and known.alive, model.modified_at, model.digest, node
