"""What a plan comes to: where each model belongs, what to do next, and what cannot be done.

Every move and every refusal carries its reason, for people.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Device, Replica
from ollama_distributed.state.maps import SortedMap


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag="fetch"):
    """Bring a blob to a node."""

    node: NodeId
    model: str
    digest: str
    size_bytes: int
    holders: tuple[NodeId, ...]
    """Nodes that have all of it, a few where there are many."""
    reason: str = ""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    node: NodeId
    model: str
    device: Device
    reason: str = ""


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag="unload"):
    node: NodeId
    model: str
    reason: str = ""


class Delete(msgspec.Struct, frozen=True, kw_only=True, tag="delete"):
    """Take a copy from a node's disk; blobs that another model there needs stay."""

    node: NodeId
    model: str
    reason: str = ""


Move: TypeAlias = Fetch | Load | Unload | Delete


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted and cannot be."""

    model: str
    copies: int = 0
    """So many are missing."""
    warm: int = 0
    reasons: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    assignments: SortedMap[str, tuple[Replica, ...]] = msgspec.field(default_factory=SortedMap)
    """By model; sorted by node."""
    moves: tuple[Move, ...] = ()
    """To begin now; those that are under way are not among them."""
    waiting: int = 0
    """Moves that will follow, once these are done."""
    refusals: tuple[Refusal, ...] = ()


class Because(msgspec.Struct, frozen=True):
    """Why a node has a model's replica, or has none."""

    node: NodeId
    chosen: bool
    reason: str
