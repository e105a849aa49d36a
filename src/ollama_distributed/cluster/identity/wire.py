"""What a joiner and the cluster say to each other, as JSON. Fields are added with defaults only."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.ids import NodeRole
from ollama_distributed.cluster.identity.nats_jwt import NatsKeys
from ollama_distributed.cluster.identity.roll import Authorities
from ollama_distributed.cluster.identity.tokens import Address

JOIN_PATH = "/cluster/v1/join"
"""The one path of the cluster's listener that needs no client certificate: GET gives the CA,
POST asks to be admitted or renewed."""
MAX_REQUEST_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 256 * 1024
"""CA bundle, certificate, JWT and addresses take some 10 KiB."""


class CAAnswer(msgspec.Struct, frozen=True):
    """To GET: the trusted CA certificates (PEM), for comparison with the token's hash."""

    authorities: tuple[str, ...]


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, tag="join", forbid_unknown_fields=True):
    token_id: str
    secret: str
    role: NodeRole
    node: str
    csr: str
    """PEM; its key is the node's from now on."""
    nats_user: str
    """Public nkey; the seed never leaves the node."""

    def __repr__(self) -> str:
        return f"JoinRequest({self.node}, token {self.token_id})"


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True, tag="renew", forbid_unknown_fields=True):
    """From a known node: a request signed with the key that it was admitted with. Needs no
    valid certificate, so a node that was off for a week comes back."""

    node: str
    csr: str


class ClusterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cluster is found."""

    cluster: str
    servers: tuple[Address, ...] = ()
    """Cluster listeners that admit and renew."""
    nats: tuple[str, ...] = ()
    """URLs for NATS clients, each verifying under its server's DNS name."""


class ClusterKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a server one: it can admit others when the first machine is gone."""

    authorities: Authorities
    nats: NatsKeys

    def __repr__(self) -> str:
        return "ClusterKeys(…)"


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a node gets and keeps."""

    node: str
    role: NodeRole
    certificate: str
    authorities: tuple[str, ...]
    """CA certificates (PEM) to trust, the signing one first."""
    nats_jwt: str
    facts: ClusterFacts
    keys: ClusterKeys | None = None
    """To a joining server only, never with a renewal."""


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: str
    code: str
