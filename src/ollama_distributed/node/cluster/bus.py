"""This node's coordination server: there on the founder and on voters, ready to be on any
other server of the cluster. What it is to be, the seat beside its store says
(`adapters.coordination.nats.seat`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ollama_distributed.adapters.coordination.nats import seat as bus_seats
from ollama_distributed.adapters.coordination.nats.growth import Growth
from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.coordination.nats.system import System
from ollama_distributed.adapters.coordination.nats.voter import LocalVoter
from ollama_distributed.adapters.identity.nats_access import NodeLogin, ServerAccess
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.wire import ClusterKeys
from ollama_distributed.node.cluster.addresses import LOOPBACK
from ollama_distributed.node.cluster.identity import Identity
from ollama_distributed.node.settings import NATS_PORT, ROUTES_PORT


def server_folder(data_dir: Path, cluster: str) -> Path:
    """Another cluster's state is never mixed in."""
    return data_dir / "nats" / cluster


def sit_alone(folder: Path) -> None:
    """This node founds a cluster: its server holds all of the state. Blocking, small."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    bus_seats.save(folder, bus_seats.Seat(alone=True))


class Bus:
    """On nodes of the role `server`. `async with` runs the server, if this node has one."""

    def __init__(
        self,
        data_dir: Path,
        identity: Identity,
        keys: Callable[[], ClusterKeys],
        *,
        host: str,
        is_open: bool,
        advertise: str,
        program: Path | None,
        bucket: str,
    ) -> None:
        self._host = host
        access = ServerAccess(
            identity.files, identity.tls, keys, cluster=identity.cluster, node=identity.node
        )
        self.server = NatsServer(
            server_folder(data_dir, identity.cluster),
            access,
            name=identity.node,
            host=host if is_open else LOOPBACK,
            program=program,
        )
        self.voter = LocalVoter(
            self.server, advertise=advertise, route_host=host, port=NATS_PORT, route_port=ROUTES_PORT
        )
        login = NodeLogin(identity.tls, identity.keys.nats, identity.jwt, cluster=identity.cluster)
        self.growth = Growth(self.voter, cluster=identity.cluster, login=login, bucket=bucket)

    async def __aenter__(self) -> Bus:
        """
        Raises:
            Unavailable: the server does not start.
        """
        await self.growth.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.growth.__aexit__(*exc)

    @property
    def alone(self) -> bool:
        """This node's server is the only one."""
        return self.voter.seat.alone

    @property
    def formation(self) -> Formation | None:
        """The voters, where this node is one of several."""
        return self.growth.formation

    @property
    def voters(self) -> tuple[NodeId, ...]:
        """As this node's own server has it; empty: it has none."""
        formation = self.formation
        return formation.nodes if formation else (self.voter.node,) if self.alone else ()

    @property
    def port(self) -> int:
        """For clients; 0: no server runs here."""
        return self.server.port if self.server.running else 0

    @property
    def routes_port(self) -> int:
        return self.voter.seat.route_port if self.server.running else 0

    def urls(self) -> tuple[str, ...]:
        """The servers that this node itself knows, its own first."""
        own = (self.server.url,) if self.server.running else ()
        formation = self.formation
        return tuple(dict.fromkeys((*own, *(formation.urls if formation else ()))))

    async def open(self) -> None:
        """Let other machines in; from then on the ports are kept.

        Raises:
            Unavailable: it does not start there.
        """
        await self.voter.open(self._host)

    def system(self, urls: tuple[str, ...]) -> System:
        """The administration of the servers at `urls`."""
        return self.server.system_at(urls)
