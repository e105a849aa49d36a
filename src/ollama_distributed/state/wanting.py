"""What an operator may want of a model's places, and what each change makes of the record.

Pure. Part of `state.changes`, which writes what comes out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, assert_never

import msgspec
from msgspec import UNSET, UnsetType

from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Desired

MAX_REPLICAS = 10_000
MAX_PINS = 256
"""A model that is to be everywhere has labels, or a number, not pins."""
MAX_LABELS = 16
MAX_LABEL_CHARACTERS = 255
MAX_DESIRED = 5_000


class SetReplicas(msgspec.Struct, frozen=True, kw_only=True, tag="set_replicas"):
    """How many nodes hold a model, and which may. What is not said stays as it is."""

    model: str
    replicas: int | UnsetType | None = UNSET
    """None: as demand asks for."""
    min: int | UnsetType | None = UNSET
    max: int | UnsetType | None = UNSET
    digest: str | UnsetType = UNSET
    labels: Mapping[str, str] | UnsetType = UNSET
    preload: bool | UnsetType = UNSET
    keep_alive_s: float | UnsetType | None = UNSET
    keep: bool | UnsetType = UNSET
    priority: int | UnsetType = UNSET


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag="pin"):
    """This node is to hold the model in any case."""

    model: str
    node: NodeId


class Unpin(msgspec.Struct, frozen=True, kw_only=True, tag="unpin"):
    """The node holds it only if the number asks for it."""

    model: str
    node: NodeId


class Unplace(msgspec.Struct, frozen=True, kw_only=True, tag="unplace"):
    """Nothing is wanted of the model's places any more; it stays where it is."""

    model: str


Wanting: TypeAlias = SetReplicas | Pin | Unpin | Unplace


def wanted_after(state: ClusterState, change: Wanting) -> Desired | None:
    """The record as the change makes it; None: it goes.

    Raises:
        NotFound: no node holds the model, it has no such pin, or there is no such node.
        Invalid: the numbers contradict each other.
        Conflict: too much is wanted.
    """
    match change:
        case SetReplicas():
            return _numbers(_wanted(state, change.model), change)
        case Pin(model=model, node=node):
            if node not in state.nodes:
                raise NotFound(f"there is no node {node[:80]!r}")
            known = _wanted(state, model)
            pins = tuple(sorted({*known.pins, node}))
            if len(pins) > MAX_PINS:
                raise Invalid(f"a model is pinned to at most {MAX_PINS} nodes; use labels or a number")
            return msgspec.structs.replace(known, pins=pins)
        case Unpin(model=model, node=node):
            known = _known(state, model)
            if node not in known.pins:
                raise NotFound(f"the model is not pinned to {node[:80]!r}")
            return msgspec.structs.replace(known, pins=tuple(pin for pin in known.pins if pin != node))
        case Unplace(model=model):
            _known(state, model)
            return None
        case _:
            assert_never(change)


def _known(state: ClusterState, model: str) -> Desired:
    desired = state.desired.get(model)
    if desired is None:
        raise NotFound(f"nothing is wanted of the places of {model[:200]!r}")
    return desired


def _wanted(state: ClusterState, model: str) -> Desired:
    """What is wanted already, or the beginning of it."""
    desired = state.desired.get(model)
    if desired is not None:
        return desired
    if model not in state.models:
        raise NotFound(f"no node holds {model[:200]!r}; pull it first")
    if len(state.desired) >= MAX_DESIRED:
        raise Conflict(f"places of {MAX_DESIRED} models are given; take one away first (model place --clear)")
    return Desired(model=model)


def _numbers(known: Desired, change: SetReplicas) -> Desired:
    said = {
        field: value
        for field in SetReplicas.__struct_fields__
        if field != "model" and (value := getattr(change, field)) is not UNSET
    }
    after = msgspec.structs.replace(known, **said)
    for number, name in ((after.replicas, "replicas"), (after.min, "min"), (after.max, "max")):
        if number is not None and not 0 <= number <= MAX_REPLICAS:
            raise Invalid(f"{name} is a number from 0 to {MAX_REPLICAS}, not {number}")
    if after.max is not None and after.min is not None and after.max < after.min:
        raise Invalid(f"max ({after.max}) is below min ({after.min})")
    if after.keep_alive_s is not None and not 0 <= after.keep_alive_s < float("inf"):
        raise Invalid("keep_alive_s is a number of seconds, 0 or more")
    if len(after.labels) > MAX_LABELS:
        raise Invalid(f"at most {MAX_LABELS} labels can be asked for")
    for name, value in after.labels.items():
        if not name or len(name) > MAX_LABEL_CHARACTERS or len(value) > MAX_LABEL_CHARACTERS:
            raise Invalid(
                f"a label's name has 1 to {MAX_LABEL_CHARACTERS} characters, its value at most so many"
            )
    return after
