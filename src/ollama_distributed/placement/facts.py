"""What a plan is made from: what is wanted of each model, and what each node is and has.

Pure. Sizes are bytes. A model is a set of blobs that a node holds or does not; models may share
blobs. Time is not here: whoever makes a `Site` judges by the clock (see `presence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.ids import NodeId

Device: TypeAlias = Literal["gpu", "cpu"]

Presence: TypeAlias = Literal["here", "wavering", "away", "leaving", "lost"]
"""What a node counts for:

| presence   | its copies count | runs models | gets more | is a source |
|------------|------------------|-------------|-----------|-------------|
| `here`     | yes              | yes         | yes       | yes         |
| `wavering` | yes              | yes         | no        | yes         |
| `away`     | yes              | no          | no        | no          |
| `leaving`  | no               | until moved | no        | yes         |
| `lost`     | no               | no          | no        | no          |
"""

GRACE_S = 300.0
"""An offline node is expected back so long: a reboot takes minutes, a copy over the network too."""

_PRESENCE: Mapping[NodeStatus, Presence] = {
    "online": "here",
    "joining": "wavering",
    "suspect": "wavering",
    "draining": "leaving",
}


def presence(
    status: NodeStatus, *, offline_for_s: float, draining: bool, grace_s: float = GRACE_S, rests: bool = False
) -> Presence:
    """What a node counts for. One that an operator drains is not waited for; one that `rests` by its
    own policy comes back with what it has: its copies stay, and others run its models meanwhile."""
    if status == "offline":
        return "lost" if draining or offline_for_s >= grace_s else "away"
    if rests and not draining:
        return "away"
    return "leaving" if draining else _PRESENCE[status]


class Blob(msgspec.Struct, frozen=True, gc=False):
    digest: str
    size_bytes: int


class Need(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Memory of one loaded replica."""

    memory_bytes: int
    """All of it, where the processor runs it."""
    gpu_bytes: int = 0
    """Of the GPUs together, where they run all of it; 0: never on a GPU."""
    host_bytes: int = 0
    """Of main memory, while a GPU runs it."""

    def of(self, device: Device) -> tuple[int, int]:
        """Bytes of GPU and of main memory."""
        return (self.gpu_bytes, self.host_bytes) if device == "gpu" else (0, self.memory_bytes)


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of one model."""

    model: str
    """Canonical full name."""
    display: str = ""
    blobs: tuple[Blob, ...]
    need: Need
    copies: int = 1
    """Nodes that are to hold the files."""
    warm: int = 0
    """Of these, nodes that are to have it loaded."""
    hold: bool = False
    """Where it is to be loaded it stays so, whatever keep-alive says."""
    labels: Mapping[str, str] = {}
    """Only nodes with all of these, apart from pins."""
    pins: tuple[NodeId, ...] = ()
    """Nodes that are to hold it in any case, even if these are more than `copies`."""
    keep: bool = True
    """Copies above `copies` stay on disk while there is room."""
    priority: int = 0
    """Higher is placed first where room is short."""

    @property
    def name(self) -> str:
        return self.display or self.model


class Loaded(msgspec.Struct, frozen=True, gc=False):
    """A model in a node's memory."""

    device: Device
    memory_bytes: int
    """Of that device."""
    held: bool = True
    """Because it was placed; else requests loaded it, and keep-alive ends it."""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    node: NodeId
    name: str = ""
    presence: Presence = "here"
    labels: Mapping[str, str] = {}
    memory_bytes: int = 0
    """Main memory for models, those that run included."""
    gpu_bytes: int = 0
    """Memory of all GPUs for models."""
    seats: int = 0
    """Models that may be loaded at once; 0: any number."""
    disk_free_bytes: int = 0
    """For blobs that are not here yet; what is on its way is not taken off."""
    speed: int = 0
    """Class of its measured speed: higher is preferred; 0 is not measured."""
    blobs: frozenset[str] = frozenset()
    """Digests that are complete on its disk."""
    named: frozenset[str] = frozenset()
    """Models of which it has some version, not always the one that is wanted."""
    arriving: frozenset[str] = frozenset()
    """Digests on their way to it."""
    loaded: Mapping[str, Loaded] = {}
    """By model; those that nobody placed among them."""
    loading: frozenset[str] = frozenset()
    """Models that it loads now."""
    no_fetch: frozenset[str] = frozenset()
    no_load: frozenset[str] = frozenset()
    """Models that it could not fetch or load, several times in a row and lately."""

    @property
    def shown(self) -> str:
        return self.name or self.node


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What of a node is taken, whatever is placed on it."""

    gpu_bytes: int = 0
    """By loaded models that nobody placed."""
    memory_bytes: int = 0
    """Main memory, likewise."""
    models: int = 0
    """How many these are."""
    arriving: Mapping[str, int] = {}
    """Bytes of each blob that is on its way to it, of those that are wanted anywhere."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How the cluster places models."""

    spread_by: tuple[str, ...] = ("zone", "rack")
    """Labels of what fails together, the widest first."""
    disk_low_bytes: int = 2 << 30
    """Plans leave so much of a disk free, and surplus copies go where less is free."""
    fetches: int = 256
    """Blobs on their way in the whole cluster."""
    fetches_per_node: int = 2
    loads_per_node: int = 1
    """Loads read the disk at full speed; two at once are slower than one after the other."""
    deletes: int = 64
    """In one plan."""


class Replica(msgspec.Struct, frozen=True, gc=False):
    """A model's place on a node."""

    node: NodeId
    warm: bool = False
    """To be loaded."""
    device: Device = "cpu"
    """Where it runs when it is loaded."""


def size(amount: int) -> str:
    """12.3 GiB; below a tenth of that unit, MiB."""
    gib = amount / (1 << 30)
    return f"{gib:.1f} GiB" if amount >= (1 << 30) // 10 or amount <= 0 else f"{amount / (1 << 20):.1f} MiB"
