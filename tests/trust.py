"""A throw-away cluster: its keys, and nodes' certificates and logins, made in milliseconds."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.coordination.nats.session import Address
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.nats_access import NodeLogin, ServerAccess
from ollama_distributed.adapters.identity.tls import NodeTLS
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.identity import ca, nats_jwt
from ollama_distributed.cluster.identity.issuing import found, issue
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.wire import ClusterFacts, Credentials


class Trust:
    def __init__(self, folder: Path, cluster: str = "c1") -> None:
        self.folder = folder
        self.cluster = cluster
        self.keys = found(cluster, time.time(), secrets.token_bytes)
        self.facts = ClusterFacts(cluster=cluster)

    def issue(self, node: str, role: NodeRole = "server", *, life_s: float | None = None) -> Credentials:
        """Credentials as of now, saved in the node's files. `life_s`: of the NATS JWT."""
        files = self.files(node)
        keys = files.node_keys()
        now = time.time()
        request = ca.make_request(keys.tls)
        record = NodeRecord(
            node=NodeId(node),
            role=role,
            key_sha256=ca.public_key_sha256(ca.check_request(request)),
            nats_user=keys.nats.public,
            admitted_at=now,
        )
        given = issue(self.keys, self.facts, record, request, observed="127.0.0.1", now=now)
        if life_s is not None:
            jwt = nats_jwt.user_jwt(
                self.keys.nats, role, node, keys.nats.public, now, expires_at=now + life_s
            )
            given = Credentials(
                node=given.node,
                role=role,
                certificate=given.certificate,
                authorities=given.authorities,
                nats_jwt=jwt,
                facts=given.facts,
            )
        files.save(given)
        return given

    def files(self, node: str) -> IdentityFiles:
        return IdentityFiles(self.folder / f"identity-{node}")

    def tls(self, node: str) -> NodeTLS:
        files = self.files(node)
        if not files.certificate.exists():
            self.issue(node)
        return NodeTLS(files.certificate, files.key, files.authorities)

    def access(self, node: str) -> ServerAccess:
        """For a server of this name, with a certificate of that role."""
        tls = self.tls(node)
        return ServerAccess(self.files(node), tls, lambda: self.keys, cluster=self.cluster, node=node)

    def login(self, node: str, role: NodeRole = "server") -> NodeLogin:
        """As `node` logs in; the JWT is read from its files each time."""
        files = self.files(node)
        if files.credentials() is None:
            self.issue(node, role)

        def jwt() -> str:
            credentials = files.credentials()
            assert credentials is not None
            return credentials.nats_jwt

        return NodeLogin(self.tls(node), files.node_keys().nats, jwt, cluster=self.cluster)

    def address(self, *servers: NatsServer, node: str, role: NodeRole = "server") -> Address:
        return Address(urls=tuple(server.url for server in servers), login=self.login(node, role))

    def server(self, name: str) -> NatsServer:
        """Standalone, not started."""
        return NatsServer(self.folder / name, self.access(name), name=name)
