"""Who holds a model, as the replicated state has it.

The holders of each model that is asked for are kept, and when the state changes only the nodes that
changed are looked at again: a request costs a look into a dictionary whatever else goes on. Of a model
that very many nodes hold a draw is enough: two random choices of 6 are as good as two of 10,000. Those
that have it in memory, as they last told the cluster, are drawn before those that would have to load it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from typing import TypeAlias

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.plan import LOAD_S, NO_LABELS, Dice, Standing
from ollama_distributed.routing.ports import ClusterView
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.holders import Holders
from ollama_distributed.state.maps import SortedMap
from ollama_distributed.state.records import HeldModel

MOST_HOLDERS = 6
"""For three tries, each the better of two; each costs a look at its load."""
MOST_WARM = 4
"""Of those drawn: the others may be sooner when all that have it in memory are busy."""
LOAD_BYTES_PER_S = 1e9
"""Of a model's files into memory: a disk, not a page cache."""
_REMEMBERED = 1024
"""Models whose holders are kept; all are forgotten when so many came together."""
_MOST_CHANGED = 64
"""Nodes between two looks; when more changed, all is made anew."""

_MOST_LABELLED = 64
"""Sets of labels for which a model's holders are kept: policies are few."""

Labels: TypeAlias = frozenset[tuple[str, str]]

_node = attrgetter("node")
_NOBODY: SortedMap[NodeId, HeldModel] = SortedMap()


class _Roster:
    """The others that hold the version of a model that counts, in three lists. A node is moved from one to
    another in constant time; their order means nothing."""

    __slots__ = ("_all", "_at", "_labelled", "_tiers", "digest", "mixed", "superseded")

    def __init__(self) -> None:
        self.digest = ""
        """Of the version that counts."""
        self.mixed = False
        """Nodes hold different versions: which one counts depends on who lives."""
        self.superseded = ""
        """The version that this node holds, if another one counts."""
        self._tiers: tuple[list[Standing], ...] = ([], [], [])
        """Online and in memory; online; the rest."""
        self._at: dict[NodeId, tuple[int, int]] = {}
        """Tier, and place in it."""
        self._all: tuple[Standing, ...] | None = None
        self._labelled: dict[Labels, _Roster] = {}
        """Those of them that have these labels."""

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._at

    def __getitem__(self, node: NodeId) -> Standing:
        tier, at = self._at[node]
        return self._tiers[tier][at]

    def put(self, one: Standing, *, warm: bool) -> None:
        self.drop(one.node)
        self._all = None
        tier = (0 if warm else 1) if one.status == "online" else 2
        self._at[one.node] = (tier, len(self._tiers[tier]))
        self._tiers[tier].append(one)
        for labels, roster in self._labelled.items():
            if one.labels.items() >= labels:
                roster.put(one, warm=warm)

    def drop(self, node: NodeId) -> None:
        """Nothing where it is not there."""
        found = self._at.pop(node, None)
        if found is None:
            return
        self._all = None
        for roster in self._labelled.values():
            roster.drop(node)
        tier, at = found
        last = self._tiers[tier].pop()
        if last.node != node:
            self._tiers[tier][at] = last
            self._at[last.node] = (tier, at)

    def labelled(self, wanted: Mapping[str, str]) -> _Roster:
        """Those of them with these labels, followed like the rest."""
        labels = frozenset(wanted.items())
        found = self._labelled.get(labels)
        if found is None:
            if len(self._labelled) >= _MOST_LABELLED:
                self._labelled.clear()
            found = self._labelled[labels] = _Roster()
            for tier, standings in enumerate(self._tiers):
                for one in standings:
                    if one.labels.items() >= labels:
                        found.put(one, warm=tier == 0)
        return found

    @property
    def warm(self) -> frozenset[NodeId]:
        return frozenset(one.node for one in self._tiers[0])

    def everyone(self) -> list[Standing]:
        """All of them, those first that are asked first; the same at every node with the same state."""
        return [one for tier in self._tiers for one in sorted(tier, key=_node)]

    def some(self, dice: Dice) -> tuple[Standing, ...]:
        """All of them, or a draw."""
        warm, cold, rest = self._tiers
        if len(self) <= MOST_HOLDERS:
            if self._all is None:
                self._all = (*warm, *cold, *rest)
            return self._all
        drawn = list(_drawn(warm, MOST_WARM if cold else MOST_HOLDERS, dice))
        drawn += _drawn(cold, MOST_HOLDERS - len(drawn), dice)
        drawn += _drawn(rest, MOST_HOLDERS - len(drawn), dice)
        return tuple(drawn)


def _drawn(tier: list[Standing], most: int, dice: Dice) -> Collection[Standing]:
    count = len(tier)
    if count <= most:
        return tier
    drawn: dict[int, Standing] = {}
    while len(drawn) < most:
        at = dice(count)
        drawn[at] = tier[at]
    return drawn.values()


