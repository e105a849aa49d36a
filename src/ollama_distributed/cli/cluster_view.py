"""How the cluster and its nodes look to a person. Pure: structs and the time in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ollama_distributed.cli import humanize, tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import ClusterAnswer, LeaderAnswer, NodeRow, TokenRow
    from ollama_distributed.base.ids import NodeRole

ROLES: Mapping[NodeRole, str] = {
    "server": "may vote, admits other machines, and keeps the cluster's keys",
    "node": "runs models and answers requests; it has no vote and admits nobody",
}
"""What a role means, for whoever hands out a token."""
STALE_S = 10.0
"""Figures of usage that are older are shown as old: nodes send theirs every few seconds."""

_STATUS = {
    "joining": tables.CYAN,
    "online": tables.GREEN,
    "suspect": tables.YELLOW,
    "offline": tables.RED,
    "draining": tables.MAGENTA,
}
_CLUSTER = {"ok": tables.GREEN, "degraded": tables.YELLOW, "no_quorum": tables.RED}
_LEVEL = {"error": tables.RED, "warning": tables.YELLOW, "info": tables.CYAN}
_TOKEN = {"open": tables.GREEN, "used": tables.DIM, "expired": tables.DIM, "revoked": tables.RED}
_ID_LENGTH = 12


# ── nodes ───────────────────────────────────────────────────────────────────────────


def nodes_text(rows: Sequence[NodeRow], now: float, look: Look) -> str:
    columns = [
        Column(
            "NAME", [Cell(row.name + (" *" if row.this and look.bars else ""), tables.BOLD) for row in rows]
        ),
        Column("STATUS", [status_cell(row, now, look) for row in rows]),
        Column("ROLE", [role_cell(row, look) for row in rows]),
        Column("CPU", [_used(row, row.usage.cpu, look) for row in rows], 1),
        Column("MEMORY", [_used(row, row.usage.memory, look) for row in rows], 2),
        Column("REQUESTS", [_requests(row) for row in rows], 3),
        Column("MODELS", [Cell(str(len(row.models))) for row in rows], 4),
        Column("VERSION", [Cell(row.version) for row in rows], 6),
        Column("ID", [Cell(row.id[:_ID_LENGTH], tables.DIM) for row in rows], 5),
    ]
    if any(row.usage.gpu is not None for row in rows):
        columns.insert(5, Column("GPU", [_used(row, row.usage.gpu, look) for row in rows], 2))
    text = tables.table(columns, look)
    text += "".join(
        tables.note("", f"{row.name}: {row.reason}", _STATUS[row.status], look)
        for row in rows
        if row.reason and row.status in ("suspect", "offline", "draining")
    )
    if look.bars:
        text += tables.painted("★ leads   * answered this", tables.DIM, look) + "\n"
    return text


def status_cell(row: NodeRow, now: float, look: Look) -> Cell:
    dot = "● " if look.bars else ""
    return Cell(f"{dot}{row.status} {humanize.age(now - row.since)}", _STATUS[row.status])


def role_cell(row: NodeRow, look: Look) -> Cell:
    role = "voter" if row.voter else row.role
    if not row.leader:
        return Cell(role)
    return Cell(f"{role} ★" if look.bars else f"{role},leader", tables.BOLD)


def _used(row: NodeRow, percent: float | None, look: Look) -> Cell:
    age_s = row.usage.age_s
    if percent is None or age_s is None or row.status == "offline":
        return tables.share(None, look)
    return tables.share(percent / 100.0, look, stale=age_s > STALE_S)


def _requests(row: NodeRow) -> Cell:
    if row.usage.age_s is None or row.status == "offline":
        return Cell("-", tables.DIM)
    waiting = f" +{row.usage.queued} queued" if row.usage.queued else ""
    return Cell(f"{row.usage.requests}{waiting}")


def node_line(row: NodeRow) -> list[str]:
    """What of a node is worth a line of its own when it changes."""
    role = role_cell(row, Look()).text
    labels = ",".join(f"{name}={value}" for name, value in sorted(row.labels.items()))
    return [row.status, role, row.version, labels, row.reason]


def node_text(row: NodeRow, now: float, look: Look) -> str:
    """All about one node."""
    usage = row.usage
    seen = f"{humanize.age(usage.age_s)} ago" if usage.age_s is not None and usage.age_s > STALE_S else ""
    gpu = [usage.gpu, usage.gpu_memory]
    role = ", ".join(filter(None, (row.role, "voter" if row.voter else "", "leader" if row.leader else "")))
    facts = [
        ("Name", Cell(row.name, tables.BOLD)),
        ("Id", Cell(row.id)),
        ("Status", status_cell(row, now, look)),
        ("Reason", Cell(row.reason)),
        ("Role", Cell(role)),
        ("Version", Cell(row.version)),
        ("Started", Cell(f"{humanize.age(now - row.started_at)} ago" if row.started_at else "")),
        ("API", Cell(", ".join(row.api))),
        ("Cluster address", Cell(", ".join(row.addresses))),
        ("System", Cell(row.system)),
        ("CPU", Cell(f"{row.cpus} cores, {row.cpu_model}".rstrip(", ") if row.cpus else "")),
        ("Memory", Cell(humanize.memory(row.memory_bytes) if row.memory_bytes else "")),
        ("GPUs", Cell("; ".join(row.gpus))),
        ("CPU used", _used(row, usage.cpu, look)),
        ("Memory used", _used(row, usage.memory, look)),
        *(
            (title, _used(row, value, look))
            for title, value in zip(("GPU used", "GPU memory used"), gpu, strict=True)
            if value is not None
        ),
        ("Requests", _requests(row)),
        ("Last heard", Cell(seen, tables.YELLOW)),
        ("Engines", Cell("; ".join(row.engines))),
        ("Labels", Cell(", ".join(f"{name}={value}" for name, value in sorted(row.labels.items())))),
        ("Models", Cell(", ".join(row.models))),
    ]
    return tables.facts(facts, look)


# ── the cluster ─────────────────────────────────────────────────────────────────────


def cluster_text(answer: ClusterAnswer, rows: Sequence[NodeRow], now: float, look: Look) -> str:
    nodes = ", ".join(f"{count} {status}" for status, count in sorted(answer.nodes.items()) if count)
    closed = "not yet: the first `cluster token create` opens it"
    facts = [
        ("Cluster", Cell(answer.cluster, tables.BOLD)),
        ("Status", Cell(answer.status.replace("_", " "), _CLUSTER[answer.status])),
        ("Leader", leader_cell(answer.leader, now)),
        ("Voters", Cell(voters(answer, rows))),
        ("Nodes", Cell(nodes)),
        ("Models", Cell(str(answer.models))),
        ("Config", Cell(f"version {answer.config_version}" if answer.config_version else "each node's own")),
        ("Open to others", Cell(", ".join(answer.listen) or "yes" if answer.open else closed)),
    ]
    text = tables.facts(facts, look)
    mark = "▲ " if look.bars else "- "
    text += "".join(tables.note(mark, told, colour, look) for told, colour in _to_see_to(answer))
    return text + "\n" + nodes_text(rows, now, look)


def _to_see_to(answer: ClusterAnswer) -> list[tuple[str, str]]:
    """What, and its colour. A node of an older version tells reasons only."""
    if not answer.alerts:
        return [(reason, _CLUSTER[answer.status]) for reason in answer.reasons]
    return [(alert.message, _LEVEL[alert.level]) for alert in answer.alerts]


def voters(answer: ClusterAnswer, rows: Sequence[NodeRow]) -> str:
    names = {row.id: row.name for row in rows}
    return ", ".join(sorted(names.get(voter, voter) for voter in answer.voters))


def leader_cell(leader: LeaderAnswer, now: float) -> Cell:
    if leader.leader is None:
        return Cell("none now: changes wait until one is elected", tables.RED)
    return Cell(
        f"{leader.name or leader.leader}, for {humanize.age(now - leader.since)} (term {leader.epoch})"
    )


def cluster_lines(answer: ClusterAnswer, rows: Sequence[NodeRow]) -> dict[str, Sequence[str]]:
    """For a watch into a pipe."""
    leader = answer.leader.name or answer.leader.leader or "none"
    cluster = [
        answer.status,
        f"leader={leader}",
        f"term={answer.leader.epoch}",
        *(told for told, _ in _to_see_to(answer)),
    ]
    return {"cluster": cluster, **{row.name: node_line(row) for row in rows}}


# ── tokens ──────────────────────────────────────────────────────────────────────────


def tokens_text(rows: Sequence[TokenRow], now: float, look: Look) -> str:
    columns = [
        Column("ID", [Cell(row.id, tables.BOLD) for row in rows]),
        Column("STATE", [Cell(row.state, _TOKEN[row.state]) for row in rows]),
        Column("ROLE", [Cell(row.role) for row in rows]),
        Column("USED", [Cell(f"{row.used}/{row.uses}") for row in rows]),
        Column("EXPIRES", [_expires(row, now) for row in rows], 1),
        Column("CREATED", [Cell(f"{humanize.age(now - row.created_at)} ago") for row in rows], 3),
        Column("BY", [Cell(row.creator, tables.DIM) for row in rows], 2),
    ]
    return tables.table(columns, look)


def _expires(row: TokenRow, now: float) -> Cell:
    left = row.expires_at - now
    if row.state != "open" or left <= 0:
        return Cell("-", tables.DIM)
    return Cell(f"in {humanize.age(left + 0.5)}")
