"""Keys and policies in the replicated state, and what each change of them writes. Pure; part of
`state.changes`.

| Key                       | Record     | Written by                                            |
|---------------------------|------------|-------------------------------------------------------|
| `access.keys.<id>`        | `KeyEntry` | a server for its own `admin.json`; the leader         |
| `access.policies.<name>`  | `Policy`   | the leader                                            |

A key that was revoked stays for a while, so that people see it and no server enters it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias, assert_never

import msgspec

from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.identity import Role
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Policy

MAX_KEYS = 10_000
MAX_POLICIES = 500
REVOKED_KEPT_S = 30 * 86_400.0
POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}", re.ASCII)
KEY_ID = re.compile(r"[0-9a-z]{8}", re.ASCII)


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the servers keep of a key."""

    id: KeyId
    secret_sha256: str
    """64 hex digits."""
    role: Role
    name: str = ""
    team: str = "default"
    created_at: float = 0.0
    """Seconds since the Unix epoch."""
    expires_at: float | None = None
    """Seconds since the Unix epoch; None: never."""
    policy: str = ""
    """Name of its own policy; empty: that of its role or team, if there is one."""
    created_by: str = ""
    revoked_at: float | None = None
    rotated_at: float | None = None
    old_sha256: str = ""
    """Of the secret before the last rotation, which also proves the key until `old_until`."""
    old_until: float = 0.0


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A key in the state."""

    node: NodeId
    """The server whose `admin.json` it is: it goes when that is removed. Empty: the cluster's own."""
    record: KeyRecord


class MakeKey(msgspec.Struct, frozen=True, kw_only=True, tag="make_key"):
    record: KeyRecord


class RotateKey(msgspec.Struct, frozen=True, kw_only=True, tag="rotate_key"):
    """A new secret; the old one is good for `overlap_s` more."""

    id: KeyId
    secret_sha256: str
    overlap_s: float


class RevokeKey(msgspec.Struct, frozen=True, kw_only=True, tag="revoke_key"):
    id: KeyId


class SetPolicy(msgspec.Struct, frozen=True, kw_only=True, tag="set_policy"):
    """The whole policy as it is from now on."""

    policy: Policy
    new: bool = False
    """It must not be there yet."""
    base: int | None = None
    """The version that it changes; None: whichever."""


class DeletePolicy(msgspec.Struct, frozen=True, kw_only=True, tag="delete_policy"):
    name: str


AccessChange: TypeAlias = MakeKey | RotateKey | RevokeKey | SetPolicy | DeletePolicy


def key_after(
    known: Mapping[KeyId, KeyEntry],
    policies: Mapping[str, Policy],
    change: MakeKey | RotateKey | RevokeKey,
    *,
    by: str,
    at: float,
) -> KeyEntry:
    """The entry as the change makes it.

    Raises:
        NotFound, Conflict, Invalid
    """
    match change:
        case MakeKey(record=record):
            if not KEY_ID.fullmatch(record.id):
                raise Invalid("a key's id is 8 of a-z and 0-9")
            if record.id in known:
                raise Conflict(f"there is a key {record.id} already")
            if len(known) - len(outdated(known, at)) >= MAX_KEYS:
                raise Conflict(f"there are {MAX_KEYS} keys; revoke some first")
            if record.policy and record.policy not in policies:
                raise NotFound(f"there is no policy {record.policy[:40]!r}")
            if record.role in ("local", "node"):
                raise Invalid(f"a key cannot have the role {record.role!r}", param="role")
            return KeyEntry(
                node=NodeId(""), record=msgspec.structs.replace(record, created_by=by, created_at=at)
            )
        case RotateKey(id=id_, secret_sha256=secret, overlap_s=overlap_s):
            entry = _changeable(known, id_)
            old = entry.record
            return _with(
                entry,
                msgspec.structs.replace(
                    old,
                    secret_sha256=secret,
                    rotated_at=at,
                    old_sha256=old.secret_sha256 if overlap_s > 0 else "",
                    old_until=at + overlap_s if overlap_s > 0 else 0.0,
                ),
            )
        case RevokeKey(id=id_):
            entry = _changeable(known, id_)
            return _with(entry, msgspec.structs.replace(entry.record, revoked_at=at, old_sha256=""))
        case _:
            assert_never(change)


def _changeable(known: Mapping[KeyId, KeyEntry], id_: KeyId) -> KeyEntry:
    entry = known.get(id_)
    if entry is None:
        raise NotFound(f"there is no key {id_[:40]!r}")
    if entry.record.revoked_at is not None:
        raise Conflict(f"the key {id_} was revoked already")
    if entry.node:
        raise Conflict(
            f"{id_} is the key in admin.json of node {entry.node}; it goes when that node is removed, "
            "and is made anew where keys.json and admin.json are moved away before a start"
        )
    return entry


def _with(entry: KeyEntry, record: KeyRecord) -> KeyEntry:
    return KeyEntry(node=entry.node, record=record)


def outdated(known: Mapping[KeyId, KeyEntry], now: float) -> list[KeyId]:
    """Keys of the cluster's own that were revoked long ago: their entries may go."""
    return [
        id_
        for id_, entry in known.items()
        if not entry.node
        and entry.record.revoked_at is not None
        and entry.record.revoked_at + REVOKED_KEPT_S < now
    ]


def policy_after(policies: Mapping[str, Policy], change: SetPolicy, *, by: str, at: float) -> Policy:
    """The policy as the change makes it.

    Raises:
        NotFound, Conflict, Invalid
    """
    policy = change.policy
    if not POLICY_NAME.fullmatch(policy.name):
        raise Invalid("a policy's name is 1-40 of a-z, 0-9, _ and -, a letter or digit first", param="name")
    before = policies.get(policy.name)
    if change.new and before is not None:
        raise Conflict(f"there is a policy {policy.name!r} already; change it with: policy set")
    if before is None and not change.new:
        raise NotFound(f"there is no policy {policy.name!r}")
    if before is not None and change.base is not None and change.base != before.version:
        raise Conflict(f"the policy stands at version {before.version}, not at {change.base}")
    if before is None and len(policies) >= MAX_POLICIES:
        raise Conflict(f"there are {MAX_POLICIES} policies; delete one first")
    for other in policies.values():
        if other.name == policy.name:
            continue
        for kind, mine, theirs in (
            ("role", policy.roles, other.roles),
            ("team", policy.teams, other.teams),
        ):
            if shared := sorted({*mine} & {*theirs}):
                raise Conflict(f"the policy {other.name!r} holds for the {kind} {shared[0]!r} already")
    version = before.version + 1 if before is not None else 1
    return msgspec.structs.replace(policy, version=version, by=by, at=at)


def check_unused(known: Mapping[KeyId, KeyEntry], policies: Mapping[str, Policy], name: str) -> None:
    """
    Raises:
        NotFound: there is no such policy.
        Conflict: a key that is good names it.
    """
    if name not in policies:
        raise NotFound(f"there is no policy {name[:40]!r}")
    users = [id_ for id_, e in known.items() if e.record.policy == name and e.record.revoked_at is None]
    if users:
        raise Conflict(f"{len(users)} keys have this policy, {users[0]} among them; revoke them first")
