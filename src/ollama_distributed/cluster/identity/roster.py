"""Who was admitted and who was removed, and what follows for a connection. Pure.

A node is known by the key that it was admitted with: removing it voids that key whatever
certificate goes with it, and to come back it needs a new key and a new token.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.identity.ca import BACKDATE_S, NODE_LIFETIME_S, Peer

NODES = "admission.nodes."
TOKENS = "admission.tokens."
"""Keys of the records in the replicated state; no node may write them, only servers."""

REVOKED_FOR_S = 2 * NODE_LIFETIME_S + BACKDATE_S
"""A revoked user stays listed so long: past it no JWT made for it can be valid, not even one
that a server with an old view made after the removal."""


class RevokedUser(msgspec.Struct, frozen=True):
    user: str
    """Public nkey."""
    at: float


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was admitted, for good: removed ones stay, so that their key stays void."""

    node: NodeId
    role: NodeRole
    key_sha256: str
    """Of the public key that it was admitted with."""
    nats_user: str
    hosts: tuple[str, ...] = ()
    """What its certificates may name beside the address it is seen at."""
    admitted_at: float
    token_id: str = ""
    removed_at: float | None = None
    revoked: tuple[RevokedUser, ...] = ()
    """NATS users of this node's earlier lives."""


def check_peer(peer: Peer, cluster: str, record: NodeRecord | None, now: float) -> None:
    """Whether a verified certificate may be used here, now.

    A node without a record here passes: it was admitted by a server, and the news of it is
    still under way. Called per connection and again as the roster changes.

    Raises:
        Forbidden: another cluster, removed, another key than was admitted, or expired since
            the connection began.
    """
    if peer.cluster != cluster:
        raise Forbidden("the other side belongs to another cluster")
    if now >= peer.expires_at:
        raise Forbidden(f"the certificate of node {peer.node} has expired")
    if record is None:
        return
    if record.removed_at is not None:
        raise Forbidden(f"node {peer.node} was removed from the cluster")
    if record.key_sha256 != peer.key_sha256:
        raise Forbidden(f"node {peer.node} was admitted with another key")


def removed(record: NodeRecord, now: float) -> NodeRecord:
    """The record once its node is removed. Idempotent."""
    if record.removed_at is not None:
        return record
    gone = RevokedUser(record.nats_user, now)
    kept = tuple(user for user in record.revoked if now < user.at + REVOKED_FOR_S)
    return msgspec.structs.replace(record, removed_at=now, revoked=(*kept, gone))


def revoked_users(records: Iterable[NodeRecord], now: float) -> dict[str, float]:
    """For the account's JWT: users to refuse, each with the time up to which its JWTs are void."""
    return {
        user.user: user.at + REVOKED_FOR_S
        for record in records
        for user in record.revoked
        if now < user.at + REVOKED_FOR_S
    }
