"""What the API says of the cluster: the answers of `/api/v1/cluster`, `/nodes` and `/config`.

Shared by the gateway, which writes it, and the SDK, which reads it. Fields are added with
defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.ids import NodeRole

NodeStatus = Literal["joining", "online", "suspect", "offline", "draining"]


class NodeUsage(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a node is: shares in percent, 0 to 100."""

    cpu: float = 0.0
    """Percent (0..100) of all its cores."""
    memory: float = 0.0
    """Percent of its memory."""
    gpu: float | None = None
    """Percent, the mean of its GPUs; None: it has none."""
    gpu_memory: float | None = None
    """Percent of all of theirs."""
    requests: int = 0
    """Answers that run now."""
    queued: int = 0
    overload: str = ""
    """What it gives up since its own memory is short: closing, refusing, dropping; empty: nothing."""
    age_s: float | None = None
    """How old these figures are; None: there are none."""


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One node, as `GET /api/v1/nodes` shows it under its id."""

    id: str
    name: str
    status: NodeStatus
    since: float
    """When the status began, seconds since the Unix epoch."""
    reason: str = ""
    role: NodeRole = "node"
    voter: bool = False
    leader: bool = False
    this: bool = False
    """The node that answers."""
    version: str = ""
    started_at: float = 0.0
    addresses: tuple[str, ...] = ()
    api: tuple[str, ...] = ()
    usage: NodeUsage = NodeUsage()
    cpus: int = 0
    cpu_model: str = ""
    memory_bytes: int = 0
    gpus: tuple[str, ...] = ()
    system: str = ""
    engines: tuple[str, ...] = ()
    """`llama.cpp b11549 (wheel, AVX2)`."""
    labels: Mapping[str, str] = {}
    models: tuple[str, ...] = ()
    """Short names, sorted."""


class NodesAnswer(msgspec.Struct, frozen=True):
    nodes: Mapping[str, NodeRow]


class LeaderAnswer(msgspec.Struct, frozen=True, kw_only=True):
    leader: str | None
    """Id; None: there is none now."""
    name: str = ""
    epoch: int = 0
    since: float = 0.0
    this: bool = False


class ClusterAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/cluster/status`."""

    cluster: str
    """Id."""
    node: str
    """The node that answers."""
    status: Literal["ok", "degraded", "no_quorum"]
    """degraded: a node or a voter is not online; no_quorum: writes are refused now."""
    reasons: tuple[str, ...] = ()
    """Why it is not ok, each a sentence with what to do."""
    alerts: tuple[Alert, ...] = ()
    """What somebody should see to: the reasons, and what nodes say of themselves (a full disk)."""
    leader: LeaderAnswer
    voters: tuple[str, ...] = ()
    nodes: Mapping[str, int] = {}
    """How many nodes there are of each status."""
    models: int = 0
    revision: int = 0
    """Of the state that this answer was made from."""
    config_version: int = 0
    open: bool = False
    """Other machines can reach the cluster's listeners."""
    listen: tuple[str, ...] = ()
    """Of this node's cluster listeners."""


def join_command(token: str) -> str:
    """What to type. The program overwrites the token in the list of processes."""
    return f"ollama-distributed join {token}"


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/v1/cluster/tokens`: the only answer that ever shows the token."""

    token: str
    id: str
    role: NodeRole
    uses: int
    expires_at: float
    command: str
    """What to type on the other machine."""


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    role: NodeRole
    uses: int
    used: int
    created_at: float
    expires_at: float
    creator: str = ""
    state: Literal["open", "used", "expired", "revoked"] = "open"


class TokensAnswer(msgspec.Struct, frozen=True):
    tokens: tuple[TokenRow, ...]


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: NodeRole | None = None
    """None: `server` until the cluster has three servers, then `node`."""
    uses: int = 1
    ttl_s: float = 600.0
    hosts: tuple[str, ...] = ()


class JoinAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/cluster/join` to a node that is alone."""

    token: str


class VoterAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/cluster/voters/replace`."""

    dead: str
    new: str | None = None
    """None: the best living server that has no vote."""


class LeaveAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: bool = False


class LabelAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PATCH /api/v1/nodes/{id}`: None takes a label away."""

    labels: Mapping[str, str | None]


class ConfigAnswer(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    values: Mapping[str, Any]
    """What the cluster says; what is not here is each node's own setting."""
    by: str = ""
    at: float = 0.0
    comment: str = ""


class ConfigHistory(msgspec.Struct, frozen=True):
    versions: tuple[ConfigAnswer, ...]
    """Newest first."""


class ConfigAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /api/v1/config`: names with new values; null takes a name out of the cluster's config."""

    values: Mapping[str, Any]
    version: int | None = None
    """Refused with 409 unless the config still stands at this version. None: whatever it is."""
    comment: str = ""


class RollbackAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    comment: str = ""
