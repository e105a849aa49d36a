"""Nodes with room, sorted so that the best one for a model is found without asking each.

Pure. A shelf holds nodes that a model cannot tell apart but by their room: same kind of device,
speed, failure domain, and labels that any model asks for. On it they stand by how many replicas
they have and by free memory, so the tightest fit among the least crowded is one bisection away.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Site

Domain = tuple[str, ...]
_Key = tuple[bool, int, Domain, tuple[tuple[str, str], ...]]


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a node stands. Lower is better, apart from what its shelf says."""

    crowd: int
    """Replicas that it has."""
    free_bytes: int
    node: NodeId


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

    def tightest(self, need_bytes: int, fits: Callable[[NodeId], bool]) -> Place | None:
        """Of the least crowded nodes with so much free, the one with the least."""
        for crowd in self._crowds:
            row = self._rows[crowd]
            for i in range(bisect_left(row, (need_bytes, "")), len(row)):
                free, node = row[i]
                if fits(node):
                    return Place(crowd, free, node)
        return None

    def roomiest(self, fits: Callable[[NodeId], bool]) -> Place | None:
        """Of the least crowded nodes, the one with the most free."""
        for crowd in self._crowds:
            row = self._rows[crowd]
            end = len(row)
            while end:
                free = row[end - 1][0]
                start = bisect_left(row, (free, ""))
                for i in range(start, end):  # equals by id, as everywhere
                    node = row[i][1]
                    if fits(node):
                        return Place(crowd, free, node)
                end = start
        return None

    def most_free(self) -> tuple[int, NodeId] | None:
        """The node with the most free memory, and how much."""
        return max((row[-1] for row in self._rows.values()), default=None)

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))


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
        domain = domain_of(site, self._spread_by)
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


def domain_of(site: Site, spread_by: tuple[str, ...]) -> Domain:
    """What fails together with it, the widest first; a label that it lacks is empty."""
    return tuple(site.labels.get(label, "") for label in spread_by)


class Spread:
    """How many replicas of one model each failure domain has."""

    def __init__(self) -> None:
        self._counts: dict[Domain, int] = {}

    def add(self, domain: Domain, by: int = 1) -> None:
        for depth in range(1, len(domain) + 1):
            self._counts[domain[:depth]] = self._counts.get(domain[:depth], 0) + by

    def crowding(self, domain: Domain) -> tuple[int, ...]:
        """Replicas beside it in each domain, the widest first. Lower is better."""
        counts = self._counts
        return tuple(counts.get(domain[:depth], 0) for depth in range(1, len(domain) + 1))