class Directory:
    def __init__(self, view: ClusterView, dice: Dice) -> None:
        self._view = view
        self._dice = dice
        self._nodes: SortedMap[NodeId, NodeState] = SortedMap()
        self._models: Holders = SortedMap()
        """As they were when `_rosters` was last put right."""
        self._rosters: dict[str, _Roster] = {}

    def others(self, model: str, wanted: Mapping[str, str] = NO_LABELS) -> tuple[Standing, ...]:
        """Every other node that holds the version that counts; of very many a draw, of those with the
        labels that are wanted if there are any."""
        roster = self._roster(name_key(model))
        if wanted and len(roster) > MOST_HOLDERS:
            roster = roster.labelled(wanted) or roster
        return roster.some(self._dice)

    def everyone(self, model: str) -> list[Standing]:
        """Every other node that holds the version that counts, those that have it in memory first; the
        same order at every node."""
        return self._roster(name_key(model)).everyone()

    def warm(self, model: str) -> frozenset[NodeId]:
        """Those of them that had it in memory when they last told the cluster."""
        return self._roster(name_key(model)).warm

    def named(self, model: str, nodes: Iterable[NodeId]) -> list[Standing]:
        """Those of these nodes that hold it, this one left out."""
        roster = self._roster(name_key(model))
        return [roster[node] for node in nodes if node in roster]

    def digest(self, model: str) -> str:
        """Of the version that counts; empty: not known."""
        return self._roster(name_key(model)).digest

    def superseded(self, model: str, digest: str) -> bool:
        """Whether another version counts in the cluster than the one that this node holds and has
        told of. What it has not told of yet is newer than all that the others know."""
        return self._roster(name_key(model)).superseded == digest

    def labels(self, node: NodeId) -> Mapping[str, str]:
        known = self._view.state().nodes.get(node)
        return known.labels if known is not None else {}

    def draining(self, node: NodeId) -> bool:
        known = self._view.state().nodes.get(node)
        return known is not None and known.draining

    def _roster(self, key: str) -> _Roster:
        state = self._view.state()
        if state.nodes is not self._nodes or state.models is not self._models:
            self._follow(state)
        found = self._rosters.get(key)
        if found is None:
            if len(self._rosters) >= _REMEMBERED:
                self._rosters.clear()
            found = self._rosters[key] = self._made(state, key)
        return found

    def _follow(self, state: ClusterState) -> None:
        """Put right what the state's changes touch."""
        before, self._models = self._models, state.models
        nodes, self._nodes = state.nodes.differences(self._nodes), state.nodes
        if len(nodes) > _MOST_CHANGED:
            self._rosters.clear()
            return
        touched: dict[str, set[NodeId]] = {}
        for key in state.models.differences(before):
            if key in self._rosters:
                held = state.models.get(key, _NOBODY)
                touched[key] = set(held.differences(before.get(key, _NOBODY)))
        for node in nodes:
            known = state.nodes.get(node)
            if known is not None and known.holdings is not None:
                for model in known.holdings.models:
                    if model.name in self._rosters:
                        touched.setdefault(model.name, set()).add(node)
        for key, some in touched.items():
            if not self._put_right(state, key, some):
                del self._rosters[key]

    def _put_right(self, state: ClusterState, key: str, nodes: Iterable[NodeId]) -> bool:
        """Whether these nodes' changes touch nobody else."""
        roster, held = self._rosters[key], state.models.get(key, _NOBODY)
        for node in nodes:
            model = held.get(node)
            if roster.mixed or (model is not None and model.digest != roster.digest):
                return False
            self._put(roster, state, key, node, model)
        return True

    def _made(self, state: ClusterState, key: str) -> _Roster:
        roster, held = _Roster(), state.models.get(key, _NOBODY)
        roster.mixed = len({model.digest for model in held.values()}) > 1
        holders = state.holders(key) if roster.mixed else tuple(held)
        if not holders:
            return roster
        roster.digest = held[holders[0]].digest
        own, counts = held.get(self._view.me), state.current(key) if roster.mixed else None
        if own is not None and counts is not None and not own.remote and own.digest != counts.digest:
            roster.superseded = own.digest
        for node in holders:
            self._put(roster, state, key, node, held[node])
        return roster

    def _put(
        self, roster: _Roster, state: ClusterState, key: str, node: NodeId, model: HeldModel | None
    ) -> None:
        """As the state has it now; None: the node does not hold the model."""
        known = state.nodes.get(node)
        if model is None or known is None or node == self._view.me:
            roster.drop(node)
            return
        standing = Standing(
            node=node,
            status=known.status,
            reachable=known.advert is not None and bool(known.advert.hop),
            load_s=LOAD_S + model.size_bytes / LOAD_BYTES_PER_S,
            labels=known.labels,
        )
        loaded = known.placed.loaded if known.placed is not None else ()
        roster.put(standing, warm=any(one.model == key for one in loaded))
