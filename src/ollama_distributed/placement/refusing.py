"""Says why a model cannot be where it is wanted, in words that name the figures.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.board import Board, Spot
from ollama_distributed.placement.facts import Presence, Replica, size
from ollama_distributed.placement.filling import Filling
from ollama_distributed.placement.keeping import Want, fits_alone
from ollama_distributed.placement.outcome import Refusal

_ABSENT: Mapping[Presence, str] = {
    "wavering": "it has just joined, or is not heard well",
    "away": "it is offline",
    "leaving": "it drains",
    "lost": "it is offline for long",
}

NO_SOURCE = "no living node has all of its files"


def refusal(want: Want, filling: Filling, board: Board, *, has_source: bool) -> Refusal | None:
    """What is still missing after all was tried, and why; None: nothing."""
    unmet = sorted(want.pins - filling.replicas.keys())
    if not (filling.warm_missing or filling.copies_missing or unmet):
        return None
    reasons = [_pin(want, node, board) for node in unmet]
    if filling.warm_missing or filling.copies_missing:
        if not has_source:
            reasons.append(NO_SOURCE)
        reasons += _nowhere(want, filling, board)
    return Refusal(
        model=want.wish.model,
        copies=filling.copies_missing,
        warm=filling.warm_missing,
        reasons=tuple(reasons),
    )


def _pin(want: Want, node: NodeId, board: Board) -> str:
    spot = board.spots.get(node)
    if spot is None:
        return f"pinned to {node}: there is no such node"
    return f"pinned to {spot.site.shown}: {obstacle(want, spot, None)}"


def _nowhere(want: Want, filling: Filling, board: Board) -> list[str]:
    """Over all nodes, by what stands in the way."""
    wish = want.wish
    matching = [shelf for shelf in board.shelves.matching(wish.labels) if shelf.device == "cpu"]
    nodes = sum(map(len, matching))
    if not nodes:
        labels = ", ".join(f"{name}={value}" for name, value in sorted(wish.labels.items()))
        return [f"no node that takes models has {labels}" if labels else "no node takes models"]
    # Pins may be outside of the labels, so they do not count here.
    if not filling.warm_missing and len(filling.replicas.keys() - want.pins) >= nodes:
        return [
            f"all {nodes} nodes that may have it have it" if nodes > 1 else "there is no other node for it"
        ]
    free, node = max(most for shelf in matching if (most := shelf.most_free()) is not None)
    reasons = []
    if wish.need.memory_bytes > free:
        reasons.append(
            f"does not fit: needs {size(wish.need.memory_bytes)}, "
            f"the most that is free is {size(free)} on {board.spots[node].site.shown}"
        )
    if not reasons:
        who = f"each of the {nodes} nodes" if nodes > 1 else "the only node"
        reasons.append(f"{who} that may have it lacks memory or disk, or has it already")
    return reasons


def obstacle(want: Want, spot: Spot, replica: Replica | None) -> str:
    """Why a node has a model, or what stands in the way of it."""
    wish, site = want.wish, spot.site
    if replica is not None:
        pinned = "pinned here" if site.node in want.pins else "chosen"
        return f"{pinned}, to be loaded" if replica.warm else f"{pinned}, on disk"
    if site.presence in _ABSENT:
        return _ABSENT[site.presence]
    for name, value in sorted(wish.labels.items()):
        if site.labels.get(name) != value and site.node not in want.pins:
            return f"{name}={value} is wanted, it has {site.labels.get(name) or 'none'}"
    need = wish.need.memory_bytes
    if not fits_alone(site, wish):
        return f"does not fit: needs {size(need)}, node has {size(site.memory_bytes)}"
    if wish.model in site.no_fetch:
        return "it could not fetch it lately"
    lacks, room = spot.disk(wish)
    if lacks > room:
        return f"no room on its disk: needs {size(lacks)}, {size(room)} may be filled"
    if wish.warm and wish.model in site.no_load:
        return "it could not load it lately"
    if wish.warm and spot.seats_free <= 0:
        return f"as many models as may be are to be loaded on it: {site.seats}"
    if wish.warm and not (spot.runs(wish, "gpu") or spot.runs(wish, "cpu")):
        return f"does not fit: needs {size(need)}, node has {size(max(spot.memory_free, 0))} free"
    return "others come first"
