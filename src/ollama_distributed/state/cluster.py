"""The cluster as one node sees it: every replicated record, and what follows from them.

Pure: a fold over keys and values. The state depends on nothing but the keys' present values,
so a node that followed every event and a node that started from a snapshot agree. What this
version cannot read it leaves out (`rejected` says why); what it does not know it ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, assert_never, cast

import msgspec
from msgspec import UNSET, UnsetType

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Policy
from ollama_distributed.state.access import KeyEntry
from ollama_distributed.state.codec import decode
from ollama_distributed.state.holders import Holders, divided, held
from ollama_distributed.state.keys import (
    CONFIG,
    FENCE,
    LEASE,
    VOTERS,
    NodePart,
    OfChange,
    OfDeletion,
    OfKey,
    OfModel,
    OfNode,
    OfPolicy,
    OfVersion,
    Single,
    Subject,
    deleted_by_hash,
    model_hash,
    subject,
)
from ollama_distributed.state.maps import SortedMap
from ollama_distributed.state.naming import unknown_node
from ollama_distributed.state.records import (
    Advert,
    Applied,
    Assigned,
    Config,
    Deleted,
    Desired,
    HeldModel,
    Holdings,
    Intent,
    Lease,
    Member,
    Placed,
    Rest,
    Term,
    Voters,
)

ABSENT = 0
"""The revision of a key that is not there."""

_OfNode: TypeAlias = Advert | Holdings | Member | Intent | Assigned | Placed

_KINDS: Mapping[NodePart, type[_OfNode]] = {
    "advert": Advert,
    "holdings": Holdings,
    "member": Member,
    "intent": Intent,
    "assigned": Assigned,
    "placed": Placed,
}
_SINGLES: Mapping[str, tuple[str, type[Lease] | type[Term] | type[Config] | type[Voters]]] = {
    LEASE: ("lease", Lease),
    FENCE: ("term", Term),
    CONFIG: ("config", Config),
    VOTERS: ("voters", Voters),
}


class NodeState(msgspec.Struct, frozen=True, gc=False):
    """All that is known of a node; a part is None where nothing was written yet."""

    id: NodeId
    advert: Advert | None = None
    holdings: Holdings | None = None
    member: Member | None = None
    intent: Intent | None = None
    assigned: Assigned | None = None
    placed: Placed | None = None

    @property
    def name(self) -> str:
        return self.advert.name if self.advert else self.id

    @property
    def alive(self) -> bool:
        """Not known to be offline: it may be asked."""
        return self.member is None or self.member.status != "offline"

    @property
    def drained(self) -> bool:
        """An operator wants no new work on it."""
        return self.intent is not None and self.intent.drain

    @property
    def rest(self) -> Rest | None:
        """It takes no work by its own policy, and nobody has woken it by hand."""
        rest = self.advert.rest if self.advert is not None else UNSET
        if isinstance(rest, UnsetType) or (self.intent is not None and self.intent.woken == rest.since):
            return None
        return rest

    @property
    def draining(self) -> bool:
        """It is to get no new work."""
        return self.drained or self.rest is not None

    @property
    def status(self) -> NodeStatus:
        """As people see it: a node that lives and is to get no work shows that."""
        status: NodeStatus = self.member.status if self.member else "joining"
        return "draining" if self.draining and status in ("joining", "online") else status

    @property
    def since(self) -> float:
        """When `status` began, seconds since the Unix epoch; 0.0: not known."""
        if self.status == "draining":
            if self.drained and self.intent is not None:
                return self.intent.at
            if (rest := self.rest) is not None:
                return rest.since
        return self.member.since if self.member else (self.advert.started_at if self.advert else 0.0)

    @property
    def labels(self) -> dict[str, str]:
        """Its own, overlaid by the operator's; sorted."""
        labels: dict[str, str | None] = {**(self.advert.labels if self.advert else {})}
        labels |= self.intent.labels if self.intent else {}
        return {name: value for name, value in sorted(labels.items()) if value is not None}

    @property
    def empty(self) -> bool:
        return all(getattr(self, part) is None for part in _KINDS)


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """One moment of the replicated state. Made by `apply`, never in place."""

    nodes: SortedMap[NodeId, NodeState] = msgspec.field(default_factory=SortedMap)
    models: Holders = msgspec.field(default_factory=SortedMap)
    """Who holds a model, and which content; what was deleted is not among them."""
    deleted: SortedMap[str, Deleted] = msgspec.field(default_factory=SortedMap)
    """What was deleted in the whole cluster lately, by canonical name."""
    leftovers: Holders = msgspec.field(default_factory=SortedMap)
    """What was deleted and is still held, by nodes that have not heard of it."""
    desired: SortedMap[str, Desired] = msgspec.field(default_factory=SortedMap)
    """Where operators want models to be, by canonical name."""
    names: SortedMap[str, tuple[NodeId, ...]] = msgspec.field(default_factory=SortedMap)
    """Who is called so; ids sorted."""
    servers: tuple[NodeId, ...] = ()
    """All nodes with the role `server`, sorted."""
    counts: Mapping[NodeStatus, int] = {}
    """How many nodes there are of each status that is shown."""
    keys: SortedMap[KeyId, KeyEntry] = msgspec.field(default_factory=SortedMap)
    """API keys, also those that were revoked."""
    policies: SortedMap[str, Policy] = msgspec.field(default_factory=SortedMap)
    config: Config = Config()
    history: SortedMap[str, Config] = msgspec.field(default_factory=SortedMap)
    """By version, as `str`; see `version` and `versions`."""
    voters: Voters | None = None
    lease: Lease | None = None
    term: Term | None = None
    applied: SortedMap[str, Applied] = msgspec.field(default_factory=SortedMap)
    """The latest changes by proposal."""
    rejected: SortedMap[str, str] = msgspec.field(default_factory=SortedMap)
    """Keys whose value this version cannot read, and why. They are as good as absent here."""
    timestamp: float = 0.0
    """When this node learned the last of it, seconds since the Unix epoch."""
    revision: int = 0
    """The history up to here is in it."""
    raw: SortedMap[str, tuple[bytes, int]] = msgspec.field(default_factory=SortedMap)
    """Every known key's value and revision, as they are stored."""

    def revision_of(self, key: str) -> int:
        """What a compare-and-set of `key` must name; `ABSENT`: it is not there."""
        stored = self.raw.get(key)
        return stored[1] if stored else ABSENT

    def current(self, model: str) -> HeldModel | None:
        """The version that counts: the newest that a living node holds, or, where none lives, any
        node; the same at every node with this state."""
        held = self.models.get(model)
        if held is None:
            return None

        def rank(node: NodeId) -> tuple[bool, float, str]:
            known = self.nodes.get(node)
            return known is not None and known.alive, held[node].modified_at, held[node].digest

        return held[max(held, key=rank)]

    def holders(self, model: str) -> tuple[NodeId, ...]:
        """Nodes with the version that counts, living ones first, then by id. What lives in nodes' own
        engines has one name and no common digest: all of those are."""
        current = self.current(model)
        held = self.models.get(model)
        if current is None or held is None:
            return ()
        same = [
            node
            for node, one in held.items()
            if (one.digest == current.digest or one.remote) and node in self.nodes
        ]
        return tuple(sorted(same, key=lambda node: not self.nodes[node].alive))

    def version(self, number: int) -> Config | None:
        """A version of the config that is kept."""
        return self.history.get(str(number))

    def versions(self) -> list[Config]:
        """Newest first."""
        return sorted(self.history.values(), key=lambda config: -config.version)

    def resolve(self, node: str) -> NodeId:
        """The id of a node that is given by id, or by a name that only it has.

        Raises:
            NotFound: there is none.
            Conflict: several have this name.
        """
        if node in self.nodes:
            return NodeId(node)
        named = self.names.get(node, ())
        if not named:
            raise NotFound(unknown_node(node, self.names))
        if len(named) > 1:
            raise Conflict(f"{len(named)} nodes are called {node!r}; give an id: {', '.join(named[:8])}")
        return named[0]


