"""A machine's voting server: told where it belongs, it runs there, and comes back there.

What one machine asks of another while the voters change is `VoterHost`. `LocalVoter` is this
machine's own; for the others, `node/` carries the same calls over the hop.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.adapters.coordination.nats import seat as seats
from ollama_distributed.adapters.coordination.nats.config import ClusterBlock
from ollama_distributed.adapters.coordination.nats.seat import Formation, Place, Seat
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.durable import sync_folder
from ollama_distributed.base.errors import Conflict, Unavailable
from ollama_distributed.base.ids import NodeId

log = structlog.get_logger()

DISMISSED = "coordination.voter_dismissed"
SEATED = "coordination.voter_seated"

ROUTE_PORT = 7423
CLIENT_PORT = 7422
REPLACED = "store.replaced"
"""The store of an earlier formation, kept until the next one is thrown away."""


class VoterHost(Protocol):
    """A machine that runs, or is to run, a voting server. Every call may be repeated."""

    @property
    def node(self) -> NodeId: ...

    async def prepare(self) -> Place:
        """Where its server is, or would be; chosen once and kept.

        Raises:
            Unavailable: the machine does not answer.
        """
        ...

    async def take(self, formation: Formation) -> None:
        """Run the server as one of `formation`; returns once it runs, with or without the
        others. A store of the same formation is kept and its routes are updated; any other
        store is worth nothing.

        Raises:
            Conflict: it runs alone and holds the state itself.
            Unavailable: it cannot be reached, or the server does not start.
        """
        ...

    async def leave(self) -> None:
        """Stop the server for good.

        Raises:
            Unavailable: the machine does not answer.
        """
        ...


class LocalVoter:
    """This machine's server: its process (`NatsServer`) and its seat, which nobody else changes while
    this lives."""

    def __init__(
        self,
        server: NatsServer,
        *,
        advertise: str,
        route_host: str = "0.0.0.0",  # noqa: S104  # see ClusterBlock
        port: int = CLIENT_PORT,
        route_port: int = ROUTE_PORT,
    ) -> None:
        """`advertise`: the host under which other machines reach this one; its certificate must
        name it. `port` and `route_port` are wanted; taken ones give way to free ones."""
        self.server = server
        self._advertise = f"[{advertise}]" if ":" in advertise else advertise
        self._route_host = route_host
        self._wanted = (port, route_port)
        self._held: list[socket.socket] = []
        self._seat: Seat | None = None

    @property
    def node(self) -> NodeId:
        return NodeId(self.server.name)

    @property
    def seat(self) -> Seat:
        """As it is on disk; read there once."""
        if self._seat is None:
            self._seat = seats.load(self.server.folder)
        return self._seat

    # ── this node's life ────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Run the server that this machine's seat asks for; none if it has no seat.

        Raises:
            Unavailable: it does not start.
        """
        seat = await asyncio.to_thread(lambda: self.seat)
        if seat.formation is not None and await self._dismissed(seat.formation):
            log.warning(DISMISSED, formation=seat.formation.id)
            await self.leave()
        elif seat.alone or seat.formation is not None:
            self._apply(seat)
            await self.server.start()

    async def stop(self) -> None:
        self._release()
        await self.server.stop()

    async def open(self, host: str) -> Place:
        """Listen on `host` for other machines, now and after each start (`NatsServer` is then
        made with this host). Restarts the server, which takes a tenth of a second; clients of
        this machine must be told its new `server.url`.

        Raises:
            Unavailable: it does not start there.
        """
        if self.server.host != host:
            running = self.server.running
            await self.server.stop()
            self.server.change(host=host, port=0)
            await self.prepare()
            self._apply(self.seat)
            self._release()
            if running:
                await self.server.start()
        return await self.prepare()

    async def _dismissed(self, formation: Formation) -> bool:
        """Whether the others vote without this one: it was replaced while it was away."""
        others = tuple(place.url for place in formation.places if place.node != self.node)
        try:
            meta = await self.server.system_at(others).meta()
        except Unavailable:
            return False  # nobody there who could know: they may all be starting
        return not meta.has(self.node)

    # ── VoterHost ───────────────────────────────────────────────────────────────────

    async def prepare(self) -> Place:
        seat, running = self.seat, self.server.running
        self._release()
        # Nobody listens on a port before its server starts, so another node on this machine would
        # choose the same: they are held until then.
        port = self.server.port if running else self._hold(self.server.host, seat.port or self._wanted[0])
        routes = running and self.server.cluster is not None
        route_port = (
            seat.route_port if routes else self._hold(self._route_host, seat.route_port or self._wanted[1])
        )
        await asyncio.to_thread(self._save, msgspec.structs.replace(seat, port=port, route_port=route_port))
        return Place(
            node=self.node,
            url=f"tls://{self._advertise}:{port}",
            route=f"{self._advertise}:{route_port}",
        )

    async def take(self, formation: Formation) -> None:
        seat = self.seat
        if seat.alone:
            raise Conflict(f"the server of node {self.node} runs alone and holds the state")
        same = seat.formation is not None and seat.formation.id == formation.id
        if not same:
            await self.server.stop()
            await asyncio.to_thread(replace_store, self.server.store, self.server.folder / REPLACED)
        await asyncio.to_thread(self.sit, formation=formation)
        if self.server.running:
            await self.server.reload()
        else:
            await self.server.start()
        log.info(SEATED, formation=formation.id, voters=len(formation.places))

    async def leave(self) -> None:
        await self.server.stop()
        await asyncio.to_thread(self.sit)
        await asyncio.to_thread(replace_store, self.server.store, self.server.folder / REPLACED)

    def _hold(self, host: str, wanted: int) -> int:
        holder = seats.hold_port(host, wanted)
        self._held.append(holder)
        port: int = holder.getsockname()[1]
        return port

    def _release(self) -> None:
        while self._held:
            self._held.pop().close()

    # ── the seat ────────────────────────────────────────────────────────────────────

    def sit(self, *, alone: bool = False, formation: Formation | None = None) -> None:
        """Note what the server is from its next start on. The store is not touched. Blocking: it
        waits for the disk."""
        seat = msgspec.structs.replace(self.seat, alone=alone, formation=formation)
        self._save(seat)
        self._apply(seat)
        self._release()

    def _save(self, seat: Seat) -> None:
        self.server.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seats.save(self.server.folder, seat)
        self._seat = seat

    def _apply(self, seat: Seat) -> None:
        block = None
        if seat.formation is not None:
            block = ClusterBlock(
                name=seat.formation.cluster,
                host=self._route_host,
                port=seat.route_port,
                routes=seat.formation.routes,
            )
        self.server.change(cluster=block, port=seat.port or None)


def replace_store(store: Path, kept: Path) -> None:
    """Put `store` aside as `kept`, in place of what was there."""
    if store.exists():
        if kept.exists():
            shutil.rmtree(kept)
        store.rename(kept)
        sync_folder(store.parent)
