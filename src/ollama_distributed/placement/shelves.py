"""Nodes with room, sorted so that the best one for a model is found without asking each.

Pure. A shelf holds nodes that a model hardly tells apart but by their room: same kind of device,
speed, widest failure domain, and labels that any model asks for. On it they stand by how many
replicas they have and by free memory, so the tightest fit among the least crowded is one bisection
away. The narrower failure domains are compared among the first `LOOK` nodes that fit: there are too
many of them for shelves of their own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Site
from ollama_distributed.placement.spread import Crowding, Domain, domain_of

Judge = Callable[[NodeId], Crowding | None]
"""How many replicas of the model each narrower failure domain of a node has; None: it cannot take
one."""
LOOK = 32

_Key = tuple[bool, int, Domain, tuple[tuple[str, str], ...]]


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a node stands."""

    crowd: int
    """Replicas that it has."""
    free_bytes: int
    node: NodeId
    crowding: Crowding = ()
    """Of the model that is to be placed, in the node's narrower failure domains."""


class Shelf:
    """Nodes of one kind."""

    def __init__(self, device: Device, speed: int, domain: Domain, labels: Mapping[str, str]) -> None:
        self.device = device
        self.tier = (device != "gpu", -speed)
        """Lower is faster."""
        self.domain = domain
        self.labels = labels
        self._crowds: list[int] = []
        self._rows: dict[int, list[tuple[int, NodeId]]] = {}

    def add(self, place: Place) -> None:
        row = self._rows.get(place.crowd)
        if row is None:
            row = self._rows[place.crowd] = []
            insort(self._crowds, place.crowd)
        insort(row, (place.free_bytes, place.node))

    def remove(self, place: Place) -> None:
        row = self._rows[place.crowd]
        del row[bisect_left(row, (place.free_bytes, place.node))]
        if not row:
            del self._rows[place.crowd]
            del self._crowds[bisect_left(self._crowds, place.crowd)]

    def tightest(self, need_bytes: int, judge: Judge) -> Place | None:
        """Of the least crowded nodes with so much free, the one with the least."""
        return _first(self._from(need_bytes), judge)

    def roomiest(self, judge: Judge) -> Place | None:
        """Of the least crowded nodes, the one with the most free."""
        return _first(self._downward(), judge)

    def _from(self, need_bytes: int) -> Iterator[tuple[int, int, NodeId]]:
        for crowd in self._crowds:
            row = self._rows[crowd]
            for i in range(bisect_left(row, (need_bytes, "")), len(row)):
                free, node = row[i]
                yield crowd, free, node

    def _downward(self) -> Iterator[tuple[int, int, NodeId]]:
        for crowd in self._crowds:
            row = self._rows[crowd]
            end = len(row)
            while end:
                free = row[end - 1][0]
                start = bisect_left(row, (free, ""))
                for i in range(start, end):  # equals by id, as everywhere
                    yield crowd, free, row[i][1]
                end = start

    def most_free(self) -> tuple[int, NodeId] | None:
        """The node with the most free memory, and how much."""
        return max((row[-1] for row in self._rows.values()), default=None)

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))


def _first(nodes: Iterator[tuple[int, int, NodeId]], judge: Judge) -> Place | None:
    """The first whose narrower failure domains are empty, or the least crowded of `LOOK`."""
    best: Place | None = None
    left = LOOK
    for crowd, free, node in nodes:
        crowding = judge(node)
        if crowding is None:
            continue
        if best is None or crowding < best.crowding:
            best = Place(crowd, free, node, crowding)
        left -= 1
        if not left or not any(crowding):
            break
    return best


class Shelves:
    """All nodes that may get replicas. `labels`: those that models ask for."""

    def __init__(self, spread_by: tuple[str, ...], labels: Iterable[str]) -> None:
        self.labels = frozenset(labels)
        self._spread_by = spread_by
        self._told_apart = tuple(sorted(self.labels))
        self._shelves: dict[_Key, Shelf] = {}
        self._order: list[_Key] = []

    def of(self, site: Site, device: Device) -> Shelf:
        """The shelf of a node; made when it is the first."""
        domain = domain_of(site, self._spread_by[:1])
        labels = tuple((label, site.labels[label]) for label in self._told_apart if label in site.labels)
        key = (device != "gpu", -site.speed, domain, labels)
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = Shelf(device, site.speed, domain, dict(labels))
            insort(self._order, key)
        return shelf

    def matching(self, labels: Mapping[str, str]) -> Iterator[Shelf]:
        """Shelves whose nodes have all of `labels`, the fastest first."""
        for key in self._order:
            shelf = self._shelves[key]
            if all(shelf.labels.get(name) == value for name, value in labels.items()):
                yield shelf
