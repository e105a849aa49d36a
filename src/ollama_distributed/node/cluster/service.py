"""The cluster as the gateway's routes ask for it (`gateway.cluster_port.Cluster`).

Reads answer from what this node knows, always. Writes go to the leader, or where only a
server may act, to a server, and are refused within two seconds when there is none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
import structlog

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import (
    ClusterAnswer,
    ConfigAnswer,
    ConfigAsk,
    ConfigHistory,
    LeaderAnswer,
    NewToken,
    NodeRow,
    RollbackAsk,
    TokenRequest,
    TokenRow,
    join_command,
)
from ollama_distributed.base.errors import Conflict, Forbidden, Unauthenticated
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.roster import TOKENS
from ollama_distributed.cluster.identity.tokens import TokenRecord, parse_token
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.node.cluster import alerts, rows, voters
from ollama_distributed.node.cluster.keeper import Keeper
from ollama_distributed.node.cluster.members import Members
from ollama_distributed.state.changes import Change, SetDrain, SetLabels
from ollama_distributed.state.records import Lease

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life

log = structlog.get_logger("cluster.service")


class ClusterService:
    """Implements `Cluster`."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._members = Members(keeper)
        voters.VoterRoutes(keeper, keeper.parts.door)

    async def close(self) -> None:
        await self._members.close()

    # ── reading ─────────────────────────────────────────────────────────────────────

    def status(self) -> ClusterAnswer:
        life, me = self._keeper.life, self._keeper.parts.node
        if life is None:
            return ClusterAnswer(
                cluster="",
                node=me,
                status="degraded",
                reasons=tuple(alert.message for alert in self._conditions()),
                leader=LeaderAnswer(leader=None),
            )
        return rows.status_answer(
            life.state,
            cluster=life.identity.cluster,
            me=me,
            lease=self._lease(life),
            writable=self._writable(life),
            alerts=self._conditions(),
            is_open=life.front.is_open,
            listen=life.front.hop(),
        )

    def leader(self) -> LeaderAnswer:
        life = self._keeper.life
        if life is None:
            return LeaderAnswer(leader=None)
        return rows.leader_answer(life.state, self._lease(life), self._keeper.parts.node)

    async def nodes(self) -> list[NodeRow]:
        life = await self._keeper.settled()
        usages: Mapping[NodeId, Utilization] = await life.link.membership.usages() if life.link else {}
        found = [self._row(life, node, usages.get(node)) for node in life.state.nodes]
        return sorted(found, key=lambda row: (row.name, row.id))

    async def node(self, node: str) -> NodeRow:
        life = await self._keeper.settled()
        known = life.state.resolve(node)
        usages = await life.link.membership.usages() if life.link else {}
        return self._row(life, known, usages.get(known))

    def _row(self, life: Life, node: NodeId, usage: Utilization | None) -> NodeRow:
        return rows.node_row(
            life.state.nodes[node],
            life.state,
            me=self._keeper.parts.node,
            leader=lease.node if (lease := self._lease(life)) else None,
            usage=usage or Utilization(),
        )

    def _lease(self, life: Life) -> Lease | None:
        return life.link.consensus.get_lease() if life.link is not None else None

    def _writable(self, life: Life) -> bool:
        """False only where it is known that no quorum answers."""
        link = life.link
        return (
            link is None
            or not link.mirror.ready
            or (link.coordination.connected and link.coordination.writable)
        )

    async def alerts(self) -> list[Alert]:
        life = self._keeper.life
        found = self._conditions()
        if life is not None:
            told = await life.link.membership.alerts() if life.link is not None else {}
            found += alerts.of_nodes({**told, self._keeper.parts.node: life.own_alerts()}, life.state)
        return alerts.each_once(found)

    def _conditions(self) -> list[Alert]:
        """What is wrong with the cluster, and with this node's part in it."""
        life = self._keeper.life
        if life is None:
            trouble = self._keeper.trouble
            return [
                Alert(
                    level="error" if trouble else "info",
                    code="not_started" if trouble else "starting",
                    message=trouble or "this node's part in the cluster is being started",
                )
            ]
        return [
            *alerts.of_clock(life.identity.peer, self._keeper.parts.clock.time()),
            *alerts.of_link(life.trouble, up=life.link is not None),
            *alerts.of_front(life.front.trouble),
            *alerts.of_damage(life.damaged, life.state),
            *self._away(life),
            *alerts.of_state(life.state, self._lease(life)),
        ]

    def _away(self, life: Life) -> list[Alert]:
        link = life.link
        if link is None:
            return []
        if not link.coordination.connected:
            return [
                Alert(
                    level="error",
                    code="cut_off",
                    message="no coordination server can be reached from here: changes are refused, inference "
                    "goes on; check that the servers run and that this machine reaches them",
                )
            ]
        if not link.coordination.writable:
            return [
                Alert(
                    level="error",
                    code="no_quorum",
                    message="the coordination servers have no majority: changes are refused, inference goes "
                    "on; start the servers that are offline",
                )
            ]
        if not link.mirror.ready:
            return [Alert(level="info", code="starting", message="the cluster's state is still being read")]
        if not link.mirror.synced:
            return [
                Alert(
                    level="warning",
                    code="state_old",
                    message="nothing is heard of the cluster, so what is shown may be old: nobody leads, or "
                    "this node is cut off",
                )
            ]
        return []

    # ── nodes ───────────────────────────────────────────────────────────────────────

    async def drain(self, node: str, *, actor: str) -> NodeRow:
        return await self._change_node(node, lambda known: SetDrain(node=known, drain=True), actor)

    async def undrain(self, node: str, *, actor: str) -> NodeRow:
        return await self._change_node(node, lambda known: SetDrain(node=known, drain=False), actor)

    async def label(self, node: str, labels: Mapping[str, str | None], *, actor: str) -> NodeRow:
        return await self._change_node(node, lambda known: SetLabels(node=known, labels=labels), actor)

    async def _change_node(self, node: str, change: Callable[[NodeId], Change], actor: str) -> NodeRow:
        life, link = await self._keeper.linked()
        known = life.state.resolve(node)
        await link.consensus.propose_change(change(known), actor=actor)
        return await self.node(known)

    async def remove(self, node: str, *, force: bool, actor: str) -> None:
        await self._members.remove(node, force=force, actor=actor)

    # ── joining and leaving ─────────────────────────────────────────────────────────

    async def create_token(self, request: TokenRequest, *, actor: str) -> NewToken:
        life, _ = await self._keeper.linked()
        life.need_server()
        await life.open()
        role = request.role
        if role is None:
            role = "server" if len(life.state.servers) < rows.SERVERS_WANTED else "node"
        text = await life.admission.create_token(
            role, creator=actor, uses=request.uses, lifetime_s=request.ttl_s, hosts=request.hosts
        )
        return NewToken(
            token=text,
            id=parse_token(text).id,
            role=role,
            uses=request.uses,
            expires_at=self._keeper.parts.clock.time() + request.ttl_s,
            command=join_command(text),
        )

    async def tokens(self) -> list[TokenRow]:
        _, link = await self._keeper.linked()
        now = self._keeper.parts.clock.time()
        found = await link.coordination.scan(TOKENS)
        records = [msgspec.json.decode(entry.value, type=TokenRecord) for entry in found.entries]
        return [rows.token_row(record, now) for record in sorted(records, key=lambda one: -one.created_at)]

    async def revoke_token(self, token_id: str, *, actor: str) -> None:
        life, _ = await self._keeper.linked()
        life.need_server()
        await life.admission.revoke_token(token_id, actor=actor)

    async def join(self, token: str, *, actor: str) -> ClusterAnswer:
        log.info("cluster.join_asked", actor=actor)
        try:
            await self._keeper.join(parse_token(token))
        except (Forbidden, Unauthenticated) as refused:
            # Not who asks this node is refused, but this node by the other cluster.
            raise Conflict(refused.message) from refused
        return self.status()

    async def leave(self, *, force: bool, actor: str) -> None:
        await self._members.leave(force=force, actor=actor)

    async def replace_voter(self, dead: str, new: str | None, *, actor: str) -> ClusterAnswer:
        await voters.replace_voter(self._keeper, dead, new, actor=actor)
        return self.status()

    # ── config ──────────────────────────────────────────────────────────────────────

    def config(self) -> ConfigAnswer:
        return rows.config_answer(self._keeper.state.config)

    async def put_config(self, request: ConfigAsk, *, actor: str) -> ConfigAnswer:
        _, link = await self._keeper.linked()
        made = await link.config.put(
            request.values, actor=actor, version=request.version, comment=request.comment
        )
        return rows.config_answer(made)

    async def config_history(self) -> ConfigHistory:
        return ConfigHistory(tuple(map(rows.config_answer, self._keeper.state.versions())))

    async def rollback_config(self, request: RollbackAsk, *, actor: str) -> ConfigAnswer:
        _, link = await self._keeper.linked()
        made = await link.config.rollback(request.version, actor=actor, comment=request.comment)
        return rows.config_answer(made)

    async def watch_config(self) -> AsyncIterator[ConfigAnswer]:
        _, link = await self._keeper.linked()
        async for config in link.config.watch():
            yield rows.config_answer(config)
