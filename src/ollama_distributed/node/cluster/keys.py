"""API keys that hold on every node: each server enters its own in the state, all nodes follow.

Hashes only. What was learned last is kept in `DATA_DIR/cluster-keys.json`, so that clients
are known after a restart without coordination.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from ollama_distributed.access.keys import KeyRecord
from ollama_distributed.base.errors import Conflict, DiskFull
from ollama_distributed.base.ids import KeyId, NodeId, NodeRole
from ollama_distributed.cluster.ports import Coordination, Entry, Removed, Resync
from ollama_distributed.node.data_dir import read_file, write_file

log = structlog.get_logger("cluster.keys")

KEYS = "access.keys."
UNREADABLE = "keys.unreadable"
NOT_KEPT = "keys.not_kept"


class SharedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key in the state."""

    node: NodeId
    """The server that entered it; its keys go when it is removed."""
    record: KeyRecord


class KeptKeys(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster-keys.json`."""

    cluster: str
    keys: tuple[SharedKey, ...]


class SharedKeys:
    """`own`: the keys of this node's data folder. `use` is called with all that hold."""

    def __init__(
        self,
        data_dir: Path,
        node: NodeId,
        own: Sequence[KeyRecord],
        use: Callable[[Mapping[KeyId, KeyRecord]], None],
    ) -> None:
        self._path = data_dir / "cluster-keys.json"
        self._node = node
        self._own = tuple(SharedKey(node=node, record=record) for record in own)
        self._use = use
        self._known: dict[KeyId, SharedKey] = {}

    def restore(self, cluster: str) -> None:
        """Use what was kept of this cluster; nothing of another. Blocking, small.

        Raises:
            Invalid: the file is damaged.
        """
        kept = read_file(self._path, KeptKeys)
        keys = kept.keys if kept is not None and kept.cluster == cluster else ()
        self._known = {key.record.id: key for key in keys}
        self._use({key.record.id: key.record for key in keys})

    def check(self, removed: Callable[[NodeId], bool]) -> None:
        """Let those hold that no removed node entered."""
        self._use({id_: key.record for id_, key in self._known.items() if not removed(key.node)})

    async def follow(
        self, coordination: Coordination, *, cluster: str, role: NodeRole, removed: Callable[[NodeId], bool]
    ) -> None:
        """Enter this server's keys, then keep up with all until cancelled."""
        async with coordination.watch(KEYS) as events:
            async for event in events:
                known = dict(self._known)
                match event:
                    case Resync(entries=entries):
                        known = {key.record.id: key for key in map(_key, entries) if key is not None}
                        if role == "server":
                            await self._enter(coordination, known)
                    case Entry():
                        if (entered := _key(event)) is not None:
                            known[entered.record.id] = entered
                    case Removed(key=key):
                        known.pop(KeyId(key.removeprefix(KEYS)), None)
                if known == self._known:
                    continue
                self._known = known
                self.check(removed)
                kept = KeptKeys(cluster=cluster, keys=tuple(known.values()))
                try:
                    await asyncio.to_thread(write_file, self._path, kept)
                except DiskFull as failure:  # they hold all the same, until the next restart
                    log.warning(NOT_KEPT, reason=failure.message)

    async def _enter(self, coordination: Coordination, known: Mapping[KeyId, SharedKey]) -> None:
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


def _key(entry: Entry) -> SharedKey | None:
    try:
        key = msgspec.json.decode(entry.value, type=SharedKey)
    except msgspec.MsgspecError as failure:
        log.warning(UNREADABLE, key=entry.key, reason=str(failure))
        return None
    return key if entry.key == KEYS + key.record.id else None
