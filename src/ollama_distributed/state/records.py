"""What is replicated: one record per key, JSON, fields added with defaults only.

| key                   | record     | written by                                           |
|-----------------------|------------|------------------------------------------------------|
| `nodes.<id>.advert`   | `Advert`   | the node itself, when it starts or changes           |
| `nodes.<id>.models`   | `Holdings` | the node itself, when its models change              |
| `members.<id>`        | `Member`   | the leader, fenced, on a transition only             |
| `intents.<id>`        | `Intent`   | the leader, for an operator                          |
| `models.<hash>`       | `Desired`  | the leader, for an operator: where a model is wanted |
| `deleted.<hash>`      | `Deleted`  | the leader, for whoever deleted a model everywhere   |
| `assign.<id>`         | `Assigned` | the leader, fenced: what a node is to hold and do    |
| `nodes.<id>.placed`   | `Placed`   | the node itself: how far it is with that             |
| `config.current`      | `Config`   | the leader, for an operator                          |
| `config.history.<n>`  | `Config`   | with it: each version once; the last 100 are kept    |
| `cluster.voters`      | `Voters`   | who runs a voting server of the coordination engine  |
| `leader.lease`        | `Lease`    | the leader, renewed                                  |
| `leader.fence`        | `Term`     | a new leader, once: what its writes are fenced by    |
| `changes.<id>`        | `Applied`  | with each change of an operator: it applied, once    |
| `admission.…`         |            | `cluster/identity`                                   |

`gc=False`: records hold no cycles, and 10,000 nodes' worth of them would cost every full
collection some 30 ms on the loop (measured; none now).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.ids import NodeId, NodeRole


class Gpu(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    memory_bytes: int
    driver: str = ""


class Hardware(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    cpus: int = 0
    """Physical cores that the node may use."""
    cpu_model: str = ""
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    system: str = ""
    """`Linux x86_64`, ..."""


class EngineSummary(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    variant: str
    version: str
    instruction_set: str = ""
    devices: tuple[str, ...] = ()


class Rest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node leaves its machine to the owner, and takes no work."""

    reason: str
    since: float
    """Seconds since the Unix epoch, by the node's clock: a number for this rest."""


