"""Members of a cluster for benches: certificates of one CA, and the product's own listener."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.handshake_server import App, ClusterListener
from ollama_distributed.adapters.identity.tls import NodeTLS, peer_of
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pieces import PieceExchange, open_door
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.adapters.sockets import listen
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.issuing import found, issue
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.wire import ClusterFacts
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.gateway.errors import status_of
from ollama_distributed.node.cluster.door import Door


def certify(folder: Path, names: Iterable[str]) -> None:
    """A fresh cluster's identity for each name, in a folder of that name."""
    now = time.time()
    keys, facts = found("bench", now, secrets.token_bytes), ClusterFacts(cluster="bench", servers=())
    for name in names:
        files = IdentityFiles(folder / name)
        own = files.node_keys()
        csr = ca.make_request(own.tls)
        record = NodeRecord(
            node=NodeId(name),
            role="server",
            key_sha256=ca.public_key_sha256(ca.check_request(csr)),
            nats_user=own.nats.public,
            admitted_at=now,
        )
        files.save(issue(keys, facts, record, csr, observed="127.0.0.1", now=now))


def tls_of(folder: Path, name: str) -> NodeTLS:
    files = IdentityFiles(folder / name)
    return NodeTLS(files.certificate, files.key, files.authorities)


async def opened(app: App, tls: NodeTLS, host: str, port: int) -> Door:
    """Listens; port 0: a free one."""
    listener = listen(host, port)
    listener.setblocking(False)
    door = Door(app, tls.server(client_required=False), listener)
    await door.open()
    return door


@asynccontextmanager
async def exchanging(
    folder: Path, me: str, addresses: Mapping[str, str], given: Shelves
) -> AsyncIterator[PieceExchange]:
    """A member that gives others what `given` has, and nothing else. `addresses`: host:port of
    each, its own among them."""
    tls, nothing = tls_of(folder, me), _NOTHING
    door = PeerDoor(NodeId(me), nothing, nothing, nothing, draining=lambda: False, status_of=status_of)
    pool = PeerPool(
        lambda other: (addresses[other],), tls, lambda connection, other: peer_of(connection, expected=other)
    )
    open_door(door, given, nothing)
    host, _, port = addresses[me].rpartition(":")
    app = ClusterListener(door, nothing, check_peer=lambda _: None, status_of=status_of)
    listener = await opened(app, tls, host, int(port))
    try:
        yield PieceExchange(pool)
    finally:
        await listener.close(0.0)
        await pool.close()


_NOTHING: Any = None
