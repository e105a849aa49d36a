"""A cluster listener over a real socket, the clock set to now."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.limits import SOON_S
from tests.unit.identity.world import World
from uvicorn.config import Config
from uvicorn.server import ServerState

from ollama_distributed.adapters.identity.files import IdentityFiles, NodeKeys
from ollama_distributed.adapters.identity.handshake_server import ClusterListener
from ollama_distributed.adapters.identity.listener import PeerCertificates
from ollama_distributed.adapters.identity.tls import NodeTLS
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity import ca, nkeys
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.identity.issuing import issue
from ollama_distributed.cluster.identity.roster import NodeRecord, check_peer
from ollama_distributed.cluster.identity.tokens import Address
from ollama_distributed.cluster.identity.wire import ClusterFacts
from ollama_distributed.gateway.errors import status_of


def node_keys() -> NodeKeys:
    return NodeKeys(ca.make_key(), nkeys.make_key("user", secrets.token_bytes(32)))


async def who(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The inner app: says whom it sees."""
    peer: Peer = scope["state"]["peer"]
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", str(len(peer.node)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": peer.node.encode()})


class Seat:
    """The founding server of a cluster."""

    def __init__(self, folder: Path, cluster: str = "c1", role: str = "server") -> None:
        self.world = World(cluster, now=time.time())
        self.files = IdentityFiles(folder)
        self.removed: dict[NodeId, NodeRecord] = {}
        self.role = role
        self.renew()
        self.tls = NodeTLS(self.files.certificate, self.files.key, self.files.authorities)
        self.address = Address("127.0.0.1", 1)

    def renew(self) -> None:
        keys = self.files.node_keys()
        request = ca.make_request(keys.tls)
        record = NodeRecord(
            node=NodeId("n0"),
            role=self.role,  # type: ignore[arg-type]
            key_sha256=ca.public_key_sha256(ca.check_request(request)),
            nats_user=keys.nats.public,
            admitted_at=self.world.now,
        )
        self.files.save(
            issue(
                self.world.keys,
                self.world.facts,
                record,
                request,
                observed="127.0.0.1",
                now=self.world.now,
                joins=True,
            )
        )

    def check(self, peer: Peer) -> None:
        check_peer(peer, self.world.facts.cluster, self.removed.get(peer.node), self.world.now)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Address]:
        app = ClusterListener(who, self.world.admission, check_peer=self.check, status_of=status_of)
        async with listening(app, self.tls.server(client_required=False)) as self.address:
            self.world.facts = ClusterFacts(cluster=self.world.facts.cluster, servers=(self.address,))
            yield self.address


@asynccontextmanager
async def listening(app: Any, context: ssl.SSLContext) -> AsyncIterator[Address]:
    config = Config(app, http=PeerCertificates, log_config=None, access_log=False)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: PeerCertificates(config, state, {}), "127.0.0.1", 0, ssl=context
    )
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        async with asyncio.timeout(SOON_S):
            while state.connections or state.tasks:
                await asyncio.sleep(0.001)


async def call(address: Address, context: ssl.SSLContext, request: bytes) -> bytes:
    """Send bytes, read to the end. Nothing: the other side refused us, which in TLS 1.3 shows
    only after our own handshake is done."""
    async with asyncio.timeout(SOON_S):
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
        try:
            writer.write(request)
            return await reader.read()
        except (ssl.SSLError, ConnectionError):
            return b""
        finally:
            writer.transport.abort()


GET_WHO = b"GET /who HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
