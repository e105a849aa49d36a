"""The cluster as people see it: rows and answers from the state. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import (
    ClusterAnswer,
    ConfigAnswer,
    LeaderAnswer,
    NodeRow,
    NodeUsage,
    TokenRow,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.tokens import TokenRecord
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.records import Config, EngineSummary, Lease

SERVERS_WANTED = 3
"""The least number of voters that survives the death of one."""


def node_row(
    node: NodeState, state: ClusterState, *, me: NodeId, leader: NodeId | None, usage: Utilization
) -> NodeRow:
    advert = node.advert
    voters = state.voters.nodes if state.voters else ()
    row = NodeRow(
        id=node.id,
        name=node.name,
        status=node.status,
        since=node.since,
        reason=_reason(node),
        voter=node.id in voters,
        leader=node.id == leader,
        this=node.id == me,
        usage=usage_row(usage),
        labels=node.labels,
        models=tuple(sorted(model.display for model in node.holdings.models)) if node.holdings else (),
    )
    if advert is None:
        return row
    hardware = advert.hardware
    return msgspec.structs.replace(
        row,
        role=advert.role,
        version=advert.version,
        started_at=advert.started_at,
        addresses=advert.hop,
        api=advert.api,
        cpus=hardware.cpus,
        cpu_model=hardware.cpu_model,
        memory_bytes=hardware.memory_bytes,
        gpus=tuple(gpu.name for gpu in hardware.gpus),
        system=hardware.system,
        engines=tuple(map(engine_text, advert.engines)),
    )


def usage_row(utilization: Utilization) -> NodeUsage:
    """In percent, to a tenth."""
    gpu, gpu_memory = utilization.gpu, utilization.gpu_memory
    return NodeUsage(
        cpu=_percent(utilization.cpu),
        memory=_percent(utilization.memory),
        gpu=None if gpu is None else _percent(gpu),
        gpu_memory=None if gpu_memory is None else _percent(gpu_memory),
        requests=utilization.requests,
        queued=utilization.queued,
        overload=utilization.overload,
        age_s=utilization.age_s,
    )


def _percent(share: float) -> float:
    return round(share * 100.0, 1)


def _reason(node: NodeState) -> str:
    """Of its status."""
    if node.status == "draining":
        return "an operator drains it" if node.drained or node.rest is None else node.rest.reason
    return node.member.reason if node.member else ""


def engine_text(engine: EngineSummary) -> str:
    """`llama.cpp b11549 (wheel, AVX2)`."""
    facts = ", ".join(filter(None, (engine.variant, engine.instruction_set, *engine.devices)))
    return f"{engine.name} {engine.version}".strip() + (f" ({facts})" if facts else "")


def leader_answer(state: ClusterState, lease: Lease | None, me: NodeId) -> LeaderAnswer:
    """`lease`: that of the leader, which the state may show later; None: nobody leads."""
    if lease is None:
        return LeaderAnswer(leader=None, epoch=state.lease.epoch if state.lease else 0)
    node = state.nodes.get(lease.node)
    return LeaderAnswer(
        leader=lease.node,
        name=node.name if node else lease.node,
        epoch=lease.epoch,
        since=lease.since,
        this=lease.node == me,
    )


def status_answer(
    state: ClusterState,
    *,
    cluster: str,
    me: NodeId,
    lease: Lease | None,
    writable: bool,
    alerts: Sequence[Alert],
    is_open: bool,
    listen: Sequence[str],
) -> ClusterAnswer:
    """`alerts`: what is wrong with the cluster, and with this node's part in it."""
    reasons = tuple(alert.message for alert in alerts)
    counts: Mapping[str, int] = {str(status): count for status, count in sorted(state.counts.items())}
    return ClusterAnswer(
        cluster=cluster,
        node=me,
        status="no_quorum" if not writable else "degraded" if reasons else "ok",
        reasons=reasons,
        leader=leader_answer(state, lease, me),
        voters=tuple(state.voters.nodes) if state.voters else (),
        nodes=counts,
        models=len(state.models),
        revision=state.revision,
        config_version=state.config.version,
        open=is_open,
        listen=tuple(listen),
    )


def config_answer(config: Config) -> ConfigAnswer:
    return ConfigAnswer(
        version=config.version, values=config.values, by=config.by, at=config.at, comment=config.comment
    )


def token_row(record: TokenRecord, now: float) -> TokenRow:
    state = "open"
    if record.revoked_at is not None:
        state = "revoked"
    elif record.uses_left <= 0:
        state = "used"
    elif now >= record.expires_at:
        state = "expired"
    return TokenRow(
        id=record.id,
        role=record.role,
        uses=record.uses,
        used=len(record.used),
        created_at=record.created_at,
        expires_at=record.expires_at,
        creator=record.creator,
        state=state,  # type: ignore[arg-type]  # one of the four
    )
