"""Keys and policies that hold on every node: each server enters its own key in the state, the leader
the others, all nodes follow.

Hashes only. What was learned last is kept in `DATA_DIR/cluster-keys.json`, so that clients
are known after a restart without coordination.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from ollama_distributed.access.keys import KeyRecord
from ollama_distributed.base.errors import Conflict, DiskFull
from ollama_distributed.base.ids import KeyId, NodeId, NodeRole
from ollama_distributed.base.policies import Policy
from ollama_distributed.cluster.ports import Coordination, Entry, Removed, Resync
from ollama_distributed.node.cluster.book import KeyUses
from ollama_distributed.node.data_dir import read_file, write_file
from ollama_distributed.state.access import KeyEntry
from ollama_distributed.state.keys import ACCESS_KEYS as KEYS
from ollama_distributed.state.keys import ACCESS_POLICIES as POLICIES

T = TypeVar("T")

log = structlog.get_logger("cluster.keys")

ACCESS = "access."
UNREADABLE = "keys.unreadable"
NOT_KEPT = "keys.not_kept"


class KeptKeys(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster-keys.json`."""

    cluster: str
    keys: tuple[KeyEntry, ...]
    policies: tuple[Policy, ...] = ()


Use = Callable[[Mapping[KeyId, KeyRecord], Mapping[str, Policy]], None]


class SharedKeys:
    """`own`: the keys of this node's data folder. `use` is called with all that holds. `uses`: when
    they were used."""

    def __init__(
        self, data_dir: Path, node: NodeId, own: Sequence[KeyRecord], use: Use, uses: KeyUses
    ) -> None:
        self.uses = uses
        self._path = data_dir / "cluster-keys.json"
        self._node = node
        self._own = tuple(KeyEntry(node=node, record=record) for record in own)
        self._use = use
        self._known: dict[KeyId, KeyEntry] = {}
        self._policies: dict[str, Policy] = {}

    def restore(self, cluster: str) -> None:
        """Use what was kept of this cluster; nothing of another. Blocking, small.

        Raises:
            Invalid: the file is damaged.
        """
        kept = read_file(self._path, KeptKeys)
        ours = kept if kept is not None and kept.cluster == cluster else KeptKeys(cluster=cluster, keys=())
        self._known = {key.record.id: key for key in ours.keys}
        self._policies = {policy.name: policy for policy in ours.policies}
        self.check(_none_removed)

    def check(self, removed: Callable[[NodeId], bool]) -> None:
        """Let those hold that no removed node entered."""
        good = {id_: key.record for id_, key in self._known.items() if not key.node or not removed(key.node)}
        self._use(good, dict(self._policies))

    async def follow(
        self, coordination: Coordination, *, cluster: str, role: NodeRole, removed: Callable[[NodeId], bool]
    ) -> None:
        """Enter this server's keys, then keep up with all until cancelled."""
        async with coordination.watch(ACCESS) as events:
            async for event in events:
                known, policies = dict(self._known), dict(self._policies)
                match event:
                    case Resync(entries=entries):
                        known, policies = _all(entries)
                        if role == "server":
                            await self._enter(coordination, known)
                    case Entry():
                        if (entered := _key(event)) is not None:
                            known[entered.record.id] = entered
                        elif (policy := _policy(event)) is not None:
                            policies[policy.name] = policy
                    case Removed(key=key) if key.startswith(KEYS):
                        known.pop(KeyId(key.removeprefix(KEYS)), None)
                    case Removed(key=key):
                        policies.pop(key.removeprefix(POLICIES), None)
                if known == self._known and policies == self._policies:
                    continue
                self._known, self._policies = known, policies
                self.check(removed)
                kept = KeptKeys(
                    cluster=cluster, keys=tuple(known.values()), policies=tuple(policies.values())
                )
                try:
                    await asyncio.to_thread(write_file, self._path, kept)
                except DiskFull as failure:  # they hold all the same, until the next restart
                    log.warning(NOT_KEPT, reason=failure.message)

    async def _enter(self, coordination: Coordination, known: Mapping[KeyId, KeyEntry]) -> None:
        """Make the state say what this server's data folder says: its new keys, and no others
        that it entered once."""
        own = {key.record.id for key in self._own}
        for key in known.values():
            if key.node == self._node and key.record.id not in own:
                stored = await coordination.get(KEYS + key.record.id)
                if stored is not None:
                    await coordination.delete(KEYS + key.record.id, revision=stored.revision)
        for key in self._own:
            if key.record.id not in known:
                try:
                    await coordination.create(KEYS + key.record.id, msgspec.json.encode(key))
                except Conflict:
                    continue  # an earlier try got through; its news is under way


def _none_removed(_node: NodeId) -> bool:
    """Before the roster is known."""
    return False


def _all(entries: Sequence[Entry]) -> tuple[dict[KeyId, KeyEntry], dict[str, Policy]]:
    keys = {key.record.id: key for key in map(_key, entries) if key is not None}
    policies = {policy.name: policy for policy in map(_policy, entries) if policy is not None}
    return keys, policies


def _key(entry: Entry) -> KeyEntry | None:
    if not entry.key.startswith(KEYS):
        return None
    key = _decoded(entry, KeyEntry)
    return key if key is not None and entry.key == KEYS + key.record.id else None


def _policy(entry: Entry) -> Policy | None:
    if not entry.key.startswith(POLICIES):
        return None
    policy = _decoded(entry, Policy)
    return policy if policy is not None and entry.key == POLICIES + policy.name else None


def _decoded(entry: Entry, form: type[T]) -> T | None:
    try:
        return msgspec.json.decode(entry.value, type=form)
    except msgspec.MsgspecError as failure:
        log.warning(UNREADABLE, key=entry.key, reason=str(failure))
        return None
