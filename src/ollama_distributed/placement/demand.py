"""How many replicas a model is to have, and how many of them loaded: from orders and demand.

Pure. More are loaded when those that are loaded are nearly full, fewer when one less would be half
empty: between the two nothing changes, so a steady load moves nothing. The first replica is loaded
by the request that needs it; the last goes by keep-alive.
"""

from __future__ import annotations

import math

import msgspec

from ollama_distributed.state.records import Desired

FULL = 0.8
"""Of all slots busy or waited for: one more replica before requests queue."""
IDLE = 0.5
"""What is left after one replica goes is to be this empty at least: its work moves to the others."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a model in the whole cluster, smoothed over some seconds by who measures."""

    work: float = 0.0
    """Requests that run or wait."""
    slots: int = 1
    """Of one replica."""
    loaded: int = 0
    """Replicas that are loaded now."""
    idle_s: float = 0.0
    """Since the last request that anybody remembers."""


def wanted(desired: Desired, demand: Demand, *, keep_alive_s: float, nodes: int) -> tuple[int, int]:
    """Copies and loaded replicas. `keep_alive_s`: of the nodes, below 0 for ever; `nodes`: how many
    there are."""
    fixed = desired.replicas is not None
    least = desired.replicas if desired.replicas is not None else desired.min or 0
    most = least if fixed else min(nodes, nodes if desired.max is None else desired.max)
    keep_s = keep_alive_s if desired.keep_alive_s is None else desired.keep_alive_s
    over = 0 <= keep_s <= demand.idle_s
    warm = min(_busy(demand), max(most, 0)) if demand.loaded and not over else 0
    if desired.preload:
        warm = max(warm, least)
    return max(least, warm), warm


def _busy(demand: Demand) -> int:
    """Loaded replicas for the work, without an eye to limits; one at least, for the next request."""
    slots = max(demand.slots, 1)
    count = max(demand.loaded, 1, math.ceil(demand.work / (slots * FULL)))
    while count > 1 and demand.work <= slots * (count - 1) * IDLE:
        count -= 1
    return count
