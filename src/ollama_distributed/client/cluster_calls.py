"""The calls of `client.cluster`, `client.nodes` and `client.config` as data.

Pure. Their answers are the structs of `base/cluster.py`, which the server writes too. A change
that means the same when it is sent twice may be repeated; one that makes something new may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from ollama_distributed.base import cluster as wire
from ollama_distributed.base.ids import NodeRole
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import InvalidName

_decode_status = decoder_of(wire.ClusterAnswer)
_decode_leader = decoder_of(wire.LeaderAnswer)
_decode_token = decoder_of(wire.NewToken)
_decode_tokens = decoder_of(wire.TokensAnswer)
_decode_nodes = decoder_of(wire.NodesAnswer)
_decode_node = decoder_of(wire.NodeRow)
_decode_config = decoder_of(wire.ConfigAnswer)
_decode_history = decoder_of(wire.ConfigHistory)
_encode = msgspec.json.Encoder().encode


def _nothing(_: bytes) -> None:
    return None


# ── cluster ─────────────────────────────────────────────────────────────────────────


def status() -> Call[wire.ClusterAnswer]:
    """How the cluster is, as the node that is asked sees it."""
    return Call(method="GET", path="/api/v1/cluster/status", decode=_decode_status, repeat="always")


def leader() -> Call[wire.LeaderAnswer]:
    """Who leads; `leader` is None while nobody does."""
    return Call(method="GET", path="/api/v1/cluster/leader", decode=_decode_leader, repeat="always")


def create_token(
    *, role: NodeRole | None = None, uses: int = 1, ttl_s: float = 600.0, hosts: Sequence[str] = ()
) -> Call[wire.NewToken]:
    """A token with which `uses` machines may join within `ttl_s` seconds.

    `role` None: `server` until the cluster has three, then `node`. `hosts`: names and addresses
    that the new machines' certificates may carry. Only this answer shows the token.
    """
    ask = wire.TokenRequest(role=role, uses=uses, ttl_s=ttl_s, hosts=tuple(hosts))
    return Call(method="POST", path="/api/v1/cluster/tokens", body=_encode(ask), decode=_decode_token)


def tokens() -> Call[tuple[wire.TokenRow, ...]]:
    """The join tokens that were made, without their secrets."""
    return Call(
        method="GET",
        path="/api/v1/cluster/tokens",
        decode=lambda body: _decode_tokens(body).tokens,
        repeat="always",
    )


def revoke_token(token_id: str) -> Call[None]:
    """Nobody can join with it any more."""
    return Call(
        method="DELETE", path=named_path("/api/v1/cluster/tokens/", token_id, "a token's id"), decode=_nothing
    )


def join(token: str) -> Call[wire.ClusterAnswer]:
    """Make the node that is asked, alone until now, a member of the token's cluster."""
    ask = wire.JoinAsk(token=token)
    return Call(method="POST", path="/api/v1/cluster/join", body=_encode(ask), decode=_decode_status)


def leave(*, force: bool = False) -> Call[None]:
    """Take the node that is asked out of its cluster; it is alone again."""
    ask = wire.LeaveAsk(force=force)
    return Call(method="POST", path="/api/v1/cluster/leave", body=_encode(ask), decode=_nothing)


def replace_voter(dead: str, new: str | None = None) -> Call[wire.ClusterAnswer]:
    """Take a dead voter out and a living server in (None: the best one)."""
    ask = wire.VoterAsk(dead=dead, new=new)
    return Call(
        method="POST", path="/api/v1/cluster/voters/replace", body=_encode(ask), decode=_decode_status
    )


# ── nodes ───────────────────────────────────────────────────────────────────────────


def list_nodes() -> Call[list[wire.NodeRow]]:
    """All nodes, sorted by name."""
    return Call(
        method="GET",
        path="/api/v1/nodes",
        decode=lambda body: [*_decode_nodes(body).nodes.values()],
        repeat="always",
    )


def get_node(node: str) -> Call[wire.NodeRow]:
    """One node, by its id or its name."""
    return Call(method="GET", path=node_path(node), decode=_decode_node, repeat="always")


def drain(node: str) -> Call[wire.NodeRow]:
    """Give the node no new work; what runs there ends."""
    return Call(method="POST", path=node_path(node) + "/drain", decode=_decode_node, repeat="always")


def undrain(node: str) -> Call[wire.NodeRow]:
    """Give the node work again."""
    return Call(method="POST", path=node_path(node) + "/undrain", decode=_decode_node, repeat="always")


def label(node: str, labels: Mapping[str, str | None]) -> Call[wire.NodeRow]:
    """Set labels; None takes one away."""
    ask = wire.LabelAsk(labels=labels)
    return Call(method="PATCH", path=node_path(node), body=_encode(ask), decode=_decode_node, repeat="always")


def remove(node: str, *, force: bool = False) -> Call[None]:
    """Revoke the node's identity everywhere. One that is online: only with `force`."""
    path = node_path(node) + ("?force=true" if force else "")
    return Call(method="DELETE", path=path, decode=_nothing)


# ── configuration ───────────────────────────────────────────────────────────────────


def get_config() -> Call[wire.ConfigAnswer]:
    """The settings that hold in the whole cluster."""
    return Call(method="GET", path="/api/v1/config", decode=_decode_config, repeat="always")


def set_config(
    values: Mapping[str, Any], *, version: int | None = None, comment: str = ""
) -> Call[wire.ConfigAnswer]:
    """Change settings on all nodes; None takes one out of the cluster's configuration.

    `version`: `Conflict` is raised unless the configuration still stands at it.
    """
    ask = wire.ConfigAsk(values=values, version=version, comment=comment)
    return Call(method="PUT", path="/api/v1/config", body=_encode(ask), decode=_decode_config)


def config_history() -> Call[tuple[wire.ConfigAnswer, ...]]:
    """Every version, newest first."""
    return Call(
        method="GET",
        path="/api/v1/config/history",
        decode=lambda body: _decode_history(body).versions,
        repeat="always",
    )


def rollback_config(version: int, *, comment: str = "") -> Call[wire.ConfigAnswer]:
    """Make a new version that holds what `version` held."""
    ask = wire.RollbackAsk(version=version, comment=comment)
    return Call(method="POST", path="/api/v1/config/rollback", body=_encode(ask), decode=_decode_config)


def watch_config() -> Call[wire.ConfigAnswer]:
    """The configuration now, then each new version, until the loop is left.

    Raises `ConnectionLost` when the server goes away; what happens meanwhile is in the first
    event of the next watch.
    """
    return Call(
        method="GET",
        path="/api/v1/config/watch",
        decode=_decode_config,
        repeat="always",
        done=lambda _: False,
        events=True,
    )


def node_path(node: str) -> str:
    return named_path("/api/v1/nodes/", node, "a node's id or name")


def named_path(path: str, name: str, what: str) -> str:
    if not name or name in (".", "..") or "/" in name:
        raise InvalidName(f"{name!r} is not {what}")
    return path + quote(name, safe="")
