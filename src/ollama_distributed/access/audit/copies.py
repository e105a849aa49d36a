"""Copies of this node's chain on other nodes, so that a lost or rewritten disk is no lost history.

Each new record goes to a few servers, always the same while they live; they take it only if it follows
from what they have. Nothing is sent while nothing happens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import anyio
import structlog

from ollama_distributed.access.audit.chain import GENESIS, PART, Head, before, encode, fault_of, head_of
from ollama_distributed.access.audit.log import AuditLog
from ollama_distributed.access.audit.ports import ChainDisk, Others, TakeAnswer, TakeAsk
from ollama_distributed.base.audit import AuditEntry, AuditRecord
from ollama_distributed.base.errors import Conflict, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState

COPIES = 2
"""Beside the node's own: any two disks may be lost."""
LOOK_S = 5.0
"""Servers come and go; what could not be sent is sent again."""
MOST_SENT = 200
"""Records in one message, some 100 KB."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def keepers(state: ClusterState, node: NodeId) -> list[NodeId]:
    """Which living servers keep a copy of the node's chain; every node says the same."""
    living = [
        one.id
        for one in state.nodes.values()
        if one.id != node and one.alive and one.advert is not None and one.advert.role == "server"
    ]

    def weight(one: NodeId) -> bytes:
        return hashlib.sha256(f"{node} {one}".encode()).digest()

    return sorted(living, key=weight)[:COPIES]


class Copies:
    """`run` sends this node's records, until it is cancelled; `take` keeps another's."""

    def __init__(
        self, chain: AuditLog, disk: ChainDisk, others: Others, state: Callable[[], ClusterState]
    ) -> None:
        self._chain = chain
        self._disk = disk
        self._others = others
        self._state = state
        self._sent: dict[NodeId, int] = {}
        self._diverged: set[NodeId] = set()
        self._taking = anyio.Lock()

    async def run(self) -> None:
        while True:
            grown = self._chain.grown
            wanted = keepers(self._state(), self._chain.node)
            self._sent = {node: seq for node, seq in self._sent.items() if node in wanted}
            for node in wanted:
                try:
                    await self._send(node)
                except OllamaDistributedError as failure:
                    self._sent.pop(node, None)
                    # One that is refused stays so until somebody looks.
                    level = logging.WARNING if isinstance(failure, Conflict) else logging.DEBUG
                    log.log(level, "audit.copy_waits", node=node, error=failure.message)
            with anyio.move_on_after(LOOK_S):
                await grown.wait()

    async def _send(self, node: NodeId) -> None:
        head = await self._disk.head(self._chain.node)
        seq = self._sent.get(node)
        if seq is None:
            there = await self._others.take(node, TakeAsk())
            if await self._differs(there, head):
                if node not in self._diverged:
                    self._diverged.add(node)
                    said = f"the copy on node {node} has another record {there.seq}"
                    self._chain.note(
                        AuditEntry(action="audit.diverged", result="ok", detail=said, alarm=True)
                    )
                    log.error("audit.diverged", copy=node, seq=there.seq)
                return
            seq = there.seq
        while seq < head.seq:
            found = await self._disk.after(self._chain.node, seq, MOST_SENT)
            # Not what is being written just now: that may be taken back.
            records = [record for record in found if record.seq <= head.seq]
            if not records:
                return
            await self._others.take(node, TakeAsk(records=tuple(records)))
            seq = records[-1].seq
            self._sent[node] = seq
        self._sent[node] = seq

    async def _differs(self, there: TakeAnswer, head: Head) -> bool:
        """Whether a copy cannot be one of this chain."""
        if not there.seq:
            return False
        if there.seq > head.seq:
            return True
        (record,) = await self._disk.after(self._chain.node, there.seq - 1, 1) or (None,)
        if record is not None and record.seq > there.seq:
            return False  # it is so far behind that the record was removed here
        return record is None or record.hash != there.hash

    async def _begun_later(self, node: NodeId, head: Head, first: AuditRecord) -> Head:
        """What a copy follows whose chain has no records any more between `head` and `first`. One that
        lacked them for so long that all of it is due goes, and begins anew."""
        due_before = self._chain.due_before
        if head.seq and (due_before is None or head.at >= due_before):
            return head
        if head.seq:
            await self._disk.remove(node)
        return before(first)

    async def take(self, node: NodeId, ask: TakeAsk) -> TakeAnswer:
        """
        Raises:
            Conflict: they do not follow from what is here.
            DiskFull, Unavailable
        """
        async with self._taking:
            head = await self._disk.head(node)
            new = [record for record in ask.records if record.seq > head.seq]
            if new and new[0].action == PART and new[0].seq > head.seq + 1:
                head = await self._begun_later(node, head, new[0])
            for record in new:
                fault = fault_of(record, encode(record), node=node, head=head)
                if fault:
                    raise Conflict(f"record {record.seq} of node {node} is not kept: {fault}")
                head = head_of(record)
            if new:
                await self._disk.append(node, new)
        return TakeAnswer(seq=head.seq, hash=head.hash or GENESIS)