class Advert(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node says of itself."""

    node: NodeId
    name: str
    """That people see; not unique."""
    role: NodeRole
    version: str
    boot: str
    """Random, of this start of the program: a restart is another life."""
    started_at: float
    hop: tuple[str, ...] = ()
    """`host:port` of its cluster listener (mutual TLS), best first."""
    nats: tuple[str, ...] = ()
    """`host:port` of its coordination server for clients, if it runs one."""
    routes: tuple[str, ...] = ()
    """`host:port` of its coordination server for other servers."""
    api: tuple[str, ...] = ()
    """URLs of its API."""
    hardware: Hardware = Hardware()
    engines: tuple[EngineSummary, ...] = ()
    labels: Mapping[str, str] = {}
    """From its own settings; an operator's labels are in `Intent`."""
    rest: Rest | msgspec.UnsetType = msgspec.UNSET
    """By its own policy (`node.polite`)."""


class HeldModel(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A model on a node's disk, with what lists show of it, and what its memory follows from."""

    name: str
    """Canonical full name."""
    display: str
    digest: str
    size_bytes: int
    modified_at: float
    family: str = ""
    families: tuple[str, ...] = ()
    parameters: int = 0
    quantization: str = ""
    context_tokens: int = 0
    embedding_length: int = 0
    capabilities: tuple[str, ...] = ()
    weights_bytes: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    key_length: int = 0
    value_length: int = 0
    vocabulary: int = 0
    remote: bool = False
    """It lives in an engine of its node's own: it can be neither copied nor deleted here."""


class Holdings(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    node: NodeId
    models: tuple[HeldModel, ...] = ()


class Member(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node as the leader sees it. `draining` is not here: it is an operator's intent."""

    node: NodeId
    status: NodeStatus
    since: float
    """When it became so, seconds since the Unix epoch."""
    reason: str = ""
    boot: str = ""
    """The life of the node that this is about."""


class Intent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an operator wants of a node."""

    node: NodeId
    drain: bool = False
    labels: Mapping[str, str | None] = {}
    """Over the node's own; None takes one away."""
    by: str = ""
    at: float = 0.0
    woken: float | msgspec.UnsetType = msgspec.UNSET
    """`since` of the rest that was ended by hand: the node works in spite of its policy until that
    rest would have ended anyway."""


class Desired(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where an operator wants a model to be."""

    model: str
    """Canonical full name."""
    digest: str = ""
    """Of the manifest; empty: the newest that any node holds."""
    replicas: int | None = None
    """Nodes that hold it; None: as many as demand asks for, from `min` to `max`."""
    min: int | None = None
    """None: as many as models have that nobody gave an order for."""
    max: int | None = None
    """None: as many as there are nodes."""
    labels: Mapping[str, str] = {}
    """Only nodes that have all of these, apart from pins."""
    pins: tuple[NodeId, ...] = ()
    """Nodes that hold it in any case; sorted."""
    preload: bool = False
    """Loaded on as many nodes as are wanted though nobody asks for it."""
    keep_alive_s: float | None = None
    """Loaded so long after the last request; None: the nodes' own setting."""
    keep: bool = True
    """Copies beyond what is wanted stay while disks have room."""
    priority: int = 0
    """Higher is placed first where room is short."""
    by: str = ""
    at: float = 0.0


class Deleted(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A model that was deleted in the whole cluster: what was made up to `until` is gone, or goes as
    soon as its node hears of it. What was made later is another model of the same name."""

    model: str
    """Canonical full name."""
    until: float
    """As `HeldModel.modified_at`, and never before that of any that was known."""
    by: str = ""
    at: float = 0.0


class AssignedModel(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A model that a node is to hold."""

    model: str
    warm: bool = False
    """Loaded, not only on disk."""
    device: Literal["gpu", "cpu"] = "cpu"


class Task(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Something that a node is to do now. Doing it twice is as doing it once."""

    kind: Literal["fetch", "load", "unload", "delete"]
    model: str
    digest: str = ""
    """Of what is to be fetched."""
    size_bytes: int = 0
    holders: tuple[NodeId, ...] = ()
    """Nodes that have it."""
    device: Literal["gpu", "cpu"] = "cpu"
    reason: str = ""


class Assigned(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the leader decided for a node."""

    node: NodeId
    epoch: int
    """The leader's: a node never goes back to an older one."""
    models: tuple[AssignedModel, ...] = ()
    """Sorted by model."""
    tasks: tuple[Task, ...] = ()


class LoadedPlace(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    model: str
    device: Literal["gpu", "cpu"] = "cpu"
    memory_bytes: int = 0
    held: bool = False
    """Because it was assigned; else requests loaded it, and keep-alive ends it."""


class MeasuredSpeed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node measured with some model: one answer alone."""

    device: Literal["gpu", "cpu"] = "cpu"
    weights_bytes: int
    tokens_per_s: float


class FailedTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    kind: Literal["fetch", "load", "unload", "delete"]
    model: str
    reason: str
    at: float = 0.0
    tries: int = 1
    """So often in a row."""


class Placed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node has for models and is doing about them, as placing needs it."""

    node: NodeId
    memory_bytes: int = 0
    """Main memory for models, those that run included."""
    gpu_bytes: int = 0
    seats: int = 0
    """Models that may be loaded at once; 0: any number."""
    disk_free_bytes: int = 0
    speeds: tuple[MeasuredSpeed, ...] = ()
    loaded: tuple[LoadedPlace, ...] = ()
    fetching: tuple[str, ...] = ()
    """On their way to it, as `placement.seen.files` names them."""
    loading: tuple[str, ...] = ()
    failed: tuple[FailedTask, ...] = ()
    """The latest failure of each model."""


class Config(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One version of the settings that hold in the whole cluster."""

    version: int = 0
    values: Mapping[str, Any] = {}
    by: str = ""
    at: float = 0.0
    comment: str = ""


class Voters(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Who runs a voting server. One: standalone."""

    nodes: tuple[NodeId, ...]
    at: float = 0.0


class Lease(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Who leads. Its holder renews it; a candidate that sees no renewal for long enough by its
    own clock takes it by compare-and-set. The times are for people."""

    node: NodeId
    epoch: int
    renewals: int = 0
    since: float = 0.0


class Term(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Written once per epoch; its revision is the leader's fence."""

    node: NodeId
    epoch: int


class Applied(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An operator's change that was made. Its key is created in the same batch as the change,
    so a proposal that is repeated finds it and is not made twice. The latest are kept."""

    kind: str
    """The change's tag."""
    by: str = ""
    at: float = 0.0
