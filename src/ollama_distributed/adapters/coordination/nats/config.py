"""What nats-server is started with: typed settings in, its configuration file out. Pure.

Without a `cluster` block there is no election and a write costs one fsync: one server, or
none of the trouble of several. Who may connect comes from outside (`Access`): TLS with a
certificate on both sides, and a JWT for every user. The server's own account, over which the
node asks for health, takes the place of an HTTP monitoring port, which would answer anyone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_STORE_BYTES = 8 * 1024**3
"""A ceiling, not a reservation; 10,000 nodes with 100 models each need 0.4 GiB."""
MAX_MEMORY_BYTES = 64 * 1024**2
"""For JetStream's memory streams; ours are all on disk."""
LOG_BYTES = 8 * 1024 * 1024
LOGS_KEPT = 3


class ClusterBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A server's place among the others."""

    name: str
    """The cluster's; the same on all."""
    port: int
    """Of its route listener; never 0, since the others are told beforehand."""
    host: str = "0.0.0.0"  # noqa: S104  # nobody gets in without a certificate and the password
    routes: tuple[str, ...] = ()
    """`host:port` of all servers' route listeners, its own too. The host must be in the
    certificate of the server there."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """Unique in the cluster: the node's id."""
    folder: str
    """Store, log and ports file live here."""
    host: str = "127.0.0.1"
    port: int = -1
    """-1: any free one."""
    cluster: ClusterBlock | None = None
    ping_interval_s: int = 1
    ping_max: int = 2
    """A client that hangs is gone after 2.7 s (measured)."""


def render(config: ServerConfig, access: Mapping[str, Any], routes: Mapping[str, Any]) -> str:
    """The file's text. JSON is a subset of its syntax, so nothing needs quoting by hand.

    `access`: entries for clients (operator, accounts, TLS). `routes`: the `tls` and
    `authorization` blocks of routes.
    """
    document = {
        "server_name": config.name,
        "host": config.host,
        "port": config.port,
        "ports_file_dir": config.folder,
        "log_file": f"{config.folder}/nats-server.log",
        "logfile_size_limit": LOG_BYTES,
        "logfile_max_num": LOGS_KEPT,
        "max_payload": MAX_PAYLOAD_BYTES,
        "ping_interval": f"{config.ping_interval_s}s",
        "ping_max": config.ping_max,
        "jetstream": {
            "store_dir": f"{config.folder}/store",
            # The default, 2 minutes, lost every acknowledged write in a power cut (M9).
            "sync_interval": "always",
            "max_memory_store": MAX_MEMORY_BYTES,
            "max_file_store": MAX_STORE_BYTES,
        },
        **access,
    }
    if config.cluster is not None:
        document["cluster"] = _cluster(config.cluster, routes)
    return json.dumps(document, indent=2) + "\n"


def _cluster(block: ClusterBlock, routes: Mapping[str, Any]) -> dict[str, Any]:
    login = routes["authorization"]
    return {
        "name": block.name,
        "host": block.host,
        "port": block.port,
        "routes": [f"nats://{login['user']}:{login['password']}@{route}" for route in block.routes],
        # Clients are told of servers through the cluster's state: advertised addresses would be
        # those of every interface.
        "no_advertise": True,
        **routes,
    }
