"""Keeps a model's replicas apart: few of them in what fails together.

Pure. A failure domain is a path, the widest first: zone, rack.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Generic, TypeVar

from ollama_distributed.placement.facts import Site

Domain = tuple[str, ...]
Crowding = tuple[int, ...]
T = TypeVar("T")


def domain_of(site: Site, spread_by: tuple[str, ...]) -> Domain:
    """What fails together with it, the widest first; a label that it lacks is empty."""
    labels = site.labels
    return tuple([labels.get(label, "") for label in spread_by])


class Spread:
    """How many replicas of one model each failure domain has."""

    def __init__(self) -> None:
        self._counts: dict[Domain, int] = {}

    def add(self, domain: Domain, by: int = 1) -> None:
        for depth in range(1, len(domain) + 1):
            self._counts[domain[:depth]] = self._counts.get(domain[:depth], 0) + by

    def count(self, domain: Domain) -> int:
        return self._counts.get(domain, 0)

    def crowding(self, domain: Domain) -> Crowding:
        """Replicas beside it in each domain, the widest first. Lower is better."""
        counts = self._counts
        return tuple([counts.get(domain[:depth], 0) for depth in range(1, len(domain) + 1)])


def apart(by_domain: Mapping[Domain, list[T]], count: int, beside: Spread) -> list[T]:
    """Up to `count`, each from the domain that is least crowded by then (of equals, the first by
    name), each domain's in their order. `beside`: what the model has elsewhere."""
    left = min(count, sum(map(len, by_domain.values())))
    branch = _Branch((), {domain: found[::-1] for domain, found in by_domain.items()}, beside)
    return [branch.take() for _ in range(left)]


class _Branch(Generic[T]):
    """A failure domain and those within it, the least crowded on top. Only what was taken from
    changes its place: thousands are taken in some us each."""

    __slots__ = ("_count", "_domain", "_found", "_within")

    def __init__(self, domain: Domain, by_domain: Mapping[Domain, list[T]], beside: Spread) -> None:
        """`by_domain`: all within this one, the first last."""
        self._domain = domain
        self._count = beside.count(domain)
        self._found = by_domain.get(domain, [])
        narrower: dict[Domain, dict[Domain, list[T]]] = {}
        for full, found in by_domain.items():
            if len(full) > len(domain):
                narrower.setdefault(full[: len(domain) + 1], {})[full] = found
        branches = [_Branch(one, inner, beside) for one, inner in narrower.items()]
        self._within = [(branch.key, branch) for branch in branches]
        heapq.heapify(self._within)

    @property
    def key(self) -> tuple[Crowding, Domain]:
        """How crowded the best domain within it is; that one."""
        if not self._within:
            return (self._count,), self._domain
        crowding, best = self._within[0][0]
        return (self._count, *crowding), best

    @property
    def empty(self) -> bool:
        return not self._within and not self._found

    def take(self) -> T:
        self._count += 1
        if not self._within:
            return self._found.pop()
        branch = self._within[0][1]
        taken = branch.take()
        if branch.empty:
            heapq.heappop(self._within)
        else:
            heapq.heapreplace(self._within, (branch.key, branch))
        return taken
