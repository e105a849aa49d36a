"""What an operator may change, and what each change writes.

Pure: a proposal and the state in, writes out, each with the revision that its key must still
stand at. The leader plans on a state that has all of its own writes, one proposal at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, assert_never

import msgspec

from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.labels import check_node_label
from ollama_distributed.state import keys
from ollama_distributed.state.access import (
    AccessChange,
    DeletePolicy,
    MakeKey,
    RevokeKey,
    RotateKey,
    SetPolicy,
    check_unused,
    key_after,
    outdated,
    policy_after,
)
from ollama_distributed.state.cluster import ABSENT, ClusterState, NodeState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.deleting import DeleteModel, deletion, forgotten
from ollama_distributed.state.records import Applied, Config, Intent, Voters
from ollama_distributed.state.wanting import Pin, SetReplicas, Unpin, Unplace, Wanting, wanted_after

KEPT_VERSIONS = 100
"""Of the config, for rollback."""
KEPT_CHANGES = 256
"""A proposal that is repeated is recognised so long; proposers give up after seconds."""
DELETIONS_AT_ONCE = 16
"""What is too old goes with the next changes, a few at a time: a batch stays small."""
MAX_LABELS = 64
VOTER_COUNTS = (1, 3, 5)
"""An even number survives no more failures than the odd one below it."""


class SetConfig(msgspec.Struct, frozen=True, kw_only=True, tag="set_config"):
    """All values of the next version; the change holds only on top of version `base`."""

    values: Mapping[str, Any]
    base: int
    comment: str = ""


class RollbackConfig(msgspec.Struct, frozen=True, kw_only=True, tag="rollback_config"):
    """A new version with the values of an old one, on top of version `base`."""

    version: int
    base: int
    comment: str = ""


class SetDrain(msgspec.Struct, frozen=True, kw_only=True, tag="set_drain"):
    node: NodeId
    drain: bool


class SetLabels(msgspec.Struct, frozen=True, kw_only=True, tag="set_labels"):
    """The named labels only; None takes one away."""

    node: NodeId
    labels: Mapping[str, str | None]


class RemoveNode(msgspec.Struct, frozen=True, kw_only=True, tag="remove_node"):
    """Forget a node. Its key is voided apart from this (`identity.admission`), and before."""

    node: NodeId
    force: bool = False
    """Even while it is alive."""


class SetVoters(msgspec.Struct, frozen=True, kw_only=True, tag="set_voters"):
    """Who runs a voting server from now on; `before` is what that was decided on."""

    nodes: tuple[NodeId, ...]
    before: tuple[NodeId, ...]


Change: TypeAlias = (
    SetConfig
    | RollbackConfig
    | SetDrain
    | SetLabels
    | RemoveNode
    | SetVoters
    | Wanting
    | DeleteModel
    | AccessChange
)


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """A change with an id of its own: it applies once, however often it is sent."""

    id: str
    """Letters and digits."""
    change: Change
    actor: str = ""
    at: float = 0.0
    """When it was made, seconds since the Unix epoch."""


class KeyWrite(msgspec.Struct, frozen=True):
    """Put `key` (None: delete it), which must stand at `revision`."""

    key: str
    value: bytes | None
    revision: int


def plan_change(state: ClusterState, proposal: Proposal) -> tuple[KeyWrite, ...]:
    """What to write, all or nothing. The last write marks the proposal as applied, so that it
    cannot apply again. Call it only for a proposal that is not in `state.applied`.

    Raises:
        NotFound: a node or version that is not there.
        Conflict: the state is not what the change was made for.
        Invalid: the change can never be right.
    """
    mark = Applied(kind=_kind(proposal.change), by=proposal.actor, at=proposal.at)
    return (
        *_writes(state, proposal),
        *_too_old(state),
        KeyWrite(keys.change(proposal.id), encode(mark), ABSENT),
    )


def _kind(change: Change) -> str:
    return str(change.__struct_config__.tag)


def _writes(state: ClusterState, proposal: Proposal) -> tuple[KeyWrite, ...]:
    match proposal.change:
        case SetConfig(values=values, base=base, comment=comment):
            return _new_version(state, proposal, values, base, comment)
        case RollbackConfig(version=version, base=base, comment=comment):
            return _new_version(state, proposal, _old(state, version).values, base, comment)
        case SetDrain(node=node, drain=drain):
            return (_put_intent(state, proposal, _drained(_known(state, node), drain=drain)),)
        case SetLabels(node=node, labels=labels):
            return (_put_intent(state, proposal, _labelled(_known(state, node), labels)),)
        case RemoveNode(node=node, force=force):
            return _removal(state, _known(state, node), force=force)
        case SetVoters(nodes=nodes, before=before):
            return (_voters(state, proposal, nodes, before),)
        case SetReplicas() | Pin() | Unpin() | Unplace() as change:
            return (_desired(state, proposal, change),)
        case DeleteModel(model=model):
            return _deletion(state, proposal, model)
        case MakeKey() | RotateKey() | RevokeKey() | SetPolicy() | DeletePolicy() as change:
            return _access(state, proposal, change)
        case _:
            assert_never(proposal.change)


# ── config ──────────────────────────────────────────────────────────────────────────


def _new_version(
    state: ClusterState, proposal: Proposal, values: Mapping[str, Any], base: int, comment: str
) -> tuple[KeyWrite, ...]:
    if (unreadable := state.rejected.get(keys.CONFIG)) is not None:
        raise Conflict(f"the config was written by a newer version; upgrade the leader first ({unreadable})")
    if state.config.version != base:
        raise Conflict(
            f"the config stands at version {state.config.version}, not at {base}",
            revision=state.config.version,
        )
    config = Config(version=base + 1, values=values, by=proposal.actor, at=proposal.at, comment=comment)
    old = [c.version for c in reversed(state.versions()) if c.version <= config.version - KEPT_VERSIONS]
    return (
        _put(state, keys.CONFIG, config),
        _put(state, keys.version(config.version), config),
        *(_delete(state, keys.version(number)) for number in old[:DELETIONS_AT_ONCE]),
    )


def _old(state: ClusterState, version: int) -> Config:
    config = state.version(version)
    if config is not None:
        return config
    if version == 0:
        return Config()  # before the first version: every node's own settings
    raise NotFound(f"version {version} of the config is not kept")


# ── nodes ───────────────────────────────────────────────────────────────────────────


def _known(state: ClusterState, node: NodeId) -> NodeState:
    known = state.nodes.get(node)
    if known is None:
        raise NotFound(f"there is no node {node[:80]!r}")
    return known


def _intent(node: NodeState) -> Intent:
    return node.intent or Intent(node=node.id)


def _drained(node: NodeState, *, drain: bool) -> Intent:
    """What is said by hand stands above the node's own policy: one that rests is woken."""
    rest = node.rest
    woken = rest.since if rest is not None and not drain else msgspec.UNSET
    return msgspec.structs.replace(_intent(node), drain=drain, woken=woken)


