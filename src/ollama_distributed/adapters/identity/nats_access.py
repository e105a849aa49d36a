"""The part of nats-server's configuration that says who may connect, and a client's side of it.

The server trusts the operator's key only; accounts are preloaded and kept in the resolver's
own folder, where a newer one (with revocations) outlives a restart with an older preload.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.nkeys import NatsKey
from ollama_distributed.cluster.identity.wire import ClusterKeys

CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
"""A system user sends a new account JWT here; all servers of the cluster take it."""
TLS_DEADLINE_S = 5


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
    verify_clients: bool = True,
) -> dict[str, Any]:
    """Entries for the server's configuration (JSON is a subset of its syntax).

    `accounts`: the resolver's folder. `account`: the application account's JWT as known now.
    """
    return {
        "operator": nats_jwt.operator_jwt(keys.nats, cluster, now),
        "system_account": keys.nats.system.public,
        "resolver": {"type": "full", "dir": str(accounts), "allow_delete": False, "interval": "2m"},
        "resolver_preload": {
            keys.nats.system.public: nats_jwt.system_account_jwt(keys.nats, now),
            keys.nats.application.public: account,
        },
        "tls": tls(certificate, key, authorities, verify=verify_clients),
    }


def tls(certificate: Path, key: Path, authorities: Path, *, verify: bool = True) -> dict[str, Any]:
    """The `tls` block of clients, and of routes (there `verify` must stay on)."""
    return {
        "cert_file": str(certificate),
        "key_file": str(key),
        "ca_file": str(authorities),
        "verify": verify,
        "min_version": "1.3",
        "timeout": TLS_DEADLINE_S,
    }


def client_options(key: NatsKey, jwt: Callable[[], str], node: str) -> dict[str, Any]:
    """Arguments of `nats.connect` that make the client this node. `jwt` is asked at each
    reconnection, so a renewed one is used without a restart."""
    return {
        "user_jwt_cb": lambda: bytearray(jwt().encode()),
        "signature_cb": lambda nonce: base64.b64encode(key.sign(nonce.encode())),
        "inbox_prefix": f"_INBOX_{node}".encode(),
        "name": node,
    }
