"""What may stay where it is: the first half of a plan, and why plans move so little.

Pure. `offers` looks at one node, `keep` at one model; neither sees anything else, so one event
asks for few of them anew. What was decided before goes first, then what is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica, Rules, Site, Taken, Wish
from ollama_distributed.placement.spread import Domain, Spread, apart


class Want:
    """A wish with what is asked of it often."""

    __slots__ = ("digests", "order", "pins", "size_bytes", "wish")

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.digests = frozenset(blob.digest for blob in wish.blobs)
        self.size_bytes = sum(blob.size_bytes for blob in wish.blobs)
        self.pins = frozenset(wish.pins)
        need = max(wish.need.memory_bytes, wish.need.gpu_bytes)
        self.order = (-wish.priority, -need, wish.model)
        """The large ones first: the small ones fit into what they leave."""


class Offer(msgspec.Struct, gc=False):
    """What a node has to do with a model, and whether it can go on with it. Never changed once
    `offers` is done with it."""

    node: NodeId
    domain: Domain
    here: bool
    """It may get more."""
    standing: Replica | None
    """As it was decided before."""
    was_warm: bool
    """Then it was to be loaded."""
    pinned: bool
    complete: bool
    """All blobs are on its disk."""
    arriving: bool
    """Some are on their way."""
    loaded: bool
    stale: bool
    """Another version is on its disk, and answers to its name."""
    usable: bool
    """It counts as a copy."""
    device: Device | None = None
    """Where it can stay loaded, or be loaded, beside all that goes first on this node; only of one
    that is loaded, or was to be, or is pinned."""
    settled: bool = False
    """It stands, and nothing is left to do for it."""


def offers(
    site: Site,
    domain: Domain,
    wants: Iterable[Want],
    standing: Mapping[str, Replica],
    rules: Rules,
    taken: Taken,
) -> dict[str, Offer]:
    """What this node has to do with each of `wants`."""
    rows = [(want, _seen(site, domain, want, standing.get(want.wish.model))) for want in wants]
    if site.presence != "away":
        _check_disk(site, rows, rules, taken)
    if site.presence in ("here", "wavering"):
        _give_memory(site, rows, taken)
    made = {}
    for want, row in rows:
        placed = row.standing
        if placed is not None and row.usable and row.complete and row.loaded == placed.warm:
            row.settled = not placed.warm or (row.device == placed.device and not unheld(site, want.wish))
        if row.usable or row.complete or row.stale or row.loaded or placed is not None:
            made[want.wish.model] = row
    return made


_Row = tuple[Want, Offer]


def _seen(site: Site, domain: Domain, want: Want, standing: Replica | None) -> Offer:
    wish, digests = want.wish, want.digests
    complete = digests <= site.blobs
    arriving = not complete and bool(site.arriving) and not digests.isdisjoint(site.arriving)
    pinned = site.node in want.pins
    here = site.presence == "here"
    stale = not complete and wish.model in site.named
    stays = standing is not None or complete or stale or (arriving and digests <= site.blobs | site.arriving)
    usable = (
        (here or site.presence in ("wavering", "away"))
        and (stays or (pinned and here))
        and (complete or pinned or wish.model not in site.no_fetch)
        and (pinned or not wish.labels or _labelled(site, wish))
        and fits_alone(site, wish)
    )
    was_warm = standing is not None and standing.warm
    loaded = wish.model in site.loaded
    return Offer(
        site.node, domain, here, standing, was_warm, pinned, complete, arriving, loaded, stale, usable
    )


def _labelled(site: Site, wish: Wish) -> bool:
    return all(site.labels.get(name) == value for name, value in wish.labels.items())


def unheld(site: Site, wish: Wish) -> bool:
    """Whether it is loaded there as it is to be, but would go by keep-alive."""
    loaded = site.loaded.get(wish.model)
    return wish.hold and loaded is not None and not loaded.held


def fits_alone(site: Site, wish: Wish) -> bool:
    """Whether the node could run it with nothing else in its memory."""
    return wish.need.memory_bytes <= site.memory_bytes or (
        0 < wish.need.gpu_bytes <= site.gpu_bytes and wish.need.host_bytes <= site.memory_bytes
    )


def taken_of(site: Site, wishes: Mapping[str, Want], wanting: Mapping[str, Iterable[str]]) -> Taken:
    """`wishes`: by model; `wanting`: models by blob."""
    gpu = memory = models = 0
    for model, loaded in site.loaded.items():
        if model not in wishes:
            models += 1
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
    return Taken(gpu_bytes=gpu, memory_bytes=memory, models=models, arriving=arriving)


def _check_disk(site: Site, rows: list[_Row], rules: Rules, taken: Taken) -> None:
    """Models whose missing blobs have no room beside those that go first cannot be used. What is
    on its way comes in any case: nothing more is brought into its room."""
    coming = [row for row in rows if row[1].usable and not row[1].complete]
    if not coming:
        return
    free = site.disk_free_bytes - rules.disk_low_bytes
    unspoken = free - sum(taken.arriving.values())
    if sum(want.size_bytes for want, _ in coming) <= unspoken:
        return  # room for all of it, nearly always
    if len(coming) > 1:
        coming.sort(key=lambda row: (not row[1].pinned, row[1].standing is None, row[0].order))
    counted: set[str] = set()
    for want, row in coming:
        lacking = more = 0
        missing = []
        for blob in want.wish.blobs:
            if blob.digest not in site.blobs and blob.digest not in counted:
                missing.append(blob.digest)
                lacking += blob.size_bytes
                if blob.digest not in taken.arriving:
                    more += blob.size_bytes
        if (more > unspoken) if more else (lacking > free):
            row.usable = False
        else:
            free, unspoken = free - lacking, unspoken - more
            counted.update(missing)


def _give_memory(site: Site, rows: list[_Row], taken: Taken) -> None:
    """Which models fit into its memory together, in the order in which they may have it. Whether
    one is to be loaded anywhere is asked only of what is pinned: when thousands of replicas are to
    run, or to run no more, that alone asks no node anew."""
    gpu_free, memory_free = site.gpu_bytes - taken.gpu_bytes, site.memory_bytes - taken.memory_bytes
    seats = site.seats - taken.models if site.seats else len(rows)
    asking = [
        row
        for row in rows
        if row[1].usable and (row[1].was_warm or row[1].loaded or (row[1].here and _goes_first(row)))
    ]
    if len(asking) > 1:
        asking.sort(key=_memory_order)
    for want, row in asking:
        if seats <= 0:
            break
        if not (row.loaded or row.pinned) and want.wish.model in site.no_load:
            continue
        for device in _devices(site, want.wish.model, row.standing):
            gpu, memory = want.wish.need.of(device)
            if (gpu or device == "cpu") and gpu <= gpu_free and memory <= memory_free:
                gpu_free, memory_free, seats = gpu_free - gpu, memory_free - memory, seats - 1
                row.device = device
                break


def _goes_first(row: _Row) -> bool:
    return row[1].pinned and row[0].wish.warm > 0


def _memory_order(row: _Row) -> tuple[bool, bool, bool, tuple[int, int, str]]:
    want, offer = row
    return (not _goes_first(row), not offer.was_warm, not offer.loaded, want.order)


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
    return (offer.standing is None, not offer.complete, not offer.arriving, not offer.stale)


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
    """`count` of them, one after the other where the model has the fewest replicas. `equals`:
    sorted by node."""
    spread = Spread()
    for offer in beside:
        spread.add(offer.domain)
    by_domain: dict[Domain, list[Offer]] = {}
    for offer in equals:
        by_domain.setdefault(offer.domain, []).append(offer)
    return apart(by_domain, count, spread)
