"""Finds nodes for what is still short after `keeping`: the second half of a plan.

Pure. Prefers, in this order: a node where it is decided already, a node that has the files, the
faster device, the failure domain with the fewest replicas, the least crowded node, the tightest
fit (so that large gaps stay free for large models), the node's id. A copy that is not to be loaded
goes where most memory is free: there it can be.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import groupby

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.board import Board, Spot
from ollama_distributed.placement.facts import Device, Replica
from ollama_distributed.placement.keeping import Offer, Want, fits_alone
from ollama_distributed.placement.shelves import Place, Shelf
from ollama_distributed.placement.spread import Crowding, Spread

_Rank = tuple[Crowding, int, int, NodeId]


class Filling:
    """Places one model's missing replicas on a board."""

    def __init__(
        self, want: Want, kept: Mapping[NodeId, Replica], offered: Mapping[NodeId, Offer], board: Board
    ) -> None:
        self._want = want
        self._wish = want.wish
        self._offered = offered
        self._board = board
        self.replicas = dict(kept)
        self._warm = sum(replica.warm for replica in kept.values())
        self._counted: Spread | None = None

    @property
    def _spread(self) -> Spread:
        """Counted when it is needed first: most models only need what has their files already."""
        if self._counted is None:
            self._counted = Spread()
            for node in self.replicas:
                self._counted.add(self._board.spots[node].domain)
        return self._counted

    @property
    def warm_missing(self) -> int:
        return max(0, self._wish.warm - self._warm)

    @property
    def copies_missing(self) -> int:
        return max(0, self._wish.copies - len(self.replicas))

    def run(self, *, has_source: bool) -> None:
        """Fill up. Without a source only nodes that have the files can help."""
        self._warm_up()
        if has_source:
            # A node that is away is waited for: it is expected back with its copy.
            away = sum(self._board.spots[node].site.presence == "away" for node in self.replicas)
            for node, device in self._new_nodes(self.warm_missing - away, warm=True):
                self._place(Replica(node, True, device))
        self._trim()
        if has_source:
            for node, _ in self._new_nodes(self.copies_missing, warm=False):
                self._place(Replica(node))

    def _place(self, replica: Replica) -> None:
        self._warm += replica.warm and not self._runs_on(replica.node)
        if replica.node not in self.replicas and self._counted is not None:
            self._counted.add(self._board.spots[replica.node].domain)
        self.replicas[replica.node] = replica
        self._board.put(self._wish, replica.node, replica)

    def _warm_up(self) -> None:
        """Nodes that have the files, or will: only memory decides."""
        known = [o for o in self._offered.values() if o.usable and o.here and not self._runs_on(o.node)]
        known.sort(
            key=lambda o: (o.node not in self.replicas, not o.complete, not o.pinned, not o.loaded, o.node)
        )
        for offer in known:
            if not self.warm_missing:
                return
            device = self._device(self._board.spots[offer.node])
            if device is not None:
                self._place(Replica(offer.node, True, device))

    def _runs_on(self, node: NodeId) -> bool:
        replica = self.replicas.get(node)
        return replica is not None and replica.warm

    def _device(self, spot: Spot) -> Device | None:
        if spot.runs(self._wish, "gpu"):
            return "gpu"
        return "cpu" if spot.runs(self._wish, "cpu") else None

    def _trim(self) -> None:
        """Cold replicas go where warm ones came instead of them; the last decided first."""
        surplus = len(self.replicas) - max(self._wish.copies, self._wish.warm)
        if surplus <= 0:
            return
        idle = [node for node, replica in self.replicas.items() if not replica.warm]
        idle = [node for node in idle if node not in self._want.pins]
        idle.sort(key=self._worth, reverse=True)
        for node in idle[:surplus]:
            del self.replicas[node]
            if self._counted is not None:
                self._counted.add(self._board.spots[node].domain, -1)
            self._board.put(self._wish, node, None)

    def _worth(self, node: NodeId) -> tuple[bool, bool, NodeId]:
        offer = self._offered[node]
        return (not offer.complete, offer.standing is None, node)

    # ── nodes that have nothing of it yet ───────────────────────────────────────────

    def _new_nodes(self, count: int, *, warm: bool) -> Iterator[tuple[NodeId, Device]]:
        """Up to `count`, each the best after the one before was placed."""
        if count <= 0:
            return
        matching = self._board.shelves.matching(self._wish.labels)
        for _, alike in groupby(matching, key=lambda shelf: shelf.tier):
            heap = []
            for number, shelf in enumerate(alike):
                place = self._best(shelf, warm=warm)
                if place is not None:
                    heap.append((self._rank(shelf, place, warm=warm), number, shelf))
            heapq.heapify(heap)
            while heap:
                rank, number, shelf = heap[0]
                place = self._best(shelf, warm=warm)
                if place is None:
                    heapq.heappop(heap)
                elif (now := self._rank(shelf, place, warm=warm)) > rank:
                    heapq.heapreplace(heap, (now, number, shelf))  # others came since: it got worse
                else:
                    yield place.node, shelf.device
                    count -= 1
                    if not count:
                        return

    def _rank(self, shelf: Shelf, place: Place, *, warm: bool) -> _Rank:
        gap = place.free_bytes if warm else -place.free_bytes
        return ((*self._spread.crowding(shelf.domain), *place.crowding), place.crowd, gap, place.node)

    def _best(self, shelf: Shelf, *, warm: bool) -> Place | None:
        if not warm:
            return shelf.roomiest(self._takes_copy) if shelf.device == "cpu" else None
        gpu, memory = self._wish.need.of(shelf.device)
        if shelf.device == "cpu":
            return shelf.tightest(memory, self._takes_on_cpu)
        return shelf.tightest(gpu, self._takes_on_gpu) if gpu else None

    def _takes_on_gpu(self, node: NodeId) -> Crowding | None:
        spot = self._board.spots[node]
        return self._crowding(spot) if spot.runs(self._wish, "gpu") else None

    def _takes_on_cpu(self, node: NodeId) -> Crowding | None:
        spot = self._board.spots[node]
        return self._crowding(spot) if spot.runs(self._wish, "cpu") else None

    def _takes_copy(self, node: NodeId) -> Crowding | None:
        spot = self._board.spots[node]
        return self._crowding(spot) if fits_alone(spot.site, self._wish) else None

    def _crowding(self, spot: Spot) -> Crowding | None:
        """None where it has the model already, no disk for it, or could not fetch it."""
        if spot.site.node in self.replicas or self._wish.model in spot.site.no_fetch:
            return None
        need, room = spot.disk(self._wish)
        return self._spread.crowding(spot.domain)[1:] if need <= room else None
