"""A cluster that is a handful of records in memory: for whatever stands on the `Cluster` port.

It keeps the port's promises (unknown nodes, a remove that needs `force`, versions of the config,
one-use tokens) without nodes or network. What goes wrong is set from outside: `quorum`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from msgspec.structs import replace

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import (
    ClusterAnswer,
    ConfigAnswer,
    ConfigAsk,
    ConfigHistory,
    LeaderAnswer,
    NewToken,
    NodeRow,
    NodeUsage,
    RollbackAsk,
    TokenRequest,
    TokenRow,
    join_command,
)
from ollama_distributed.base.errors import Conflict, Invalid, NotFound, Unavailable
from ollama_distributed.base.ids import NodeRole

GIB = 1 << 30
TOKEN_SERVERS = 3
"""So many servers are wanted before new nodes become mere nodes."""


class FakeCluster:
    """Implements `gateway.cluster_port.Cluster`.

    Args:
        names: of the nodes; the first answers and leads, up to three are voting servers.
        now: the wall clock, seconds since the Unix epoch.
        check: raises `Invalid` for config values that no setting takes.
    """

    def __init__(
        self,
        *names: str,
        now: Callable[[], float] = lambda: 1_700_000_000.0,
        check: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._now = now
        self._check = check
        self.quorum = True
        """False: writes are refused, as without a majority of voters."""
        self.open = False
        self.left = False
        self.by: list[tuple[str, str]] = []
        """Each change that was made, and whose key it was."""
        self.watchers = 0
        self.said: list[Alert] = []
        """By nodes of themselves."""
        self.rows: dict[str, NodeRow] = {}
        for number, name in enumerate(names or ("alpha",)):
            row = self._row(number, name)
            self.rows[row.id] = row
        self._tokens: dict[str, TokenRow] = {}
        self._configs = [ConfigAnswer(version=0, values={})]
        self._changed = asyncio.Event()

    def _row(self, number: int, name: str) -> NodeRow:
        role: NodeRole = "server" if number < TOKEN_SERVERS else "node"
        return NodeRow(
            id=f"{name}-id",
            name=name,
            status="online",
            since=self._now() - 60.0 * (number + 1),
            role=role,
            voter=role == "server",
            leader=number == 0,
            this=number == 0,
            version="0.1",
            started_at=self._now() - 3600.0,
            addresses=(f"10.0.0.{number + 1}:7443",),
            api=(f"http://10.0.0.{number + 1}:8080",),
            usage=NodeUsage(cpu=25.0 * number % 100.0, memory=50.0, requests=number, age_s=0.5),
            cpus=8,
            cpu_model="Fast CPU",
            memory_bytes=16 * GIB,
            system="Linux x86_64",
            engines=("llama.cpp b1 (wheel, AVX2)",),
            models=("smollm2:135m",) if number == 0 else (),
        )

    # ── what fails from outside ─────────────────────────────────────────────────────

    def set(self, name: str, **fields: Any) -> None:
        """Change what is seen of a node, e.g. its `status`."""
        row = self._find(name)
        self.rows[row.id] = replace(row, **fields)

    def _write(self, what: str, actor: str) -> None:
        if not self.quorum:
            raise Unavailable("no majority of the voters can be reached: changes are refused until one can")
        self.by.append((what, actor))

    def _find(self, node: str) -> NodeRow:
        for row in self.rows.values():
            if node in (row.id, row.name):
                return row
        raise NotFound(f"there is no node {node!r}")

    # ── reads ───────────────────────────────────────────────────────────────────────

    def status(self) -> ClusterAnswer:
        away = self._alerts()
        counts: dict[str, int] = {}
        for row in self.rows.values():
            counts[row.status] = counts.get(row.status, 0) + 1
        return ClusterAnswer(
            cluster="fake",
            node=next(iter(self.rows)),
            status="no_quorum" if not self.quorum else "degraded" if away else "ok",
            reasons=tuple(alert.message for alert in away),
            leader=self.leader(),
            voters=tuple(row.id for row in self.rows.values() if row.voter),
            nodes=counts,
            models=len({model for row in self.rows.values() for model in row.models}),
            revision=7,
            config_version=self.config().version,
            open=self.open,
            listen=("0.0.0.0:7443",) if self.open else (),
        )

    async def alerts(self) -> list[Alert]:
        return [*self._alerts(), *self.said]

    def _alerts(self) -> list[Alert]:
        return [
            Alert(
                level="error",
                code=f"node_{row.status}",
                message=f"{row.name} does not answer: see to it, or remove it",
                node=row.id,
                name=row.name,
                since=row.since,
            )
            for row in self.rows.values()
            if row.status in ("suspect", "offline")
        ]

    def leader(self) -> LeaderAnswer:
        row = next((row for row in self.rows.values() if row.leader), None)
        if row is None or not self.quorum:
            return LeaderAnswer(leader=None, epoch=3)
        return LeaderAnswer(leader=row.id, name=row.name, epoch=3, since=self._now() - 90.0, this=row.this)

    async def nodes(self) -> list[NodeRow]:
        return sorted(self.rows.values(), key=lambda row: row.name)

    async def node(self, node: str) -> NodeRow:
        return self._find(node)

    # ── nodes ───────────────────────────────────────────────────────────────────────

    async def drain(self, node: str, *, actor: str) -> NodeRow:
        return self._draining(node, "drain", actor)

    async def undrain(self, node: str, *, actor: str) -> NodeRow:
        return self._draining(node, "undrain", actor)

    def _draining(self, node: str, what: str, actor: str) -> NodeRow:
        row = self._find(node)
        self._write(what, actor)
        self.set(row.id, status="draining" if what == "drain" else "online", since=self._now())
        return self.rows[row.id]

    async def label(self, node: str, labels: Mapping[str, str | None], *, actor: str) -> NodeRow:
        row = self._find(node)
        self._write("label", actor)
        merged = {**row.labels, **labels}
        self.set(row.id, labels={name: value for name, value in merged.items() if value is not None})
        return self.rows[row.id]

    async def remove(self, node: str, *, force: bool, actor: str) -> None:
        row = self._find(node)
        if row.status == "online" and not force:
            raise Conflict(f"{row.name} is online: drain and stop it first, or force its removal")
        self._write("remove", actor)
        del self.rows[row.id]

    async def replace_voter(self, dead: str, new: str | None, *, actor: str) -> ClusterAnswer:
        gone = self._find(dead)
        if gone.status != "offline":
            raise Conflict(f"{gone.name} still lives: only a dead voter is replaced")
        candidates = [row for row in await self.nodes() if row.status == "online" and not row.voter]
        chosen = self._find(new) if new else next(iter(candidates), None)
        if chosen is None:
            raise Conflict("no living server is without a vote: let one join first")
        self._write("replace_voter", actor)
        self.set(gone.id, voter=False)
        self.set(chosen.id, voter=True, role="server")
        return self.status()

    # ── tokens, joining, leaving ────────────────────────────────────────────────────

    async def create_token(self, request: TokenRequest, *, actor: str) -> NewToken:
        if request.uses < 1:
            raise Invalid("uses must be 1 or more", param="uses")
        self._write("create_token", actor)
        self.open = True
        servers = sum(row.role == "server" for row in self.rows.values())
        role = request.role or ("server" if servers < TOKEN_SERVERS else "node")
        token_id = f"t{len(self._tokens) + 1}"
        row = TokenRow(
            id=token_id,
            role=role,
            uses=request.uses,
            used=0,
            created_at=self._now(),
            expires_at=self._now() + request.ttl_s,
            creator=actor,
        )
        self._tokens[token_id] = row
        token = f"odj_{token_id}_secret"
        return NewToken(
            token=token,
            id=token_id,
            role=role,
            uses=row.uses,
            expires_at=row.expires_at,
            command=join_command(token),
        )

    async def tokens(self) -> list[TokenRow]:
        return [*self._tokens.values()]

    async def revoke_token(self, token_id: str, *, actor: str) -> None:
        if token_id not in self._tokens:
            raise NotFound(f"there is no token {token_id!r}")
        self._write("revoke_token", actor)
        self._tokens[token_id] = replace(self._tokens[token_id], state="revoked")

    async def join(self, token: str, *, actor: str) -> ClusterAnswer:
        if len(self.rows) > 1:
            raise Conflict("this node is a member of a cluster already: let it leave first")
        if not token.startswith("odj_"):
            raise Invalid("that is no join token", param="token")
        self._write("join", actor)
        row = self._row(1, "beta")
        self.rows[row.id] = row
        return self.status()

    async def leave(self, *, force: bool, actor: str) -> None:
        if len(self.rows) == 1 and not force:
            raise Conflict("this node is alone already")
        self._write("leave", actor)
        self.left = True

    # ── configuration ───────────────────────────────────────────────────────────────

    def config(self) -> ConfigAnswer:
        return self._configs[-1]

    async def put_config(self, request: ConfigAsk, *, actor: str) -> ConfigAnswer:
        if request.version is not None and request.version != self.config().version:
            raise Conflict(f"the configuration is at version {self.config().version} now")
        values = {**self.config().values, **request.values}
        return self._put(
            {name: value for name, value in values.items() if value is not None}, request.comment, actor
        )

    def _put(self, values: Mapping[str, Any], comment: str, actor: str) -> ConfigAnswer:
        self._check(values)
        self._write("config", actor)
        made = ConfigAnswer(
            version=self.config().version + 1, values=values, by=actor, at=self._now(), comment=comment
        )
        self._configs.append(made)
        self._changed.set()
        self._changed = asyncio.Event()
        return made

    async def config_history(self) -> ConfigHistory:
        return ConfigHistory(tuple(reversed(self._configs[1:])))

    async def rollback_config(self, request: RollbackAsk, *, actor: str) -> ConfigAnswer:
        for config in self._configs[1:]:
            if config.version == request.version:
                return self._put(config.values, request.comment or f"back to {request.version}", actor)
        raise NotFound(f"there is no version {request.version} of the configuration")

    async def watch_config(self) -> AsyncIterator[ConfigAnswer]:
        self.watchers += 1
        try:
            shown: ConfigAnswer | None = None
            while True:
                changed = self._changed
                if shown is not self.config():
                    shown = self.config()
                    yield shown
                else:
                    await changed.wait()
        finally:
            self.watchers -= 1
