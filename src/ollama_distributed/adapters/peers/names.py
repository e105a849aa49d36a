"""Names of models on other nodes: both sides of the hop."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.wire import ShownModel
from ollama_distributed.cluster.identity.ca import Peer

NAME = "models/name"
QUESTION_S = 30.0


class NameAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Give a model that the other node holds a second name there."""

    source: str
    destination: str


class Here(Protocol):
    """This node's own models (`catalog.service.Catalog`)."""

    async def copy(self, source: str, destination: str) -> None: ...


class NameExchange:
    """Implements `catalog.cluster.Peers`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def show(self, node: NodeId, name: str, *, verbose: bool = False) -> ShownModel:
        return await self._pool.show(node, name, verbose=verbose)

    async def copy(self, node: NodeId, source: str, destination: str) -> None:
        ask = NameAsk(source=source, destination=destination)
        # Done twice it is as done once, so any connection will do.
        await self._pool.ask(node, NAME, ask, type(None), deadline_s=QUESTION_S, fresh=False)


def open_names(door: PeerDoor, here: Here) -> None:
    async def name(_peer: Peer, ask: NameAsk) -> None:
        await here.copy(ask.source, ask.destination)

    door.add(NAME, name, NameAsk)
