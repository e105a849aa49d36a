"""What may stay where it is: the first half of a plan, and why plans move so little.

Pure. `offers` looks at one node, `keep` at one model; neither sees anything else, so one event
asks for few of them anew. What was decided before goes first, then what is there already.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica, Rules, Site, Taken, Wish
from ollama_distributed.placement.shelves import Domain, Spread, domain_of


class Want:
    """A wish with what is asked of it often."""

    __slots__ = ("digests", "order", "pins", "wish")

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.digests = frozenset(blob.digest for blob in wish.blobs)
        self.pins = frozenset(wish.pins)
        need = max(wish.need.memory_bytes, wish.need.gpu_bytes)
        self.order = (-wish.priority, -need, wish.model)
        """The large ones first: the small ones fit into what they leave."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node has to do with a model, and whether it can go on with it."""

    node: NodeId
    domain: Domain = ()
    usable: bool = False
    """It counts as a copy."""
    here: bool = False
    """It may get more."""
    pinned: bool = False
    standing: Replica | None = None
    """As it was decided before."""
    complete: bool = False
    """All blobs are on its disk."""
    arriving: bool = False
    """Some are on their way."""
    loaded: bool = False
    device: Device | None = None
    """Where it can stay loaded, or be loaded, beside all that goes first on this node."""

    settled: bool = False
    """It stands, and nothing is left to do for it."""

    @property
    def was_warm(self) -> bool:
        return self.standing is not None and self.standing.warm


class _Row(msgspec.Struct, gc=False):
    """One model at one node, while it is looked at."""

    want: Want
    standing: Replica | None
    pinned: bool
    complete: bool
    arriving: bool
    loaded: bool
    usable: bool
    device: Device | None = None

    @property
    def was_warm(self) -> bool:
        return self.standing is not None and self.standing.warm

    @property
    def settled(self) -> bool:
        standing = self.standing
        if standing is None or not (self.usable and self.complete) or self.loaded != standing.warm:
            return False
        return not standing.warm or self.device == standing.device


def offers(
    site: Site, wants: Iterable[Want], standing: Mapping[str, Replica], rules: Rules, taken: Taken
) -> dict[str, Offer]:
    """What this node has to do with each of `wants`."""
    domain = domain_of(site, rules.spread_by)
    here = site.presence == "here"
    rows = [_seen(site, want, standing.get(want.wish.model)) for want in wants]
    if site.presence != "away":
        _check_disk(site, rows, rules, taken)
    if here or site.presence == "wavering":
        _give_memory(site, rows, taken)
    return {
        row.want.wish.model: Offer(
            node=site.node,
            domain=domain,
            usable=row.usable,
            here=here,
            pinned=row.pinned,
            standing=row.standing,
            complete=row.complete,
            arriving=row.arriving,
            loaded=row.loaded,
            device=row.device,
            settled=row.settled,
        )
        for row in rows
        if row.usable or row.complete or row.loaded or row.standing is not None
    }


def _seen(site: Site, want: Want, standing: Replica | None) -> _Row:
    wish = want.wish
    complete = want.digests <= site.blobs
    arriving = not complete and bool(site.arriving) and not want.digests.isdisjoint(site.arriving)
    pinned = site.node in want.pins
    stays = standing is not None or complete or (arriving and want.digests <= site.blobs | site.arriving)
    usable = (
        site.presence in ("here", "wavering", "away")
        and (stays or (pinned and site.presence == "here"))
        and (pinned or not wish.labels or _labelled(site, wish))
        and fits_alone(site, wish)
    )
    return _Row(want, standing, pinned, complete, arriving, wish.model in site.loaded, usable)


def _labelled(site: Site, wish: Wish) -> bool:
    return all(site.labels.get(name) == value for name, value in wish.labels.items())


def fits_alone(site: Site, wish: Wish) -> bool:
    """Whether the node could run it with nothing else in its memory."""
    return wish.need.memory_bytes <= site.memory_bytes or (
        0 < wish.need.gpu_bytes <= site.gpu_bytes and wish.need.host_bytes <= site.memory_bytes
    )


def taken_of(site: Site, wishes: Mapping[str, Want], wanting: Mapping[str, Iterable[str]]) -> Taken:
    """`wishes`: by model; `wanting`: models by blob."""
    gpu = memory = 0
    for model, loaded in site.loaded.items():
        if model not in wishes:
            if loaded.device == "gpu":
                gpu += loaded.memory_bytes
            else:
                memory += loaded.memory_bytes
    arriving = {}
    for digest in site.arriving - site.blobs:
        sizes = [
            blob.size_bytes
            for model in wanting.get(digest, ())
            for blob in wishes[model].wish.blobs
            if blob.digest == digest
        ]
        if sizes:
            arriving[digest] = max(sizes)
    return Taken(gpu_bytes=gpu, memory_bytes=memory, arriving=arriving)


def _check_disk(site: Site, rows: list[_Row], rules: Rules, taken: Taken) -> None:
    """Models whose missing blobs have no room beside those that go first cannot be used. What is
    on its way comes in any case: nothing more is brought into its room."""
    coming = [row for row in rows if row.usable and not row.complete]
    coming.sort(key=lambda row: (not row.pinned, row.standing is None, row.want.order))
    free = site.disk_free_bytes - rules.disk_low_bytes
    unspoken = free - sum(taken.arriving.values())
    counted: set[str] = set()
    for row in coming:
        missing = [b for b in row.want.wish.blobs if b.digest not in site.blobs and b.digest not in counted]
        lacking = sum(blob.size_bytes for blob in missing)
        more = sum(blob.size_bytes for blob in missing if blob.digest not in taken.arriving)
        if (more > unspoken) if more else (lacking > free):
            row.usable = False
        else:
            free, unspoken = free - lacking, unspoken - more
            counted.update(blob.digest for blob in missing)


