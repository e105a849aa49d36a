"""A cluster's door in memory: records with compare-and-set, a clock that is set, kept audit."""

from __future__ import annotations

import secrets

import anyio.lowlevel

from ollama_distributed.base.errors import Conflict
from ollama_distributed.base.ids import NodeRole
from ollama_distributed.cluster.identity import ca, nkeys
from ollama_distributed.cluster.identity.admission import Admission
from ollama_distributed.cluster.identity.issuing import found
from ollama_distributed.cluster.identity.ports import AuditEvent, Records
from ollama_distributed.cluster.identity.tokens import Address, parse_token
from ollama_distributed.cluster.identity.wire import ClusterFacts, JoinRequest
from ollama_distributed.cluster.ports import Entry

NOW = 1_800_000_000.0


class MemoryRecords:
    """Yields between read and write, so that races happen."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0

    async def get(self, key: str) -> Entry | None:
        await anyio.lowlevel.checkpoint()
        return self.entries.get(key)

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        await anyio.lowlevel.checkpoint()
        known = self.entries.get(key)
        if (known.revision if known else 0) != revision:
            raise Conflict(f"{key} stands elsewhere")
        self.revision += 1
        self.entries[key] = Entry(key, value, self.revision)
        return self.revision


class World:
    def __init__(self, cluster: str = "c1", port: int = 7443, now: float = NOW) -> None:
        self.now = now
        self.audit: list[AuditEvent] = []
        self.keys = found(cluster, self.now, secrets.token_bytes)
        self.facts = ClusterFacts(cluster=cluster, servers=(Address("127.0.0.1", port),))
        self.records = MemoryRecords()
        self.use(self.records)

    def use(self, records: Records) -> None:
        self.admission = Admission(
            records,
            keys=lambda: self.keys,
            facts=lambda: self.facts,
            audit=self.audit.append,
            wall=lambda: self.now,
        )

    def request(self, token: str, node: str, *, role: NodeRole | None = None) -> JoinRequest:
        parsed = parse_token(token)
        return JoinRequest(
            token_id=parsed.id,
            secret=parsed.secret,
            role=role or parsed.role,
            node=node,
            csr=ca.make_request(ca.make_key()).decode(),
            nats_user=nkeys.make_key("user", secrets.token_bytes(32)).public,
        )
