"""Who was admitted and who was removed, as this node knows it: what a peer is checked against.

Kept after the last connection to coordination: a removed node stays shut out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import structlog

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.identity.roster import NODES, NodeRecord, check_peer, revoked_users
from ollama_distributed.cluster.ports import Coordination, Entry, Removed, Resync

log = structlog.get_logger("cluster.roster")

UNREADABLE = "roster.unreadable"


class Roster:
    """`on_removed` is called once for each node that is found to be removed."""

    def __init__(
        self,
        cluster: str,
        *,
        wall: Callable[[], float],
        on_removed: Callable[[NodeId], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._wall = wall
        self._on_removed = on_removed
        self._on_change = on_change
        self._records: dict[NodeId, NodeRecord] = {}
        self.current = False
        """What there was when the watch began is in it."""

    @property
    def records(self) -> tuple[NodeRecord, ...]:
        return tuple(self._records.values())

    def start_from(self, records: Iterable[NodeRecord]) -> None:
        """What was known before this start; news replace it."""
        self._records = {record.node: record for record in records}

    def __len__(self) -> int:
        """Members: admitted and not removed."""
        return sum(record.removed_at is None for record in self._records.values())

    def record(self, node: NodeId) -> NodeRecord | None:
        return self._records.get(node)

    def removed(self, node: NodeId) -> bool:
        record = self._records.get(node)
        return record is not None and record.removed_at is not None

    def is_server(self, node: NodeId) -> bool:
        """Admitted as a server, and still a member. A node's own advert is its word only."""
        record = self._records.get(node)
        return record is not None and record.role == "server" and record.removed_at is None

    def check(self, peer: Peer) -> None:
        """
        Raises:
            Forbidden: the peer may not speak here.
        """
        check_peer(peer, self._cluster, self._records.get(peer.node), self._wall())

    def revoked_users(self) -> dict[str, float]:
        """For the account's JWT."""
        return revoked_users(self._records.values(), self._wall())

    async def follow(self, coordination: Coordination) -> None:
        """Keep up with the records until cancelled."""
        async with coordination.watch(NODES) as events:
            async for event in events:
                match event:
                    case Resync(entries=entries):
                        for entry in entries:
                            self._put(entry)
                        self.current = True
                    case Entry():
                        self._put(event)
                    case Removed():
                        continue  # a record is for good: without it a void key would pass again
                self._on_change()

    def _put(self, entry: Entry) -> None:
        try:
            record = msgspec.json.decode(entry.value, type=NodeRecord)
        except msgspec.MsgspecError as failure:
            log.warning(UNREADABLE, key=entry.key, reason=str(failure))
            return
        before = self._records.get(record.node)
        self._records[record.node] = record
        if record.removed_at is not None and (before is None or before.removed_at is None):
            self._on_removed(record.node)
