"""What somebody should see to in the cluster, each a sentence with what to do. Pure.

`cluster status` gives them as its reasons; the channel `alerts` tells them, and what nodes say of
themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from ollama_distributed.base.alerts import Alert, Level, clipped
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.records import Lease


def of_state(state: ClusterState, lease: Lease | None) -> list[Alert]:
    """`lease`: that of the leader; None: nobody leads."""
    found: list[Alert] = []
    if lease is None:
        found.append(
            Alert(
                level="error",
                code="no_leader",
                message="there is no leader now: changes are refused until one is elected, inference goes "
                "on; if this lasts, see which servers run: ollama-distributed node list",
            )
        )
    voters = frozenset(state.voters.nodes if state.voters else ())
    names = Counter(node.name for node in state.nodes.values())
    for node in state.nodes.values():
        # A machine that joined anew has its old name.
        known = node.name if names[node.name] == 1 else node.id
        found += _of_node(node, known, voter=node.id in voters)
    for key, why_not in state.rejected.items():
        text = f"{key} was written by a newer version and is not understood here: {why_not}"
        found.append(Alert(level="warning", code="record_unreadable", subject=key, message=text))
    return found


def _of_node(node: NodeState, known: str, *, voter: bool) -> list[Alert]:
    why = f" ({node.member.reason})" if node.member and node.member.reason else ""
    if node.status == "offline" and voter:
        code, text = (
            "voter_offline",
            f"voter {node.name} is offline{why}; start it again, or replace it: "
            f"ollama-distributed cluster voter replace {known}",
        )
    elif node.status == "offline":
        code, text = (
            "node_offline",
            f"node {node.name} is offline{why}; start it again, or remove it: "
            f"ollama-distributed node remove {known}",
        )
    elif node.status == "suspect":
        code, text = (
            "node_suspect",
            f"node {node.name} missed heartbeats{why}; its network or machine may be overloaded",
        )
    else:
        return []
    level: Level = "warning" if node.status == "suspect" else "error"
    return [Alert(level=level, code=code, message=text, node=node.id, name=node.name, since=node.since)]


def of_clock(own: Peer, now: float) -> list[Alert]:
    """What keeps a machine out whose clock was never set: `own` certificate holds for a day."""
    if own.begins_at <= now <= own.expires_at:
        return []
    text = (
        f"by this machine's clock it is {_utc(now)}, and its certificate holds from {_utc(own.begins_at)} to "
        f"{_utc(own.expires_at)}: set the clock if it is wrong; if it is right, the certificate is renewed "
        "as soon as a server can be reached"
    )
    return [Alert(level="error", code="clock_wrong", message=text)]


def of_link(trouble: str, *, up: bool) -> list[Alert]:
    """`trouble`: why coordination is not up."""
    if trouble:
        return [Alert(level="error", code="coordination_down", message=trouble)]
    if up:
        return []
    return [Alert(level="info", code="starting", message="coordination is still being started")]


def of_front(trouble: str) -> list[Alert]:
    return [Alert(level="error", code="listener_closed", message=trouble)] if trouble else []


def of_damage(lost: Sequence[NodeId], state: ClusterState) -> list[Alert]:
    """`lost`: voters whose coordination server holds less than those of the others."""
    found: list[Alert] = []
    for node in lost:
        name = state.nodes[node].name if node in state.nodes else node
        text = (
            f"the coordination server of {name} lost records (damaged files, a failing disk?): take it out "
            "and in again, on that machine: ollama-distributed cluster leave, then join"
        )
        found.append(Alert(level="error", code="records_lost", subject=node, message=text))
    return found


def of_nodes(told: Mapping[NodeId, Iterable[Alert]], state: ClusterState) -> list[Alert]:
    """What nodes say of themselves: of who is a member and lives."""
    found: list[Alert] = []
    for node, alerts in told.items():
        known = state.nodes.get(node)
        if known is not None and known.alive:
            found += [
                msgspec.structs.replace(one, node=node, name=known.name, message=clipped(one.message))
                for one in alerts
            ]
    return found


def each_once(alerts: Iterable[Alert]) -> list[Alert]:
    """Several nodes may see the same. The first counts."""
    by_text: dict[tuple[str, str], Alert] = {}
    for alert in alerts:
        by_text.setdefault((alert.code, alert.message), alert)
    return list({alert.id: alert for alert in by_text.values()}.values())


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
