"""How this cluster's identity meets NATS: who may connect to a server, and how a client logs in.

The server trusts the operator's key only; accounts are preloaded and kept in the resolver's
own folder, where a newer one (with revocations) outlives a restart. The preload is therefore
dated to the beginning of time: never newer than what a server was told later.

TLS comes before the first byte (`handshake_first`): a client that read a server's greeting
in clear text could be talked out of TLS and would hand its signature to whoever asked.

`ServerAccess`, `NodeLogin` and `SystemLogin` are what `adapters.coordination.nats` takes as
its `Access` and `Login`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.tls import NodeTLS
from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.names import bus_name
from ollama_distributed.cluster.identity.nkeys import NatsKey, make_key
from ollama_distributed.cluster.identity.wire import ClusterKeys

CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
"""A system user sends a new account JWT here; all servers of the cluster take it."""
TLS_DEADLINE_S = 5
SYNC = "5s"
"""Servers compare their accounts so often: one that was away while a user was revoked lets it in
no longer than that."""
PRELOAD_AT = 1.0
"""When the preloaded accounts say they were made."""
SYSTEM_LOGIN_S = 3600.0
"""A login of a server's administration; each connection asks for a fresh one."""
ROUTE_USER = "route"


class NodeLogin:
    """This node on the bus. The JWT and the TLS files are asked for at each connection, so
    renewed ones are used without a restart."""

    def __init__(self, tls: NodeTLS, key: NatsKey, jwt: Callable[[], str], *, cluster: str) -> None:
        self._tls = tls
        self._key = key
        self._jwt = jwt
        self.tls_hostname = bus_name(cluster)

    def tls(self) -> ssl.SSLContext:
        return self._tls.bus()

    def jwt(self) -> str:
        return self._jwt()

    def sign(self, nonce: bytes) -> bytes:
        return self._key.sign(nonce)


class SystemLogin(NodeLogin):
    """A server that administers NATS itself: health, account JWTs, members of the Raft group."""

    def __init__(
        self,
        tls: NodeTLS,
        keys: Callable[[], ClusterKeys],
        *,
        cluster: str,
        node: str,
        wall: Callable[[], float] = time.time,
    ) -> None:
        key = make_key("user", secrets.token_bytes(32))

        def jwt() -> str:
            now = wall()
            return nats_jwt.system_user_jwt(
                keys().nats, node, key.public, now, expires_at=now + SYSTEM_LOGIN_S
            )

        super().__init__(tls, key, jwt, cluster=cluster)


class ServerAccess:
    """What a NATS server of this cluster is configured with. For nodes of role `server`."""

    def __init__(
        self,
        files: IdentityFiles,
        tls: NodeTLS,
        keys: Callable[[], ClusterKeys],
        *,
        cluster: str,
        node: str,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self._keys = keys
        self._cluster = cluster
        self._system = SystemLogin(tls, keys, cluster=cluster, node=node, wall=wall)

    def entries(self, accounts: Path) -> dict[str, Any]:
        """The part of the configuration that clients meet; the same keys give the same text, so
        the server can read it again while it runs. `accounts`: the resolver's folder."""
        keys = self._keys()
        return access(
            keys,
            cluster=self._cluster,
            accounts=accounts,
            account=nats_jwt.account_jwt(keys.nats, PRELOAD_AT),
            now=PRELOAD_AT,
            certificate=self._files.certificate,
            key=self._files.key,
            authorities=self._files.authorities,
        )

    def routes(self) -> dict[str, Any]:
        """The `tls` and `authorization` blocks of routes.

        Any node has a certificate of the same CA; the password, which only servers can derive,
        keeps nodes from speaking as a server.
        """
        files = self._files
        return {
            "tls": tls(files.certificate, files.key, files.authorities),
            "authorization": {
                "user": ROUTE_USER,
                "password": route_password(self._keys()),
                "timeout": TLS_DEADLINE_S,
            },
        }

    def system(self) -> SystemLogin:
        return self._system


def access(
    keys: ClusterKeys,
    *,
    cluster: str,
    accounts: Path,
    account: str,
    now: float,
    certificate: Path,
    key: Path,
    authorities: Path,
) -> dict[str, Any]:
    """Entries for the server's configuration (JSON is a subset of its syntax).

    `accounts`: the resolver's folder. `account`: the application account's JWT as known now.
    """
    return {
        "operator": nats_jwt.operator_jwt(keys.nats, cluster, now),
        "system_account": keys.nats.system.public,
        "resolver": {"type": "full", "dir": str(accounts), "allow_delete": False, "interval": SYNC},
        "resolver_preload": {
            keys.nats.system.public: nats_jwt.system_account_jwt(keys.nats, now),
            keys.nats.application.public: account,
        },
        "tls": {**tls(certificate, key, authorities), "handshake_first": True},
    }


def tls(certificate: Path, key: Path, authorities: Path) -> dict[str, Any]:
    """A `tls` block: 1.3, both sides show a certificate of this cluster's CA."""
    return {
        "cert_file": str(certificate),
        "key_file": str(key),
        "ca_file": str(authorities),
        "verify": True,
        "min_version": "1.3",
        "timeout": TLS_DEADLINE_S,
    }


def route_password(keys: ClusterKeys) -> str:
    """Known to all servers and to nobody else: it follows from a key that only they have."""
    return hmac.new(keys.nats.operator.seed.encode(), b"nats routes", hashlib.sha256).hexdigest()