_Record: TypeAlias = (
    _OfNode | Desired | Deleted | Config | Voters | Lease | Term | Applied | KeyEntry | Policy
)


def apply(
    state: ClusterState, key: str, value: bytes | None, revision: int, *, at: float = 0.0
) -> ClusterState:
    """The state after `key` was put (or deleted: None) by `revision`, learned at `at`."""
    about = subject(key)
    if about is None:
        return msgspec.structs.replace(state, revision=revision, timestamp=at)
    if value is None:
        if key not in state.raw:
            return msgspec.structs.replace(state, revision=revision, timestamp=at)
        raw = state.raw.without(key)
    elif state.raw.get(key) == (value, revision):
        return msgspec.structs.replace(state, revision=revision, timestamp=at)
    else:
        raw = state.raw.with_(key, (value, revision))
    record: _Record | None = None
    rejected = state.rejected.without(key)
    if value is not None:
        try:
            record = _decoded(about, value)
        except Invalid as exc:
            rejected = rejected.with_(key, exc.message)
    return msgspec.structs.replace(
        state,
        raw=raw,
        rejected=rejected,
        revision=revision,
        timestamp=at,
        **_changed(state, about, record),
    )


def advanced(state: ClusterState, revision: int, *, at: float = 0.0) -> ClusterState:
    """The same state, known to hold at `revision`."""
    return msgspec.structs.replace(state, revision=revision, timestamp=at)


def _decoded(about: Subject, value: bytes) -> _Record:
    """
    Raises:
        Invalid: not readable, or about another node than its key says.
    """
    match about:
        case OfNode(node, part):
            record = decode(value, _KINDS[part])
            if record.node != node:
                raise Invalid(f"it is about another node: {record.node[:80]!r}")
            return record
        case OfModel(digest):
            desired = decode(value, Desired)
            if model_hash(desired.model) != digest:
                raise Invalid(f"it is about another model: {desired.model[:80]!r}")
            return desired
        case OfDeletion(digest):
            deleted = decode(value, Deleted)
            if model_hash(deleted.model) != digest:
                raise Invalid(f"it is about another model: {deleted.model[:80]!r}")
            return deleted
        case OfVersion(version):
            config = decode(value, Config)
            if config.version != version:
                raise Invalid(f"it is about another version: {config.version}")
            return config
        case OfChange():
            return decode(value, Applied)
        case OfKey(id_):
            entry = decode(value, KeyEntry)
            if entry.record.id != id_:
                raise Invalid(f"it is about another key: {entry.record.id[:40]!r}")
            return entry
        case OfPolicy(name):
            policy = decode(value, Policy)
            if policy.name != name:
                raise Invalid(f"it is about another policy: {policy.name[:40]!r}")
            return policy
        case Single(key):
            return decode(value, _SINGLES[key][1])
        case _:
            assert_never(about)