def _put_intent(state: ClusterState, proposal: Proposal, intent: Intent) -> KeyWrite:
    said = msgspec.structs.replace(intent, by=proposal.actor, at=proposal.at)
    return _put(state, keys.intent(intent.node), said)


def _labelled(node: NodeState, labels: Mapping[str, str | None]) -> Intent:
    for name, value in labels.items():
        check_node_label(name, value or "")
    own = node.advert.labels if node.advert else {}
    merged = {**_intent(node).labels, **labels}
    # None must stay where the node itself says otherwise, and only there.
    kept = {name: value for name, value in merged.items() if value is not None or name in own}
    if len(kept) > MAX_LABELS:
        raise Invalid(f"a node has at most {MAX_LABELS} labels")
    return msgspec.structs.replace(_intent(node), labels=kept)


def _removal(state: ClusterState, node: NodeState, *, force: bool) -> tuple[KeyWrite, ...]:
    if state.voters and node.id in state.voters.nodes:
        raise Conflict(
            f"node {node.name} votes. While it lives:  ollama-distributed cluster leave  on that machine; "
            f"if it never comes back, first:  ollama-distributed cluster voter replace {node.name}"
        )
    if node.alive and node.member is not None and not force:
        raise Conflict(f"node {node.name} is {node.status}; stop it first, or remove it by force")
    return tuple(_delete(state, key) for key in keys.of_node(node.id) if key in state.raw)


