"""The last that a node knew of its cluster, kept over a restart.

A node that starts while coordination is away goes on from it: it forwards requests to the
nodes that held a model, keeps the cluster's config, and keeps removed nodes out. Nothing is
decided by it; the first real state replaces it.

`DATA_DIR/cluster.state`, mode 0600. A file that cannot be read is as good as none.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import structlog

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.node.data_dir import write_bytes
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.keys import CONFIG, VOTERS

log = structlog.get_logger("cluster.memory")

FILE = "cluster.state"
UNREADABLE, NOT_KEPT = "memory.unreadable", "memory.not_kept"
KEPT = ("nodes.", "members.", "intents.", CONFIG, VOTERS)
"""Not the lease: who led then leads no more."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    records: tuple[tuple[str, bytes, int], ...] = ()
    """Key, value and revision."""
    roster: tuple[NodeRecord, ...] = ()


_decode = msgspec.msgpack.Decoder(Memory).decode


def remember(data_dir: Path, cluster: str, state: ClusterState, roster: tuple[NodeRecord, ...]) -> None:
    """Blocking. What cannot be written is logged: nothing depends on it."""
    records = tuple(
        (key, value, revision) for key, (value, revision) in state.raw.items() if key.startswith(KEPT)
    )
    kept = msgspec.msgpack.encode(Memory(cluster=cluster, records=records, roster=roster))
    try:
        write_bytes(data_dir / FILE, kept)
    except OllamaDistributedError as failure:
        log.warning(NOT_KEPT, reason=failure.message)


def recall(data_dir: Path, cluster: str) -> tuple[ClusterState, tuple[NodeRecord, ...]]:
    """What was kept of this cluster; empty where there is none. Blocking."""
    state = ClusterState()
    try:
        memory = _decode((data_dir / FILE).read_bytes())
    except FileNotFoundError:
        return state, ()
    except (OSError, msgspec.MsgspecError) as failure:
        log.warning(UNREADABLE, reason=str(failure))
        return state, ()
    if memory.cluster != cluster:
        return state, ()
    for key, value, revision in memory.records:
        state = apply(state, key, value, revision)
    return state, memory.roster
