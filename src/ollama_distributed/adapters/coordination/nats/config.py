"""What nats-server is started with: typed settings in, its configuration file out. Pure.

Standalone only: without a `cluster` block there is no election and a write costs one fsync.
Two accounts: the application's, which holds the state, and the server's own, over which the
node asks for health (no HTTP monitoring port, which would answer anyone).
"""

from __future__ import annotations

import json

import msgspec

APP, SYSTEM = "app", "system"
"""Users, and the accounts of that name in upper case."""
MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_STORE_BYTES = 8 * 1024**3
"""A ceiling, not a reservation; 10,000 nodes with 100 models each need 0.4 GiB."""
MAX_MEMORY_BYTES = 64 * 1024**2
"""For JetStream's memory streams; ours are all on disk."""
LOG_BYTES = 8 * 1024 * 1024
LOGS_KEPT = 3


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    folder: str
    """Store, log and ports file live here."""
    app_password: str
    system_password: str
    host: str = "127.0.0.1"
    port: int = -1
    """-1: any free one."""
    ping_interval_s: int = 1
    ping_max: int = 2
    """A client that hangs is gone after 2.7 s (measured)."""


def render(config: ServerConfig) -> str:
    """The file's text. JSON is a subset of its syntax, so nothing needs quoting by hand."""
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
        "accounts": {
            APP.upper(): {"jetstream": "enabled", "users": [{"user": APP, "password": config.app_password}]},
            SYSTEM.upper(): {"users": [{"user": SYSTEM, "password": config.system_password}]},
        },
        "system_account": SYSTEM.upper(),
    }
    return json.dumps(document, indent=2) + "\n"
