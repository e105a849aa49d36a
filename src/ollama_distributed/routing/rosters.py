"""The other nodes that hold a model, kept ready for a draw while one after the other changes. Pure.

All lists are in order of id, so what is drawn depends on who is there and on the dice, not on the history
that led there. A change costs two searches by halves and a shift of pointers: microseconds at 10,000 nodes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.plan import Dice, Standing

MOST_HOLDERS = 6
"""For three tries, each the better of two; each costs a look at its load."""
MOST_WARM = 4
"""Of those drawn: the others may be sooner when all that have it in memory are busy."""
_MOST_LABELLED = 64
"""Sets of labels for which a model's holders are kept: policies are few."""

Labels: TypeAlias = frozenset[tuple[str, str]]


class Roster:
    """In three lists: online and in memory; online; the rest."""

    __slots__ = ("_all", "_labelled", "_standings", "_tier", "_tiers")

    def __init__(self) -> None:
        self._tiers: tuple[list[NodeId], ...] = ([], [], [])
        self._tier: dict[NodeId, int] = {}
        self._standings: dict[NodeId, Standing] = {}
        self._all: tuple[Standing, ...] | None = None
        """Of few."""
        self._labelled: dict[Labels, Roster] = {}
        """Those of them that have these labels."""

    def __len__(self) -> int:
        return len(self._standings)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._standings

    def __getitem__(self, node: NodeId) -> Standing:
        return self._standings[node]

    def put(self, one: Standing, *, warm: bool) -> None:
        node, tier = one.node, (0 if warm else 1) if one.status == "online" else 2
        before = self._tier.get(node)
        if before == tier and self._standings[node] == one:
            return
        if before != tier:
            if before is not None:
                _take_out(self._tiers[before], node)
            insort(self._tiers[tier], node)
            self._tier[node] = tier
        self._standings[node] = one
        self._all = None
        for labels, roster in self._labelled.items():
            if one.labels.items() >= labels:
                roster.put(one, warm=warm)
            else:
                roster.drop(node)

    def drop(self, node: NodeId) -> None:
        """Nothing where it is not there."""
        tier = self._tier.pop(node, None)
        if tier is None:
            return
        _take_out(self._tiers[tier], node)
        del self._standings[node]
        self._all = None
        for roster in self._labelled.values():
            roster.drop(node)

    def labelled(self, wanted: Mapping[str, str]) -> Roster:
        """Those of them with these labels, followed like the rest."""
        labels = frozenset(wanted.items())
        found = self._labelled.get(labels)
        if found is None:
            if len(self._labelled) >= _MOST_LABELLED:
                self._labelled.clear()
            found = self._labelled[labels] = Roster()
            for tier, nodes in enumerate(self._tiers):
                for node in nodes:
                    if (one := self._standings[node]).labels.items() >= labels:
                        found.put(one, warm=tier == 0)
        return found

    @property
    def warm(self) -> frozenset[NodeId]:
        return frozenset(self._tiers[0])

    def everyone(self) -> list[Standing]:
        """All of them, those first that are asked first; the same at every node with the same state."""
        return [self._standings[node] for tier in self._tiers for node in tier]

    def some(self, dice: Dice) -> tuple[Standing, ...]:
        """All of them, or a draw."""
        standings = self._standings
        if len(standings) <= MOST_HOLDERS:
            if self._all is None:
                self._all = tuple(self.everyone())
            return self._all
        warm, cold, rest = self._tiers
        drawn = [*_drawn(warm, MOST_WARM if cold else MOST_HOLDERS, dice)]
        drawn += _drawn(cold, MOST_HOLDERS - len(drawn), dice)
        drawn += _drawn(rest, MOST_HOLDERS - len(drawn), dice)
        return tuple([standings[node] for node in drawn])


def _take_out(nodes: list[NodeId], node: NodeId) -> None:
    del nodes[bisect_left(nodes, node)]


def _drawn(tier: list[NodeId], most: int, dice: Dice) -> Collection[NodeId]:
    count = len(tier)
    if count <= most:
        return tier
    drawn: dict[int, NodeId] = {}
    while len(drawn) < most:
        at = dice(count)
        drawn[at] = tier[at]
    return drawn.values()


Rank: TypeAlias = tuple[bool, float, str, NodeId]
"""Of what a node holds: whether the node lives, when the version was made, its digest. The highest is the
version that counts, as in `ClusterState.current`."""


class Versions:
    """Which version of a model counts, while its holders come, go, die and return."""

    __slots__ = ("_of", "_ranked")

    def __init__(self, ranks: Iterable[Rank]) -> None:
        self._ranked = sorted(ranks)
        self._of = {rank[-1]: rank for rank in self._ranked}

    @property
    def newest(self) -> str:
        """Its digest; empty: nobody holds any."""
        return self._ranked[-1][2] if self._ranked else ""

    def put(self, rank: Rank) -> None:
        node = rank[-1]
        if self._of.get(node) != rank:
            self.drop(node)
            self._of[node] = rank
            insort(self._ranked, rank)

    def drop(self, node: NodeId) -> None:
        """Nothing where it is not there."""
        if (rank := self._of.pop(node, None)) is not None:
            del self._ranked[bisect_left(self._ranked, rank)]
