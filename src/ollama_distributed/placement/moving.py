"""From where things are to where they belong: which moves, in which order, how many at once.

Pure. A replacement runs before what it replaces goes, unless memory does not allow it. Copies
are deleted only while all that are wanted are complete elsewhere: the last one never goes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Blob, Device, Replica, Rules, Site
from ollama_distributed.placement.keeping import Offer, Want, unheld
from ollama_distributed.placement.outcome import Delete, Fetch, Load, Move, Unload

MAX_HOLDERS = 8
"""Nodes that a fetch names: enough to share the work, few enough for a small record."""

_WORKING = ("here", "wavering")

FreeNow = Callable[[NodeId], tuple[int, int, int]]
"""GPU and main memory that no model has at this moment, and how many more may be loaded."""


class Gap:
    """All that separates one model from where it belongs; what is under way is not in it."""

    __slots__ = ("copies", "covered", "deletes", "fetches", "loads", "running", "stale", "unloads", "want")

    def __init__(self, want: Want) -> None:
        self.want = want
        self.copies = 0
        """Complete ones where they belong."""
        self.running = 0
        """Of these, those that run and are to."""
        self.covered = False
        """All that are to run do."""
        self.fetches: list[NodeId] = []
        """They lack blobs that are not on their way either."""
        self.loads: list[tuple[NodeId, Device]] = []
        self.unloads: list[NodeId] = []
        self.deletes: list[NodeId] = []
        """Copies beyond those that are wanted."""
        self.stale: list[NodeId] = []
        """Other versions where none is wanted: they would answer to the name."""

    def __bool__(self) -> bool:
        return bool(self.fetches or self.loads or self.unloads or self.deletes or self.stale)

    @property
    def order(self) -> tuple[int, tuple[int, int, str]]:
        """What is nowhere complete goes first, then what is at one place only."""
        return (min(self.copies, 2), self.want.order)


def gap(
    want: Want,
    assigned: Mapping[NodeId, Replica],
    offered: Mapping[NodeId, Offer],
    sites: Mapping[NodeId, Site],
) -> Gap:
    wish, model = want.wish, want.wish.model
    found = Gap(want)
    for node, replica in assigned.items():
        site = sites[node]
        if site.presence not in _WORKING:
            continue
        offer = offered.get(node)
        if offer is None or not offer.complete:
            if not (site.arriving and want.digests <= site.blobs | site.arriving):
                found.fetches.append(node)
            continue
        found.copies += 1
        if replica.warm:
            found.running += offer.loaded
            if offer.loaded:
                if unheld(site, wish) and model not in site.loading:
                    found.loads.append((node, site.loaded[model].device))
            elif model not in site.loading:
                found.loads.append((node, replica.device))
    found.covered = found.running >= wish.warm
    safe = found.copies >= max(1, wish.copies)
    for node, offer in offered.items():
        placed = assigned.get(node)
        surplus = placed is None and safe and sites[node].presence in _WORKING
        if surplus and offer.stale:
            found.stale.append(node)
        elif offer.loaded:
            if (placed is None or not placed.warm) and sites[node].presence not in ("away", "lost"):
                found.unloads.append(node)
        elif surplus and offer.complete:
            found.deletes.append(node)
    for row in (found.fetches, found.unloads, found.deletes, found.stale):
        row.sort()
    found.loads.sort()
    return found


def begin(
    gaps: Iterable[Gap],
    rules: Rules,
    sites: Mapping[NodeId, Site],
    free_now: FreeNow,
    holders: Callable[[str], list[NodeId]],
    fetching: int,
) -> tuple[tuple[Move, ...], int]:
    """Which moves begin now, and how many replicas have to wait for theirs. `holders`: live nodes
    that have a blob, sorted; `fetching`: blobs on their way now."""
    ordered = sorted(gaps, key=lambda one: one.order)
    loads, pressed = _loads(ordered, rules, sites, free_now)
    unloads: list[Move] = [
        Unload(node=node, model=one.want.wish.model, reason=_why_unload(one, sites[node]))
        for one in ordered
        for node in one.unloads
        if node in pressed or may_go(one, sites[node])
    ]
    going = [
        (one, node)
        for one in ordered
        for node in (*one.stale, *one.deletes)
        if node in one.stale or not one.want.wish.keep or sites[node].disk_free_bytes < rules.disk_low_bytes
    ][: rules.deletes]
    deletes: list[Move] = [
        Delete(node=node, model=one.want.wish.model, reason=_why_delete(one, node)) for one, node in going
    ]
    gone = {(node, digest) for one, node in going for digest in one.want.digests}

    def sources(digest: str) -> list[NodeId]:
        """Who is to delete it now is asked only where all are: another model there needs it."""
        known = holders(digest)
        return [node for node in known if (node, digest) not in gone] or known

    fetches, begun = _fetches(ordered, rules, sites, sources if gone else holders, fetching)
    waiting = sum(len(one.loads) + len(one.fetches) for one in ordered) - len(loads) - begun
    return (*unloads, *loads, *fetches, *deletes), waiting


def may_go(one: Gap, site: Site) -> bool:
    """Once others run it instead: what was placed, and all that is on a node that is to be empty.
    What requests loaded elsewhere is left to keep-alive."""
    if site.presence == "leaving":
        return one.covered or (one.running > 0 and not (one.loads or one.fetches))
    return one.covered and site.loaded[one.want.wish.model].held


def _loads(
    gaps: list[Gap], rules: Rules, sites: Mapping[NodeId, Site], free_now: FreeNow
) -> tuple[list[Move], set[NodeId]]:
    """The loads that begin, and the nodes where one waits for memory."""
    begun: list[Move] = []
    pressed: set[NodeId] = set()
    busy: dict[NodeId, tuple[int, int, int, int]] = {}
    for one in gaps:
        wish, reason = one.want.wish, _why_load(one) if one.loads else ""
        for node, device in one.loads:
            there = len(sites[node].loading)
            running, gpu_free, memory_free, seats = busy.get(node) or (there, *free_now(node))
            gpu, memory, seat = (*wish.need.of(device), 1)
            if wish.model in sites[node].loaded:
                gpu, memory, seat = 0, 0, 0  # it only has to be held
            if gpu > gpu_free or memory > memory_free or seat > seats:
                pressed.add(node)
            elif running < rules.loads_per_node:
                busy[node] = (running + 1, gpu_free - gpu, memory_free - memory, seats - seat)
                begun.append(Load(node=node, model=wish.model, device=device, reason=reason))
    return begun, pressed


def _fetches(
    gaps: list[Gap],
    rules: Rules,
    sites: Mapping[NodeId, Site],
    holders: Callable[[str], list[NodeId]],
    fetching: int,
) -> tuple[list[Move], int]:
    """The fetches that begin, and for how many replicas; those that nobody can serve do not."""
    begun: list[Move] = []
    replicas = 0
    coming: dict[NodeId, set[str]] = {}
    for one in gaps:
        sources = {blob.digest: holders(blob.digest) for blob in one.want.wish.blobs} if one.fetches else {}
        for node in one.fetches:
            if len(begun) + fetching >= rules.fetches:
                return begun, replicas
            site = sites[node]
            mine = coming.setdefault(node, set())
            before = len(begun)
            for blob in lacking(one, site):
                room = min(
                    rules.fetches - len(begun) - fetching,
                    rules.fetches_per_node - len(site.arriving) - len(mine),
                )
                if room <= 0 or blob.digest in mine or not sources[blob.digest]:
                    continue
                mine.add(blob.digest)
                begun.append(
                    Fetch(
                        node=node,
                        model=one.want.wish.model,
                        digest=blob.digest,
                        size_bytes=blob.size_bytes,
                        holders=_some(sources[blob.digest], node, blob.digest),
                        reason=_why_fetch(one, site),
                    )
                )
            replicas += len(begun) > before
    return begun, replicas


def lacking(one: Gap, site: Site) -> list[Blob]:
    """What a node has to fetch for it."""
    return [
        blob
        for blob in one.want.wish.blobs
        if blob.digest not in site.blobs and blob.digest not in site.arriving
    ]


def _some(sources: list[NodeId], node: NodeId, digest: str) -> tuple[NodeId, ...]:
    """A few of many, others for each node: no holder is asked by all."""
    if len(sources) <= MAX_HOLDERS:
        return tuple(sources)
    first = zlib.crc32(f"{node} {digest}".encode()) % len(sources)
    return tuple(sources[(first + i) % len(sources)] for i in range(MAX_HOLDERS))


# ── reasons ─────────────────────────────────────────────────────────────────────────


def _why_load(one: Gap) -> str:
    return f"{one.want.wish.name} is to run on {_count(one.want.wish.warm, 'node')}"


def _why_unload(one: Gap, site: Site) -> str:
    wish = one.want.wish
    if site.presence == "leaving":
        return f"{site.shown} drains, and {wish.name} runs elsewhere"
    return f"{wish.name} is to run on {_count(wish.warm, 'node')}, not on {site.shown}"


def _why_fetch(one: Gap, site: Site) -> str:
    wish = one.want.wish
    if site.node in one.want.pins:
        return f"{wish.name} is pinned to {site.shown}"
    return f"{wish.name} is to be on {_count(wish.copies, 'node')} and is on {one.copies}"


def _why_delete(one: Gap, node: NodeId) -> str:
    wish = one.want.wish
    if node in one.stale:
        return f"an older version of {wish.name}; the new one has its places elsewhere"
    return f"{wish.name} has its {_count(wish.copies, 'copy', 'copies')} elsewhere"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