# ── voters ──────────────────────────────────────────────────────────────────────────


def _voters(
    state: ClusterState, proposal: Proposal, nodes: tuple[NodeId, ...], before: tuple[NodeId, ...]
) -> KeyWrite:
    standing = state.voters.nodes if state.voters else ()
    if sorted(standing) != sorted(before):
        raise Conflict(f"the voters are {', '.join(standing) or 'none'}, not {', '.join(before) or 'none'}")
    if len(set(nodes)) != len(nodes) or len(nodes) not in VOTER_COUNTS:
        raise Invalid(f"there are 1, 3 or 5 voters, not {len(nodes)}")
    for node in nodes:
        advert = _known(state, node).advert
        if advert is None or advert.role != "server":
            raise Invalid(f"node {node} is no server; only servers vote")
    return _put(state, keys.VOTERS, Voters(nodes=tuple(sorted(nodes)), at=proposal.at))


# ── places of models ────────────────────────────────────────────────────────────────


def _desired(state: ClusterState, proposal: Proposal, change: Wanting) -> KeyWrite:
    key = keys.desired(change.model)
    if (unreadable := state.rejected.get(key)) is not None:
        raise Conflict(f"it was written by a newer version; upgrade the leader first ({unreadable})")
    after = wanted_after(state, change)
    if after is None:
        return _delete(state, key)
    return _put(state, key, msgspec.structs.replace(after, by=proposal.actor, at=proposal.at))


def _deletion(state: ClusterState, proposal: Proposal, model: str) -> tuple[KeyWrite, ...]:
    key = keys.deleted(model)
    if (unreadable := state.rejected.get(key)) is not None:
        raise Conflict(f"it was deleted by a newer version; upgrade the leader first ({unreadable})")
    record = deletion(state, model, by=proposal.actor, at=proposal.at)
    old = [keys.deleted(name) for name in forgotten(state, proposal.at)]
    # What is wanted of its places is not wanted of the next model of this name.
    old += [keys.desired(model)] if keys.desired(model) in state.raw else []
    return (_put(state, key, record), *(_delete(state, one) for one in old if one != key))


# ── keys and policies ───────────────────────────────────────────────────────────────


def _access(state: ClusterState, proposal: Proposal, change: AccessChange) -> tuple[KeyWrite, ...]:
    match change:
        case SetPolicy(policy=policy):
            after = policy_after(state.policies, change, by=proposal.actor, at=proposal.at)
            return (_put(state, _readable(state, keys.policy(policy.name)), after),)
        case DeletePolicy(name=name):
            check_unused(state.keys, state.policies, name)
            return (_delete(state, keys.policy(name)),)
        case _:
            entry = key_after(state.keys, state.policies, change, by=proposal.actor, at=proposal.at)
            old = outdated(state.keys, proposal.at)[:DELETIONS_AT_ONCE]
            return (
                _put(state, _readable(state, keys.access_key(entry.record.id)), entry),
                *(_delete(state, keys.access_key(id_)) for id_ in old if id_ != entry.record.id),
            )


def _readable(state: ClusterState, key: str) -> str:
    if (unreadable := state.rejected.get(key)) is not None:
        raise Conflict(f"it was written by a newer version; upgrade the leader first ({unreadable})")
    return key


# ── writes ──────────────────────────────────────────────────────────────────────────


def _put(state: ClusterState, key: str, record: msgspec.Struct) -> KeyWrite:
    return KeyWrite(key, encode(record), state.revision_of(key))


def _delete(state: ClusterState, key: str) -> KeyWrite:
    return KeyWrite(key, None, state.revision_of(key))


def _too_old(state: ClusterState) -> tuple[KeyWrite, ...]:
    marks = sorted((state.revision_of(keys.change(proposal)), proposal) for proposal in state.applied)
    surplus = max(len(marks) + 1 - KEPT_CHANGES, 0)
    return tuple(_delete(state, keys.change(proposal)) for _, proposal in marks[:surplus][:DELETIONS_AT_ONCE])
