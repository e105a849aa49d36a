"""What other machines meet of this node: its cluster listener, and its word on the network."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from functools import partial

import anyio
import structlog

from ollama_distributed._version import __version__
from ollama_distributed.adapters.identity.handshake_server import App
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster import addresses
from ollama_distributed.node.cluster.door import Door
from ollama_distributed.node.cluster.identity import Identity
from ollama_distributed.node.cluster.parts import Parts
from ollama_distributed.node.cluster.seat import SeatFile
from ollama_distributed.node.settings import CLUSTER_PORT

log = structlog.get_logger("cluster.front")

DOOR_FAILED = "cluster.door_failed"
NOT_ANNOUNCED_S = 300.0
"""A network without mDNS is tried again so often."""
ADDRESSES_S = 60.0
"""How often this machine's addresses are looked at: a laptop moves."""


class Front:
    """Closed until `open`; `close` in the end."""

    def __init__(self, parts: Parts, identity: Identity, seats: SeatFile, app: App) -> None:
        self.listen = addresses.parse_listen(parts.settings.cluster_listen)
        self.trouble = ""
        """Why it is not open although it should be."""
        self._parts = parts
        self._identity = identity
        self._seats = seats
        self._app = app
        self._door: Door | None = None
        self._announcing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._door is not None

    def hosts(self) -> tuple[str, ...]:
        """Under which others reach this machine, best first."""
        return addresses.advertised(self._parts.settings.advertise, self.listen)

    def at(self, port: int) -> tuple[str, ...]:
        """`host:port` under which others reach a listener of this node; 0: it has none."""
        return tuple(addresses.host_port(host, port) for host in self.hosts()) if port else ()

    def hop(self) -> tuple[str, ...]:
        return self.at(self._door.port) if self._door is not None else ()

    async def try_open(self) -> None:
        """At the start: what cannot be opened is told, and the node goes on."""
        try:
            await self.open()
        except OllamaDistributedError as failure:
            self.trouble = f"other machines cannot connect: {failure.message}"
            log.warning(DOOR_FAILED, reason=failure.message)

    async def open(self) -> None:
        """Idempotent.

        Raises:
            Conflict, Invalid: the address cannot be used.
        """
        if self._door is not None:
            return
        chosen = self.listen.port
        candidates = (chosen,) if chosen else (self._seats.now.hop_port, CLUSTER_PORT)
        # In a thread: the host may be a name, and its server may take seconds to answer.
        bind = partial(addresses.bind, self.listen.host, candidates, chosen=bool(chosen))
        listener = await anyio.to_thread.run_sync(bind)
        door = Door(self._app, self._identity.tls.server(client_required=False), listener)
        await door.open()
        self._door = door
        self.trouble = ""
        await self._seats.change(hop_port=door.port)
        if self._parts.settings.mdns:
            announce = keep_going("mdns", self._announce, self._parts.chance, max_wait_s=NOT_ANNOUNCED_S)
            self._announcing = asyncio.create_task(announce, name="mdns")

    def cut(self, node: NodeId) -> None:
        if self._door is not None:
            self._door.cut(node)

    async def close(self) -> None:
        if self._announcing is not None:
            await end([self._announcing])
            self._announcing = None
        if self._door is not None:
            await self._door.close(0.0)
            self._door = None

    async def _announce(self) -> None:
        """Say on the local network where this node is, as long as its addresses stay."""
        where = beyond_this_machine(self.hop())
        if where:
            # Imported late: 0.1 s that only an open node needs.
            from ollama_distributed.adapters.discovery.mdns import Found, announced

            own = Found(
                cluster=self._identity.cluster,
                node=self._identity.node,
                name=self._parts.settings.name,
                version=__version__,
                ca_sha256=self._identity.ca_sha256,
                addresses=where,
            )
            async with announced(own):
                while beyond_this_machine(self.hop()) == where:  # noqa: ASYNC110  nobody tells of a change
                    await anyio.sleep(ADDRESSES_S)
        else:
            await anyio.sleep(ADDRESSES_S)


def beyond_this_machine(where: Sequence[str]) -> tuple[str, ...]:
    """The `host:port`s that mean something on another machine."""

    def is_loopback(text: str) -> bool:
        host = text.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    return tuple(text for text in where if not is_loopback(text))
