"""From where things are to where they belong: which moves, in which order, how many at once.

Pure. A replacement runs before what it replaces goes, unless memory does not allow it. Copies
are deleted only while all that are wanted are complete elsewhere: the last one never goes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Blob, Device, Replica, Rules, Site
from ollama_distributed.placement.keeping import Offer, Want
from ollama_distributed.placement.outcome import Delete, Fetch, Load, Move, Unload

MAX_HOLDERS = 8
"""Nodes that a fetch names: enough to share the work, few enough for a small record."""

_Order: TypeAlias = tuple[int, tuple[int, int, str], NodeId, str]


class Pending(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A move that is to be made some time."""

    kind: Literal["fetch", "load", "unload", "delete"]
    order: _Order
    """Lower goes first."""
    node: NodeId
    want: Want
    blob: Blob | None = None
    device: Device = "cpu"
    covered: bool = True
    """Of an unload: what is wanted runs elsewhere."""
    reason: str = ""


def pending(
    want: Want,
    assigned: Mapping[NodeId, Replica],
    offered: Mapping[NodeId, Offer],
    sites: Mapping[NodeId, Site],
) -> list[Pending]:
    """All that separates one model from where it belongs; what is under way is not in it."""
    there = [node for node in assigned if sites[node].presence in ("here", "wavering")]
    complete = {node for node in there if (offer := offered.get(node)) and offer.complete}
    running = sum(assigned[node].warm and want.wish.model in sites[node].loaded for node in there)
    safe = len(complete) >= max(1, want.wish.copies)
    moves: list[Pending] = []
    for node in there:
        moves += _toward(want, assigned[node], sites[node], len(complete), node in complete)
    for node, offer in offered.items():
        replica = assigned.get(node)
        if offer.loaded and not (replica is not None and replica.warm):
            if sites[node].presence not in ("away", "lost"):
                moves.append(_unload(want, sites[node], covered=running >= want.wish.warm))
        elif safe and offer.complete and replica is None and sites[node].presence in ("here", "wavering"):
            moves.append(_delete(want, sites[node]))
    return moves


def _toward(want: Want, replica: Replica, site: Site, copies: int, complete: bool) -> Iterator[Pending]:
    wish, node = want.wish, site.node
    if complete:
        if replica.warm and wish.model not in site.loaded and wish.model not in site.loading:
            yield Pending(
                kind="load",
                order=(0, want.order, node, ""),
                node=node,
                want=want,
                device=replica.device,
                reason=f"{wish.name} is to run on {_count(wish.warm, 'node')}, {site.shown} among them",
            )
        return
    why = f"{site.shown} is pinned" if node in want.pins else f"{copies} of {wish.copies} copies are there"
    for blob in wish.blobs:
        if blob.digest not in site.blobs and blob.digest not in site.arriving:
            yield Pending(
                kind="fetch",
                order=(min(copies, 2), want.order, node, blob.digest),
                node=node,
                want=want,
                blob=blob,
                reason=f"{wish.name}: {why}",
            )


def _unload(want: Want, site: Site, *, covered: bool) -> Pending:
    wish = want.wish
    if site.presence == "leaving":
        reason = f"{site.shown} drains, and {wish.name} runs elsewhere"
    else:
        reason = f"{wish.name} is to run on {_count(wish.warm, 'node')}, {site.shown} not among them"
    return Pending(
        kind="unload",
        order=(0, want.order, site.node, ""),
        node=site.node,
        want=want,
        covered=covered,
        reason=reason,
    )


