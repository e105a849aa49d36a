"""What may stay where it is: the first half of a plan, and why plans move so little.

Pure. `offers` looks at one node, `keep` at one model; neither sees anything else, so one event
asks for few of them anew. What was decided before goes first, then what is there already.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica, Rules, Site, Wish
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


def offers(
    site: Site, wants: Iterable[Want], standing: Mapping[str, Replica], rules: Rules, taken: tuple[int, int]
) -> dict[str, Offer]:
    """What this node has to do with each of `wants`. `taken`: GPU and main memory that models
    have which nobody placed."""
    domain = domain_of(site, rules.spread_by)
    rows = [(want, _seen(site, domain, want, standing.get(want.wish.model))) for want in wants]
    found = {
        want.wish.model: offer
        for want, offer in rows
        if offer.usable or offer.complete or offer.loaded or offer.standing
    }
    coming = [row for row in rows if row[1].usable and not row[1].complete]
    if coming and site.presence != "away":
        for model in _without_disk(site, coming, rules):
            found[model] = msgspec.structs.replace(found[model], usable=False)
    if site.presence in ("here", "wavering"):
        usable = [(want, o) for want, _ in rows if (o := found.get(want.wish.model)) and o.usable]
        for model, device in _runnable(site, usable, taken):
            found[model] = msgspec.structs.replace(found[model], device=device)
        for model, offer in found.items():
            if _is_settled(offer):
                found[model] = msgspec.structs.replace(offer, settled=True)
    return found


def _is_settled(offer: Offer) -> bool:
    standing = offer.standing
    if standing is None or not (offer.usable and offer.complete) or offer.loaded != standing.warm:
        return False
    return not standing.warm or offer.device == standing.device


def _seen(site: Site, domain: Domain, want: Want, standing: Replica | None) -> Offer:
    wish = want.wish
    complete = want.digests <= site.blobs
    arriving = not complete and not want.digests.isdisjoint(site.arriving)
    pinned = site.node in want.pins
    stays = standing is not None or complete or (arriving and want.digests <= site.blobs | site.arriving)
    return Offer(
        node=site.node,
        domain=domain,
        usable=(
            site.presence in ("here", "wavering", "away")
            and (stays or (pinned and site.presence == "here"))
            and (pinned or _labelled(site, wish))
            and fits_alone(site, wish)
        ),
        here=site.presence == "here",
        pinned=pinned,
        standing=standing,
        complete=complete,
        arriving=arriving,
        loaded=wish.model in site.loaded,
    )


def _labelled(site: Site, wish: Wish) -> bool:
    return all(site.labels.get(name) == value for name, value in wish.labels.items())


def fits_alone(site: Site, wish: Wish) -> bool:
    """Whether the node could run it with nothing else in its memory."""
    return wish.need.memory_bytes <= site.memory_bytes or (
        0 < wish.need.gpu_bytes <= site.gpu_bytes and wish.need.host_bytes <= site.memory_bytes
    )


def strangers(site: Site, wishes: Mapping[str, Want]) -> tuple[int, int]:
    """GPU and main memory of models that are loaded there and that nobody placed."""
    gpu = memory = 0
    for model, loaded in site.loaded.items():
        if model not in wishes:
            if loaded.device == "gpu":
                gpu += loaded.memory_bytes
            else:
                memory += loaded.memory_bytes
    return gpu, memory


def _without_disk(site: Site, coming: list[tuple[Want, Offer]], rules: Rules) -> list[str]:
    """Models whose missing blobs have no room beside those that go first."""
    free = site.disk_free_bytes - rules.disk_low_bytes
    taken: set[str] = set()
    left_out: list[str] = []
    first = sorted(coming, key=lambda row: (not row[1].pinned, row[1].standing is None, row[0].order))
    for want, _ in first:
        missing = [b for b in want.wish.blobs if b.digest not in site.blobs and b.digest not in taken]
        lacking = sum(blob.size_bytes for blob in missing)
        if lacking > free:
            left_out.append(want.wish.model)
            continue
        free -= lacking
        taken.update(blob.digest for blob in missing)
    return left_out


def _runnable(
    site: Site, usable: list[tuple[Want, Offer]], taken: tuple[int, int]
) -> Iterator[tuple[str, Device]]:
    """Models that fit into its memory together, in the order in which they may have it."""
    gpu_free, memory_free = site.gpu_bytes - taken[0], site.memory_bytes - taken[1]
    asking = [
        (want, offer)
        for want, offer in usable
        if want.wish.warm and (offer.was_warm or offer.loaded or (offer.pinned and offer.here))
    ]
    asking.sort(key=lambda row: (not row[1].pinned, not row[1].was_warm, not row[1].loaded, row[0].order))
    for want, offer in asking:
        for device in _devices(site, want.wish.model, offer.standing):
            gpu, memory = want.wish.need.of(device)
            if (gpu or device == "cpu") and gpu <= gpu_free and memory <= memory_free:
                gpu_free, memory_free = gpu_free - gpu, memory_free - memory
                yield want.wish.model, device
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
    graded = sorted((grade(offer), offer.node, offer) for offer in offered)
    chosen: list[Offer] = []
    at = 0
    while at < len(graded) and len(chosen) < count:
        end = at
        while end < len(graded) and graded[end][0] == graded[at][0]:
            end += 1
        equals = [offer for _, _, offer in graded[at:end]]
        room = count - len(chosen)
        chosen += equals if len(equals) <= room else _apart(equals, room, [*beside, *chosen])
        at = end
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
    while len(chosen) < count:
        crowding, domain = order[0]
        if (now := spread.crowding(domain)) > crowding:
            heapq.heapreplace(order, (now, domain))  # a wider domain got one since
            continue
        spread.add(domain)
        chosen.append(by_domain[domain].pop())
        if not by_domain[domain]:
            heapq.heappop(order)
    return chosen
