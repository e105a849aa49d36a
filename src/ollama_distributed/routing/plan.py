"""Which nodes are asked for an answer, and in which order.

Pure: standings, loads and dice in, an order out, with a reason for each node that was left out, so
that a choice can be replayed. This node comes first when it holds the model, unless a request would
wait here and not elsewhere: no hop is cheaper than none. Of the others the better of two that were
drawn at random: it spreads load nearly as well as knowing everything, and stale figures do not send
all to one node (Mitzenmacher, The Power of Two Choices, 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.errors import (
    DiskFull,
    LoadFailed,
    ModelNotFound,
    NoCapacity,
    OllamaDistributedError,
    Quarantined,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId

MAX_TRIES = 3
"""Nodes asked for one answer: more would make a cluster that is full work only on refusals."""

ELSEWHERE: tuple[type[OllamaDistributedError], ...] = (
    Unavailable,
    QueueFull,
    NoCapacity,
    LoadFailed,
    Quarantined,
    DiskFull,
    ModelNotFound,
)
"""Refusals that are about the node, not the request. `RunnerDied` is not here: the node has
tried again by itself, and a request that kills runners must not go round the cluster."""

Dice = Callable[[int], int]
"""`Random.randrange`: a number from 0 to below the argument."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a node said last of its work on one model, or of all its work."""

    slots: int = 0
    busy: int = 0
    queued: int = 0
    loaded: bool = False
    """The model is in its memory."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A node that holds the model, as the replicated state has it."""

    node: NodeId
    status: NodeStatus
    """`draining` for a living node that is to get no more work."""
    reachable: bool = True
    """It has told an address for forwarded requests."""
    shunned: bool = False
    """Its replica failed lately (`health.py`): others come first."""


class LeftOut(msgspec.Struct, frozen=True):
    node: NodeId
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    order: tuple[NodeId, ...] = ()
    """Whom to ask, one after the other until one takes it; empty: nobody holds the model."""
    left_out: tuple[LeftOut, ...] = ()


_LAST_RESORT: Mapping[NodeStatus, int] = {
    "online": 0,
    "joining": 1,
    "suspect": 2,
    "draining": 4,
    "offline": 5,
}
_SHUNNED = 3
"""Lower is asked earlier. Offline nodes last, but asked: the state may be old, for it is
frozen while consensus is away, and only a try tells."""


def plan(
    holders: Sequence[Standing],
    me: NodeId,
    loads: Mapping[NodeId, Load],
    dice: Dice,
    *,
    full: bool = False,
) -> Plan:
    """Choose up to `MAX_TRIES` nodes. The order of `holders` decides nothing but what the dice mean.
    `full`: a request would wait here, and goes first where it would not."""
    left_out: list[LeftOut] = []
    mine: list[NodeId] = []
    tiers: dict[int, list[NodeId]] = {}
    for standing in holders:
        tier = max(_LAST_RESORT[standing.status], _SHUNNED if standing.shunned else 0)
        if standing.node == me and not standing.shunned and standing.status != "draining":
            mine.append(me)
        elif standing.node != me and not standing.reachable:
            left_out.append(LeftOut(standing.node, "it has no address for forwarded requests"))
        else:
            tiers.setdefault(tier, []).append(standing.node)
    order = mine
    for tier in sorted(tiers):
        order += _drawn(tiers[tier], MAX_TRIES - len(order), loads, dice)
    free = [node for node in order if node in tiers.get(0, ()) and _work(loads.get(node))[0] == 0]
    if mine and full and free:
        order.remove(free[0])
        order.insert(0, free[0])
    left_out += [
        LeftOut(s.node, "it failed lately" if s.shunned else "others come first")
        for s in holders
        if _unused(s, order, left_out)
    ]
    return Plan(order=tuple(order), left_out=tuple(left_out))


def _unused(standing: Standing, order: Sequence[NodeId], left_out: Sequence[LeftOut]) -> bool:
    return standing.node not in order and all(one.node != standing.node for one in left_out)


def _drawn(nodes: list[NodeId], count: int, loads: Mapping[NodeId, Load], dice: Dice) -> list[NodeId]:
    """`count` of them, each the better of two that the dice drew of those that are left."""
    left = list(nodes)
    drawn: list[NodeId] = []
    while left and len(drawn) < count:
        if len(left) == 1:
            drawn += left
            break
        first = dice(len(left))
        second = dice(len(left) - 1)
        second += second >= first
        better = min(left[first], left[second], key=lambda node: _work(loads.get(node)))
        left.remove(better)
        drawn.append(better)
    return drawn


def _work(load: Load | None) -> tuple[int, float]:
    """How long a request would wait there, coarsely: lower is better.

    A free slot of a loaded model, then a node that says nothing or would have to load it,
    then a queue by its length for each slot.
    """
    if load is None or not load.loaded:
        return (1, 0.0 if load is None else float(load.busy + load.queued))
    waiting = (load.busy + load.queued) / max(1, load.slots)
    return (0, waiting) if load.queued == 0 and load.busy < load.slots else (2, waiting)


def most_telling(errors: Sequence[OllamaDistributedError]) -> OllamaDistributedError:
    """Of several refusals the one to show: that a node is away says less than why another
    refused, and that a node does not have the model says least."""

    def weight(error: OllamaDistributedError) -> int:
        return 2 if isinstance(error, ModelNotFound) else int(isinstance(error, Unavailable))

    return min(errors, key=weight)
