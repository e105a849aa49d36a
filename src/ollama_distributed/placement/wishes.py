"""What is wanted of each model: by an operator's order, or by default where nobody ordered.

Pure. By default a model has a few copies, so that it outlives a node and answers where it is
asked; it stays where it was put when spreading is off, but leaves a node that drains, and every
node that has an older version of a name gets the one that counts.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import GRACE_S
from ollama_distributed.placement.seen import Loading
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Desired

SPREADS = 2
"""Copies by default: fewer are no spreading."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all models, from the settings."""

    copies: int = 3
    """Of a model that nobody gave an order for; 0 and 1: it stays where it was put."""
    keep_alive_s: float = 300.0
    """Below 0: for ever."""
    grace_s: float = GRACE_S
    loading: Loading = Loading()


class Around(msgspec.Struct, frozen=True, kw_only=True):
    """What wishes follow from beside orders and holders."""

    policy: Policy
    takers: int = 0
    """Nodes that may get models."""
    draining: frozenset[NodeId] = frozenset()


def around(state: ClusterState, policy: Policy) -> Around:
    takers, draining = 0, []
    for node in state.nodes.values():
        if node.drained:
            draining.append(node.id)
        else:
            takers += node.alive and node.placed is not None
    return Around(policy=policy, takers=takers, draining=frozenset(draining))


def desired_of(state: ClusterState, model: str, what: Around) -> Desired | None:
    """With `min` as it comes to: by default no more copies are wanted than there are nodes.
    None: the model stays where it is."""
    known = state.desired.get(model)
    if known is not None:
        if known.min is not None:
            return known
        least = _spread(what) or 1
        return msgspec.structs.replace(known, min=least if known.max is None else min(least, known.max))
    held = state.models.get(model)
    there = [node for node, one in held.items() if not one.remote] if held else []
    if not held or not there:
        return None
    spread = _spread(what)
    if len({held[node].digest for node in there}) > 1:
        return Desired(model=model, min=max(spread, len(there)), max=None if spread else len(there))
    if spread:
        return Desired(model=model, min=spread)
    if all(node in what.draining for node in there):
        return Desired(model=model, min=1, max=1)
    return None


def _spread(what: Around) -> int:
    """Copies by default; 0: models stay where they are."""
    copies = what.policy.copies
    return max(1, min(copies, what.takers)) if copies >= SPREADS else 0
