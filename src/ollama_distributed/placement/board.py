"""What is left of each node once replicas are put on it.

Pure. Depends only on which sites and replicas are on it, not on the order in which they came.
A trial is taken back by `undo`, so that a plan leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica, Rules, Site, Taken, Wish
from ollama_distributed.placement.shelves import Domain, Place, Shelf, Shelves, domain_of

_DEVICES: tuple[Device, ...] = ("gpu", "cpu")


class Spot:
    """One node and its replicas."""

    def __init__(self, site: Site, domain: Domain, taken: Taken, disk_low_bytes: int) -> None:
        self.site = site
        self.domain = domain
        self.gpu_free = site.gpu_bytes - taken.gpu_bytes
        self.memory_free = site.memory_bytes - taken.memory_bytes
        self.disk_free = site.disk_free_bytes - disk_low_bytes
        """Beside what its replicas lack."""
        self._arriving = taken.arriving
        self._strays = sum(taken.arriving.values())
        """Bytes on their way to it that none of its replicas need."""
        self.replicas: dict[str, tuple[Wish, Replica]] = {}
        self.coming: Counter[str] = Counter()
        """Blobs that it lacks, by how many of its replicas need them."""
        self.stands: list[tuple[Shelf, Place]] = []

    def free(self, device: Device) -> int:
        return self.gpu_free if device == "gpu" else self.memory_free

    def runs(self, wish: Wish, device: Device) -> bool:
        """Whether one more loaded replica fits into what is left."""
        gpu, memory = wish.need.of(device)
        if device == "gpu" and not gpu:
            return False
        return gpu <= self.gpu_free and memory <= self.memory_free

    def disk(self, wish: Wish) -> tuple[int, int]:
        """Bytes that its disk would have to take for a model, and how many it can. What is on its way
        comes in any case: nothing more is brought into its room."""
        here, coming, arriving = self.site.blobs, self.coming, self._arriving
        lacks = more = 0
        for blob in wish.blobs:  # asked of millions of nodes: a generator would take twice as long
            if blob.digest not in here and blob.digest not in coming:
                lacks += blob.size_bytes
                if blob.digest not in arriving:
                    more += blob.size_bytes
        room = max(self.disk_free - self._strays if more else self.disk_free, 0)
        return more or lacks, room

    def take(self, wish: Wish, replica: Replica) -> None:
        self.replicas[wish.model] = (wish, replica)
        self._charge(wish, replica, 1)

    def give_back(self, model: str) -> None:
        wish, replica = self.replicas.pop(model)
        self._charge(wish, replica, -1)

    def _charge(self, wish: Wish, replica: Replica, by: int) -> None:
        if replica.warm:
            gpu, memory = wish.need.of(replica.device)
            self.gpu_free -= by * gpu
            self.memory_free -= by * memory
        here, coming = self.site.blobs, self.coming
        for blob in wish.blobs:
            if blob.digest in here:
                continue
            before = coming[blob.digest]
            coming[blob.digest] = before + by
            if before + by == 0:
                del coming[blob.digest]
                self.disk_free += blob.size_bytes
                self._strays += self._arriving.get(blob.digest, 0)
            elif before == 0:
                self.disk_free -= blob.size_bytes
                self._strays -= self._arriving.get(blob.digest, 0)


class Board:
    """All nodes. Those that may get replicas also stand on shelves."""

    def __init__(self, rules: Rules, labels: Iterable[str] = ()) -> None:
        self._rules = rules
        self.spots: dict[NodeId, Spot] = {}
        self.shelves = Shelves(rules.spread_by, labels)
        self._undo: list[tuple[NodeId, Wish, Replica | None]] | None = None

    def put_site(self, site: Site, taken: Taken) -> None:
        """A node is new or another; its replicas stay on it."""
        old = self.spots.get(site.node)
        if old is not None:
            self._take_down(old)
        domain = domain_of(site, self._rules.spread_by)
        spot = self.spots[site.node] = Spot(site, domain, taken, self._rules.disk_low_bytes)
        if old is not None:
            for wish, replica in old.replicas.values():
                spot.take(wish, replica)
        self._put_up(spot)

    def drop_site(self, node: NodeId) -> None:
        self._take_down(self.spots.pop(node))

    def put(self, wish: Wish, node: NodeId, replica: Replica | None) -> None:
        """Place a replica of `wish.model` on a node, another instead, or none."""
        spot = self.spots[node]
        old = spot.replicas.get(wish.model)
        if self._undo is not None:
            self._undo.append((node, wish, old[1] if old else None))
        self._take_down(spot)
        if old is not None:
            spot.give_back(wish.model)
        if replica is not None:
            spot.take(wish, replica)
        self._put_up(spot)

    def try_out(self) -> None:
        """From here on `undo` takes back every `put`."""
        self._undo = []

    def undo(self) -> None:
        done, self._undo = self._undo or [], None
        for node, wish, before in reversed(done):
            self.put(wish, node, before)

    def relabel(self, labels: Iterable[str]) -> None:
        """Tell nodes apart by other labels."""
        self.shelves = Shelves(self._rules.spread_by, labels)
        for spot in self.spots.values():
            self._put_up(spot)

    def _put_up(self, spot: Spot) -> None:
        spot.stands = []
        if spot.site.presence != "here":
            return
        for device in _DEVICES:
            if device == "gpu" and not spot.site.gpu_bytes:
                continue
            place = Place(len(spot.replicas), spot.free(device), spot.site.node)
            shelf = self.shelves.of(spot.site, device)
            shelf.add(place)
            spot.stands.append((shelf, place))

    def _take_down(self, spot: Spot) -> None:
        for shelf, place in spot.stands:
            shelf.remove(place)
        spot.stands = []
