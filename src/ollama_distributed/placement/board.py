"""What is left of each node once replicas are put on it.

Pure. Depends only on which sites and replicas are on it, not on the order in which they came.
A trial is taken back by `undo`, so that a plan leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica, Rules, Site, Taken, Wish
from ollama_distributed.placement.shelves import Place, Shelf, Shelves
from ollama_distributed.placement.spread import Domain, domain_of

_DEVICES: tuple[Device, ...] = ("gpu", "cpu")
MANY = 1 << 30
"""Seats of a node that has no limit of them."""


class Spot:
    """One node and its replicas."""

    def __init__(self, site: Site, domain: Domain, disk_low_bytes: int) -> None:
        self.site = site
        self.domain = domain
        self.gpu_free = site.gpu_bytes
        self.memory_free = site.memory_bytes
        self.seats_free = site.seats or MANY
        self.disk_free = site.disk_free_bytes - disk_low_bytes
        """Beside what its replicas lack."""
        self.taken = Taken()
        self._strays = 0
        """Bytes on their way to it that none of its replicas need."""
        self.replicas: dict[str, tuple[Wish, Replica]] = {}
        self.coming: Counter[str] = Counter()
        """Blobs that it lacks, by how many of its replicas need them."""
        self.shelves: list[Shelf] = []
        """Of its kind, one for each device."""
        self.stands: list[tuple[Shelf, Place]] = []

    def free(self, device: Device) -> int:
        return self.gpu_free if device == "gpu" else self.memory_free

    def runs(self, wish: Wish, device: Device) -> bool:
        """Whether one more loaded replica fits into what is left."""
        gpu, memory = wish.need.of(device)
        if (device == "gpu" and not gpu) or self.seats_free <= 0 or wish.model in self.site.no_load:
            return False
        return gpu <= self.gpu_free and memory <= self.memory_free

    def disk(self, wish: Wish) -> tuple[int, int]:
        """Bytes that its disk would have to take for a model, and how many it can. What is on its way
        comes in any case: nothing more is brought into its room."""
        here, coming, arriving = self.site.blobs, self.coming, self.taken.arriving
        lacks = more = 0
        for blob in wish.blobs:  # asked of millions of nodes: a generator would take twice as long
            if blob.digest not in here and blob.digest not in coming:
                lacks += blob.size_bytes
                if blob.digest not in arriving:
                    more += blob.size_bytes
        room = max(self.disk_free - self._strays if more else self.disk_free, 0)
        return more or lacks, room

    def stand_beside(self, taken: Taken) -> None:
        """What is taken of it beside its replicas is another by now."""
        self.gpu_free += self.taken.gpu_bytes - taken.gpu_bytes
        self.memory_free += self.taken.memory_bytes - taken.memory_bytes
        self.seats_free += self.taken.models - taken.models
        self.taken = taken
        self._strays = sum(size for digest, size in taken.arriving.items() if digest not in self.coming)

    def take(self, wish: Wish, replica: Replica) -> None:
        self.replicas[wish.model] = (wish, replica)
        self._charge(wish, replica, 1)

    def give_back(self, model: str) -> None:
        wish, replica = self.replicas.pop(model)
        self._charge(wish, replica, -1)

    def exchange(self, wish: Wish, replica: Replica) -> None:
        """Another replica of a model that it has, with the same files."""
        before, old = self.replicas[wish.model]
        self.replicas[wish.model] = (wish, replica)
        self._charge_memory(before, old, -1)
        self._charge_memory(wish, replica, 1)

    def _charge_memory(self, wish: Wish, replica: Replica, by: int) -> None:
        if replica.warm:
            gpu, memory = wish.need.of(replica.device)
            self.gpu_free -= by * gpu
            self.memory_free -= by * memory
            self.seats_free -= by

    def _charge(self, wish: Wish, replica: Replica, by: int) -> None:
        self._charge_memory(wish, replica, by)
        here, coming = self.site.blobs, self.coming
        for blob in wish.blobs:
            if blob.digest in here:
                continue
            before = coming[blob.digest]
            coming[blob.digest] = before + by
            if before + by == 0:
                del coming[blob.digest]
                self.disk_free += blob.size_bytes
                self._strays += self.taken.arriving.get(blob.digest, 0)
            elif before == 0:
                self.disk_free -= blob.size_bytes
                self._strays -= self.taken.arriving.get(blob.digest, 0)


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
        spot = self.spots[site.node] = Spot(site, domain, self._rules.disk_low_bytes)
        spot.stand_beside(taken)
        if old is not None:
            for wish, replica in old.replicas.values():
                spot.take(wish, replica)
        self._choose_shelves(spot)
        self._put_up(spot)

    def put_taken(self, node: NodeId, taken: Taken) -> None:
        """Nothing of a node is another but, perhaps, what is taken of it."""
        spot = self.spots[node]
        if spot.taken == taken:
            return
        self._take_down(spot)
        spot.stand_beside(taken)
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
        if old is not None and replica is not None and old[0].blobs == wish.blobs:
            spot.exchange(wish, replica)
        else:
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
            self._choose_shelves(spot)
            self._put_up(spot)

    def _choose_shelves(self, spot: Spot) -> None:
        devices = _DEVICES if spot.site.gpu_bytes else _DEVICES[1:]
        taking = spot.site.presence == "here"
        spot.shelves = [self.shelves.of(spot.site, device) for device in devices] if taking else []

    def _put_up(self, spot: Spot) -> None:
        stands = spot.stands = []
        for shelf in spot.shelves:
            place = Place(len(spot.replicas), spot.free(shelf.device), spot.site.node)
            shelf.add(place)
            stands.append((shelf, place))

    def _take_down(self, spot: Spot) -> None:
        for shelf, place in spot.stands:
            shelf.remove(place)
        spot.stands = []