def _changed(state: ClusterState, about: Subject, record: _Record | None) -> dict[str, Any]:
    """The fields of the state that a record changes; None: it is gone."""
    match about:
        case OfNode(node, part):
            before = state.nodes.get(node) or NodeState(node)
            after = msgspec.structs.replace(before, **{part: record})
            return _node_changed(state, before, after)
        case OfModel(digest):
            return {"desired": _wanted(state, digest, cast("Desired | None", record))}
        case OfDeletion():
            return _deletion(state, about, cast("Deleted | None", record))
        case OfVersion(version):
            return {"history": _set(state.history, str(version), cast("Config | None", record))}
        case OfChange(proposal):
            return {"applied": _set(state.applied, proposal, cast("Applied | None", record))}
        case OfKey(id_):
            return {"keys": _set(state.keys, id_, cast("KeyEntry | None", record))}
        case OfPolicy(name):
            return {"policies": _set(state.policies, name, cast("Policy | None", record))}
        case Single(key):
            field, kind = _SINGLES[key]
            return {field: Config() if record is None and kind is Config else record}
        case _:
            assert_never(about)


def _set(records: SortedMap[Any, Any], key: str, record: _Record | None) -> SortedMap[Any, Any]:
    return records.without(key) if record is None else records.with_(key, record)


def _wanted(state: ClusterState, digest: str, record: Desired | None) -> SortedMap[str, Desired]:
    if record is not None:
        return state.desired.with_(record.model, record)
    # The key does not name the model; what is wanted of all models is a short list.
    gone = next((model for model in state.desired if model_hash(model) == digest), None)
    return state.desired if gone is None else state.desired.without(gone)


def _named_before(state: ClusterState, about: OfDeletion) -> str:
    """The key does not name the model; its last value does, if it could be read."""
    stored = state.raw.get(deleted_by_hash(about.hash))
    try:
        before = _decoded(about, stored[0]) if stored else None
    except Invalid:
        before = None
    return before.model if isinstance(before, Deleted) else ""


def _deletion(state: ClusterState, about: OfDeletion, record: Deleted | None) -> dict[str, Any]:
    if record is None:
        name = _named_before(state, about)
        deleted = state.deleted.without(name)
    else:
        name = record.model
        deleted = state.deleted.with_(name, record)
    models, leftovers = divided(state.models, state.leftovers, name, record)
    return {"deleted": deleted, "models": models, "leftovers": leftovers}


def _node_changed(state: ClusterState, before: NodeState, after: NodeState) -> dict[str, Any]:
    """A node, and the views that follow it: each in steps that do not grow with the cluster."""
    node = after.id
    there = not after.empty
    changed: dict[str, Any] = {
        "nodes": state.nodes.with_(node, after) if there else state.nodes.without(node),
        "counts": _counted(
            state.counts, None if before.empty else before.status, after.status if there else None
        ),
    }
    if before.holdings is not after.holdings:
        changed["models"], changed["leftovers"] = held(
            state.models, state.leftovers, state.deleted, node, before.holdings, after.holdings
        )
    if before.advert is not after.advert:
        changed["names"] = _called(state.names, node, before.advert, after.advert)
        changed["servers"] = _served(state.servers, node, after.advert)
    return changed


def _counted(
    counts: Mapping[NodeStatus, int], before: NodeStatus | None, after: NodeStatus | None
) -> Mapping[NodeStatus, int]:
    if before == after:
        return counts
    changed = dict(counts)
    if before is not None:
        changed[before] -= 1
    if after is not None:
        changed[after] = changed.get(after, 0) + 1
    return {status: count for status, count in sorted(changed.items()) if count}


def _called(
    names: SortedMap[str, tuple[NodeId, ...]], node: NodeId, before: Advert | None, after: Advert | None
) -> SortedMap[str, tuple[NodeId, ...]]:
    if before and (not after or after.name != before.name):
        others = tuple(other for other in names[before.name] if other != node)
        names = names.with_(before.name, others) if others else names.without(before.name)
    if after and (not before or after.name != before.name):
        names = names.with_(after.name, tuple(sorted((*names.get(after.name, ()), node))))
    return names


def _served(servers: tuple[NodeId, ...], node: NodeId, advert: Advert | None) -> tuple[NodeId, ...]:
    serves = advert is not None and advert.role == "server"
    if serves == (node in servers):
        return servers
    return tuple(sorted({*servers, node} if serves else {*servers} - {node}))
