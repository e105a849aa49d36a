"""What one can subscribe to, who may, and where the rows come from.

A channel is a question whose answer is rows, each with an id; what changes between two answers are
its events. So nothing has to be told by who makes the change, and a channel that nobody listens to
costs nothing. The rights are those of the REST route that answers the same question.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

import msgspec

from ollama_distributed.access.roles import Right, may
from ollama_distributed.base import events
from ollama_distributed.base.cluster import NodeRow, NodeUsage
from ollama_distributed.base.events import Busy, QueuedRequest
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.queue import QueuedRow, QueueWaiting, key_of
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.events.alerts import Alerts
from ollama_distributed.gateway.events.rows import Row
from ollama_distributed.gateway.ports import Moves
from ollama_distributed.gateway.queue_port import Queues

OWN = Right("read", "account")
"""Of the connection, and of what tells callers of their own requests only."""
ALL_REQUESTS = Right("admin", "queue")
"""Of who is told of everybody's requests."""
MOST_MISSED = 3
"""Answers that a node may fail to give before its requests count as gone."""

_encode = msgspec.json.Encoder().encode


class Channel(msgspec.Struct, frozen=True):
    name: str
    summary: str
    right: Right
    path: str
    """Of the route with the same answer: what a policy says of that holds here."""
    ask: Callable[[], Awaitable[Iterable[Row]]]
    """All that there is now; may raise `OllamaDistributedError`."""
    every_s: float = 1.0


def sees(identity: Identity, row: Row) -> bool:
    if row.owner is None or row.owner == (identity.team, identity.user, key_of(identity)):
        return True
    policy = identity.policy
    return may(identity, ALL_REQUESTS) and (policy is None or policy.all_models)


def told_to(identity: Identity, row: Row) -> bytes:
    """JSON, as this one may read it."""
    bound = identity.policy is not None and not identity.policy.all_models
    return row.nameless if bound and row.nameless else row.data


def channels_of(
    queues: Queues | None, cluster: Cluster | None, moves: Moves | None, *, wall: Callable[[], float]
) -> Mapping[str, Channel]:
    """What this node can tell of. `wall`: its clock, seconds since the Unix epoch."""
    found: list[Channel] = []
    if queues is not None:
        found += _of_queues(queues)
    if cluster is not None:
        found += _of_nodes(cluster, wall)
    if moves is not None:
        found.append(_of_transfers(moves))
    return {channel.name: channel for channel in found}


# ── queues ──────────────────────────────────────────────────────────────────────────


def _of_queues(queues: Queues) -> list[Channel]:
    async def totals() -> Iterable[Row]:
        answer = await queues.queue()
        return (Row(node.node, _encode(node), node.name) for node in answer.nodes)

    return [
        Channel(
            "queue",
            "requests that wait: position and ETA of each, one's own; all for who may change queues",
            OWN,
            events.PATH,
            QueuedRequests(queues).ask,
        ),
        Channel(
            "queues",
            "how many requests wait at each node and model, and for how long",
            Right("read", "queue"),
            "/api/v1/queue",
            totals,
        ),
    ]


class QueuedRequests:
    """The requests that wait at all nodes, and how it went on with those that waited a moment ago."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._known: dict[str, QueueWaiting] = {}
        """By node, as it answered last."""
        self._missed: dict[str, int] = {}

    async def ask(self) -> Iterable[Row]:
        found = {one.node: one for one in await self._queues.waiting()}
        return self._rows(found)

    def _rows(self, found: dict[str, QueueWaiting]) -> Iterable[Row]:
        before, self._known = self._known, {}
        for node, one in found.items():
            if one.error and node in before:
                self._missed[node] = self._missed.get(node, 0) + 1
                if self._missed[node] < MOST_MISSED:
                    self._known[node] = before[node]
                    yield from (_waiting(node, row) for row in before[node].waiting)
                continue
            self._missed.pop(node, None)
            self._known[node] = one
            yield from (_waiting(node, row) for row in one.waiting)
            left = {row.number for row in one.waiting}
            for row in before[node].waiting if node in before else ():
                if row.number not in left:
                    yield _over(node, row, started=row.number in one.began)


def _waiting(node: str, row: QueuedRow) -> Row:
    told = QueuedRequest(
        request_id=row.request_id,
        model=row.model,
        node=row.node,
        position=row.position,
        eta_s=None if row.eta_s is None else round(row.eta_s, 1),
        priority=row.priority,
        since=round(row.since, 3),
        key=row.key,
        team=row.team,
        user=row.user,
    )
    return _row_of(node, row, told, over=False)


def _over(node: str, row: QueuedRow, *, started: bool) -> Row:
    told = QueuedRequest(
        request_id=row.request_id,
        model=row.model,
        node=row.node,
        state="started" if started else "ended",
        priority=row.priority,
        since=round(row.since, 3),
        key=row.key,
        team=row.team,
        user=row.user,
    )
    return _row_of(node, row, told, over=True)


def _row_of(node: str, row: QueuedRow, told: QueuedRequest, *, over: bool) -> Row:
    owner = (row.team, row.user, row.key)
    return Row(f"{node}/{row.number}", _encode(told), row.request_id, owner, over)


# ── nodes ───────────────────────────────────────────────────────────────────────────


def _of_nodes(cluster: Cluster, wall: Callable[[], float]) -> list[Channel]:
    async def nodes() -> Iterable[Row]:
        return map(_of_node, await cluster.nodes())

    async def metrics() -> Iterable[Row]:
        rows = await cluster.nodes()
        return (Row(one.id, _encode(_busy(one)), one.name) for one in rows if one.usage.age_s is not None)

    right = Right("read", "nodes")
    return [
        Channel("nodes", "nodes that come, go or change", right, "/api/v1/nodes", nodes),
        Channel("metrics", "how busy each node is", right, "/api/v1/nodes", metrics, 2.0),
        Channel(
            "alerts", "what somebody should see to", right, "/api/v1/nodes", Alerts(cluster, wall).ask, 2.0
        ),
    ]


def _of_node(row: NodeRow) -> Row:
    told = msgspec.structs.replace(row, usage=NodeUsage())
    nameless = _encode(msgspec.structs.replace(told, models=())) if told.models else b""
    return Row(row.id, _encode(told), row.name, nameless=nameless)


def _busy(row: NodeRow) -> Busy:
    usage = row.usage
    return Busy(
        node=row.id,
        name=row.name,
        cpu_usage=usage.cpu,
        memory_usage=usage.memory,
        gpu_usage=usage.gpu,
        gpu_memory_usage=usage.gpu_memory,
        requests=usage.requests,
        queued=usage.queued,
        overload=usage.overload,
    )


# ── transfers ───────────────────────────────────────────────────────────────────────


def _of_transfers(moves: Moves) -> Channel:
    async def transfers() -> Iterable[Row]:
        rows = await moves.transfers()
        return (Row(one.id, _encode(one), one.model) for one in rows)

    return Channel(
        "transfers",
        "models on their way: bytes, rate, time left",
        Right("read", "transfers"),
        "/api/v1/transfers",
        transfers,
    )