def _give_memory(site: Site, rows: list[_Row], taken: Taken) -> None:
    """Which models fit into its memory together, in the order in which they may have it."""
    gpu_free, memory_free = site.gpu_bytes - taken.gpu_bytes, site.memory_bytes - taken.memory_bytes
    asking = [
        row
        for row in rows
        if row.usable
        and row.want.wish.warm
        and (row.was_warm or row.loaded or (row.pinned and site.presence == "here"))
    ]
    asking.sort(key=lambda row: (not row.pinned, not row.was_warm, not row.loaded, row.want.order))
    for row in asking:
        for device in _devices(site, row.want.wish.model, row.standing):
            gpu, memory = row.want.wish.need.of(device)
            if (gpu or device == "cpu") and gpu <= gpu_free and memory <= memory_free:
                gpu_free, memory_free = gpu_free - gpu, memory_free - memory
                row.device = device
                break


def _devices(site: Site, model: str, standing: Replica | None) -> tuple[Device, ...]:
    """Where it is, or was to be, goes first: a change of device is a reload."""
    if standing is not None and standing.warm:
        first = standing.device
    else:
        first = site.loaded[model].device if model in site.loaded else "gpu"
    return ("gpu", "cpu") if first == "gpu" else ("cpu", "gpu")


class Kept(msgspec.Struct, frozen=True):
    """What of a model may stay."""

    replicas: dict[NodeId, Replica]
    enough: bool
    """As much as is wanted."""
    settled: bool = False
    """All of it is where it belongs already, and nothing of it anywhere else."""


def keep(want: Want, offered: Mapping[NodeId, Offer]) -> Kept:
    """The replicas that stay, at most as many as are wanted, and all that are pinned."""
    if (same := _unchanged(want, offered)) is not None:
        return same
    wish = want.wish
    usable = [offer for offer in offered.values() if offer.usable]
    can_run = [offer for offer in usable if offer.device is not None] if wish.warm else []
    warm = _choose(can_run, wish.warm, _warm_grade, [])
    running = {offer.node for offer in warm}
    pinned = [offer for offer in usable if offer.pinned and offer.node not in running]
    rest = [offer for offer in usable if not offer.pinned and offer.node not in running]
    count = wish.copies - len(warm) - len(pinned)
    cold = _choose(rest, count, _cold_grade, [*warm, *pinned])
    kept = {offer.node: Replica(offer.node, True, offer.device or "cpu") for offer in warm}
    kept |= {offer.node: Replica(offer.node) for offer in (*pinned, *cold)}
    return Kept(kept, len(warm) >= wish.warm and len(kept) >= wish.copies and want.pins <= kept.keys())


def _unchanged(want: Want, offered: Mapping[NodeId, Offer]) -> Kept | None:
    """What stands, if it is just what is wanted and all of it can stay: so it is with nearly all
    models at nearly all times, and sorting thousands of offers would show the same."""
    if want.pins:
        return None
    kept: dict[NodeId, Replica] = {}
    warm = 0
    settled = True
    for node, offer in offered.items():
        standing = offer.standing
        if not offer.settled:
            settled = False
            if standing is not None and (
                not offer.usable or (standing.warm and offer.device != standing.device)
            ):
                return None
        if standing is not None:
            warm += standing.warm
            kept[node] = standing
    if warm != want.wish.warm or len(kept) != want.wish.copies:
        return None
    return Kept(kept, True, settled)


def _warm_grade(offer: Offer) -> tuple[bool, ...]:
    return (not offer.pinned, not offer.was_warm, offer.standing is None, not offer.loaded)


def _cold_grade(offer: Offer) -> tuple[bool, ...]:
    return (offer.standing is None, not offer.complete, not offer.arriving)


def _choose(
    offered: list[Offer], count: int, grade: Callable[[Offer], tuple[bool, ...]], beside: list[Offer]
) -> list[Offer]:
    """The best `count`; among equals, those that share failure domains with the fewest. `beside`
    were chosen before."""
    by_grade: dict[tuple[bool, ...], list[Offer]] = {}
    for offer in offered:
        by_grade.setdefault(grade(offer), []).append(offer)
    chosen: list[Offer] = []
    for best in sorted(by_grade):
        equals, room = by_grade[best], count - len(chosen)
        if len(equals) <= room:
            chosen += equals
        else:
            # Only here the order matters; most often there are thousands before and one after.
            equals.sort(key=lambda offer: offer.node)
            chosen += _apart(equals, room, [*beside, *chosen])
            break
    return chosen


def _apart(equals: list[Offer], count: int, beside: list[Offer]) -> list[Offer]:
    """`count` of them, one after the other where the model has the fewest replicas."""
    spread = Spread()
    for offer in beside:
        spread.add(offer.domain)
    by_domain: dict[Domain, list[Offer]] = {}
    for offer in reversed(equals):
        by_domain.setdefault(offer.domain, []).append(offer)
    order = [(spread.crowding(domain), domain) for domain in by_domain]
    heapq.heapify(order)
    chosen: list[Offer] = []
    while len(chosen) < count and order:
        crowding, domain = order[0]
        if (now := spread.crowding(domain)) > crowding:
            heapq.heapreplace(order, (now, domain))  # a wider domain got one since
            continue
        spread.add(domain)
        chosen.append(by_domain[domain].pop())
        if not by_domain[domain]:
            heapq.heappop(order)
    return chosen
