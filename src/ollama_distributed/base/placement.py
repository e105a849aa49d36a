"""What the API says of models' places: where one fits, where it is wanted, what a loss would mean.

Shared by the gateway, which writes it, and the SDK, which reads it. Fields are added with
defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType


class FitRow(msgspec.Struct, frozen=True, kw_only=True):
    """How a model would be on one node."""

    node: str
    name: str
    verdict: Literal["fits", "unload", "smaller", "no"]
    """unload: once other models are gone; smaller: with less context or fewer slots."""
    holds: bool = False
    """The files are there."""
    device: Literal["gpu", "cpu"] | None = None
    context_tokens: int = 0
    """Of one slot."""
    slots: int = 0
    memory_bytes: int = 0
    unload: tuple[str, ...] = ()
    tokens_per_s: float | None = None
    """Expected of one stream; None: nothing was measured on that node yet."""
    speed_from: Literal["measured", "estimated"] | None = None
    """estimated: from a model of another size on the same device."""
    fetch_bytes: int = 0
    reason: str = ""


class FitAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/models/{name}/fit`."""

    model: str
    size_bytes: int
    context_tokens: int
    slots: int
    """As asked for."""
    nodes: tuple[FitRow, ...]
    """The best place first."""
    registry: str = ""
    """Where the model was looked at, since no node has it; empty: a node has it."""
    bytes_read: int = 0
    """Of that look."""


class ReplicasAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/models/{name}/replicas`: a number, or limits for what demand asks for."""

    replicas: int | None = None
    min: int | UnsetType | None = UNSET
    """null: as many as models have by default."""
    max: int | UnsetType | None = UNSET


class PlaceAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/models/{name}/place`: what is not said stays as it is."""

    labels: Mapping[str, str] | UnsetType = UNSET
    preload: bool | UnsetType = UNSET
    keep_alive_s: float | UnsetType | None = UNSET
    keep: bool | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    clear: bool = False
    """Nothing is wanted any more; the model stays where it is."""


class PinAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/models/{name}/pin` and `/unpin`."""

    node: str
    """Its id, or a name that only it has."""


Doing: TypeAlias = Literal["", "fetch", "load", "unload", "delete"]
"""What a node does about a model, or has to do next."""


class PlaceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model at one node."""

    node: str
    name: str
    copy: bool = False
    """The plan wants it on this disk."""
    warm: bool = False
    """The plan wants it loaded here."""
    has: bool = False
    """The version that is wanted is here, whole."""
    stale: bool = False
    """Another version is here."""
    loaded: bool = False
    doing: Doing = ""
    note: str = ""
    """Why the plan wants it here or not, what fails and how often."""


class PlacesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is wanted, and where it is."""

    model: str
    wanted: bool
    """False: it stays where it was put."""
    by_default: bool = False
    """Nobody gave an order: it has as many copies as all models."""
    replicas: int | None = None
    min: int = 1
    max: int | None = None
    labels: Mapping[str, str] = {}
    pins: tuple[str, ...] = ()
    """Names of nodes."""
    preload: bool = False
    keep_alive_s: float | None = None
    keep: bool = True
    priority: int = 0
    nodes: tuple[str, ...] = ()
    """That hold it now."""
    copies: int = 0
    """So many nodes are to hold it now, and `loaded` of them in memory."""
    loaded: int = 0
    have: int = 0
    """Living nodes that hold the version that is wanted; `running`: that have it in memory."""
    running: int = 0
    settled: bool = True
    """Nothing is left to do that can be done."""
    missing: tuple[str, ...] = ()
    """Why it cannot be as it is wanted."""
    rows: tuple[PlaceRow, ...] = ()
    """Nodes that have to do with it, and some of the others, by name. Not in lists."""


class PlacesList(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/placement`."""

    models: tuple[PlacesAnswer, ...]


class PlacementFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a node tells of placement to those who watch numbers."""

    tasks: Mapping[tuple[str, str], int] = {}
    """Tasks of this node that ended since its start, by kind and outcome (`done`, `failed`)."""
    waiting: int | None = None
    """Of the leader's plan: moves that wait for others; None: this node does not lead."""
    short: int | None = None
    """Models that cannot be as they are wanted, likewise."""


class WhatIfAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/cluster/what-if`."""

    lose: tuple[str, ...]
    """Ids or names of nodes."""


class MovedRow(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    gone: tuple[str, ...] = ()
    """Nodes that would not have it any more, or have it otherwise (then they are in `new` too)."""
    new: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    """Those of `new` that have its files and would load it."""


class RefusedRow(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    copies: int = 0
    """So many would be missing."""
    loaded: int = 0
    reasons: tuple[str, ...] = ()


class WhatIfAnswer(msgspec.Struct, frozen=True, kw_only=True):
    lost: tuple[str, ...]
    moved: tuple[MovedRow, ...] = ()
    no_longer: tuple[RefusedRow, ...] = ()
    last_copies: tuple[str, ...] = ()
    """Models that no other living node holds."""
    planned: int = 0
    """Models that are to be on some number of nodes, by order or by default; others do not move."""