def _delete(want: Want, site: Site) -> Pending:
    wish = want.wish
    return Pending(
        kind="delete",
        order=(0, want.order, site.node, ""),
        node=site.node,
        want=want,
        reason=f"{wish.name} has its {_count(wish.copies, 'copy', 'copies')} elsewhere",
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def begin(
    moves: list[Pending],
    rules: Rules,
    sites: Mapping[NodeId, Site],
    free_now: Callable[[NodeId], tuple[int, int]],
    holders: Callable[[str], list[NodeId]],
    fetching: int,
) -> tuple[tuple[Move, ...], int]:
    """Which of them begin now, and how many wait for others. `free_now`: GPU and main memory
    that no model has at this moment; `holders`: live nodes that have a blob, sorted;
    `fetching`: blobs on their way now."""
    by_kind: dict[str, list[Pending]] = {"unload": [], "load": [], "fetch": [], "delete": []}
    for move in sorted(moves, key=lambda move: move.order):
        by_kind[move.kind].append(move)
    loads, pressed = _loads(by_kind["load"], rules, sites, free_now)
    unloads: list[Move] = [
        Unload(node=move.node, model=move.want.wish.model, reason=move.reason)
        for move in by_kind["unload"]
        if move.covered or move.node in pressed
    ]
    fetches, queued = _fetches(by_kind["fetch"], rules, sites, holders, fetching)
    deletes = [move for move in by_kind["delete"] if _must_go(move, rules, sites)]
    gone: list[Move] = [
        Delete(node=move.node, model=move.want.wish.model, reason=move.reason)
        for move in deletes[: rules.deletes]
    ]
    waiting = len(by_kind["load"]) - len(loads) + queued + len(deletes) - len(gone)
    return (*unloads, *loads, *fetches, *gone), waiting


def _loads(
    moves: list[Pending],
    rules: Rules,
    sites: Mapping[NodeId, Site],
    free_now: Callable[[NodeId], tuple[int, int]],
) -> tuple[list[Move], set[NodeId]]:
    """The loads that begin, and the nodes where one waits for memory."""
    begun: list[Move] = []
    pressed: set[NodeId] = set()
    busy: dict[NodeId, tuple[int, int, int]] = {}
    for move in moves:
        node = move.node
        running, gpu_free, memory_free = busy.get(node) or (len(sites[node].loading), *free_now(node))
        gpu, memory = move.want.wish.need.of(move.device)
        if gpu > gpu_free or memory > memory_free:
            pressed.add(node)
        elif running < rules.loads_per_node:
            busy[node] = (running + 1, gpu_free - gpu, memory_free - memory)
            begun.append(Load(node=node, model=move.want.wish.model, device=move.device, reason=move.reason))
    return begun, pressed


def _fetches(
    moves: list[Pending],
    rules: Rules,
    sites: Mapping[NodeId, Site],
    holders: Callable[[str], list[NodeId]],
    fetching: int,
) -> tuple[list[Move], int]:
    """The fetches that begin, and how many wait; those that nobody can serve do not."""
    begun: list[Move] = []
    coming: dict[NodeId, set[str]] = {}
    queued = 0
    for move in moves:
        assert move.blob is not None
        node, digest = move.node, move.blob.digest
        mine = coming.setdefault(node, set())
        if digest in mine:
            continue  # another model needs the same blob there
        if (
            len(begun) + fetching >= rules.fetches
            or len(sites[node].arriving) + len(mine) >= rules.fetches_per_node
        ):
            queued += 1
        elif sources := holders(digest):
            mine.add(digest)
            begun.append(
                Fetch(
                    node=node,
                    model=move.want.wish.model,
                    digest=digest,
                    size_bytes=move.blob.size_bytes,
                    holders=_some(sources, node, digest),
                    reason=move.reason,
                )
            )
    return begun, queued


def _some(sources: list[NodeId], node: NodeId, digest: str) -> tuple[NodeId, ...]:
    """A few of many, others for each node: no holder is asked by all."""
    if len(sources) <= MAX_HOLDERS:
        return tuple(sources)
    first = zlib.crc32(f"{node} {digest}".encode()) % len(sources)
    return tuple(sources[(first + i) % len(sources)] for i in range(MAX_HOLDERS))


def _must_go(move: Pending, rules: Rules, sites: Mapping[NodeId, Site]) -> bool:
    return not move.want.wish.keep or sites[move.node].disk_free_bytes < rules.disk_low_bytes
