"""The cluster's listener: one TLS port for joiners and for other nodes' requests.

Its connections are known by the node behind them, so that those of a removed node can be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import structlog
from uvicorn.config import Config
from uvicorn.server import ServerState

from ollama_distributed.adapters.identity.handshake_server import App
from ollama_distributed.adapters.identity.listener import PeerCertificates
from ollama_distributed.adapters.identity.tls import peer_of
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.ids import NodeId
from ollama_distributed.gateway.connections import Watch
from ollama_distributed.gateway.limits import MIB, Limits
from ollama_distributed.gateway.protocol import LimitedProtocol

log = structlog.get_logger("cluster.door")

OPENED = "cluster.door_opened"
CUT = "cluster.connections_cut"

HANDSHAKE_S = 5.0
LOOK_S = 0.01
CLOSE_S = 2.0
"""After the drain: what still runs then is cut."""
LIMITS = Limits(idle_s=300.0, body_deadline_s=120.0, stream_buffer_bytes=MIB)
"""Peers are known; they keep connections longer and send larger bodies than browsers."""


class Door:
    """An open listener."""

    def __init__(self, app: App, context: ssl.SSLContext, listener: socket.socket) -> None:
        self._app = app
        self._context = context
        self._listener = listener
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self.port: int = listener.getsockname()[1]

    async def open(self) -> None:
        protocol: Any = type(
            "ClusterProtocol",
            (PeerCertificates, LimitedProtocol),
            {"limits": LIMITS, "watch": Watch(LIMITS)},
        )
        config = Config(
            self._app,
            http=protocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
        )
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: protocol(config, self._state, {}),
            sock=self._listener,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_S,
        )
        log.info(OPENED, host=self._listener.getsockname()[0], port=self.port)

    def cut(self, node: NodeId) -> None:
        """Break all connections of a node, in the middle of whatever they do."""
        gone = [c for c in self._connections() if _node_of(c) == node]
        for connection in gone:
            connection.transport.abort()
        if gone:
            log.info(CUT, node=node, connections=len(gone))

    async def close(self, drain_s: float) -> None:
        """Take no more, let answers end for `drain_s`, then break them. Idempotent."""
        if self._server is None:
            self._listener.close()
            return
        self._server.close()
        for connection in self._connections():
            connection.shutdown()
        with contextlib.suppress(TimeoutError):  # what has not ended is ended below
            async with asyncio.timeout(drain_s):
                await self._empty()
        for connection in self._connections():
            connection.transport.abort()
        with contextlib.suppress(TimeoutError):  # its peer is gone: the system takes the socket back
            async with asyncio.timeout(CLOSE_S):
                await self._empty()
        for task in list(self._state.tasks):
            task.cancel()

    async def _empty(self) -> None:
        """Wait until all is over; uvicorn tells nobody when."""
        while self._state.connections or self._state.tasks:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(LOOK_S)

    def _connections(self) -> list[Any]:
        return list(self._state.connections)


def _node_of(connection: Any) -> NodeId | None:
    tls = connection.transport.get_extra_info("ssl_object")
    if not isinstance(tls, ssl.SSLObject):
        return None
    try:
        return peer_of(tls).node
    except (Forbidden, ValueError):
        return None
