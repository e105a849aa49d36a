"""Models on their way between nodes, and where they are: the seed's `ModelTransfer` and
`ModelManager`.

The node that is to have a model fetches it; who wants it there asks that node to. So a
transfer lives on the node it goes to, and its id begins with that node: any node can say how
it stands, or end it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.errors import ModelNotFound, NotFound, OllamaDistributedError
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.distribution.copies import ClusterSource
from ollama_distributed.distribution.downloads import Downloads, Transfer
from ollama_distributed.distribution.exchange import MAX_PEERS, CopyAsk, Exchange, TransferAsk
from ollama_distributed.distribution.plan import beside
from ollama_distributed.distribution.ports import Library
from ollama_distributed.models.names import ModelName, name_key
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger()

MOST_NODES = 256
"""Asked for their transfers."""
ASKED = 32
"""At once."""
KEPT = 256
"""Transfers that could not begin, and can still be asked about."""


class ModelPlace(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    name: str
    status: NodeStatus
    digest: str
    size: int
    current: bool = True
    """Of the version that counts; the node with another one gets that, or drops its own."""


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is, and where it is going."""

    model: str
    nodes: tuple[ModelPlace, ...] = ()
    transfers: tuple[Transfer, ...] = ()


class ModelTransfer:
    """`copies`: what comes to this node from others; `downloads`: what comes from registries."""

    def __init__(
        self,
        me: NodeId,
        exchange: Exchange,
        source: ClusterSource,
        copies: Downloads,
        downloads: Downloads,
        library: Library,
        state: Callable[[], ClusterState],
    ) -> None:
        self._me = me
        self._exchange = exchange
        self._source = source
        self._copies = copies
        self._downloads = downloads
        self._library = library
        self._state = state
        self._refused: dict[str, Transfer] = {}

    async def transfer(
        self, model: str, source: NodeId | None, to: NodeId, *, peers: Iterable[NodeId] = ()
    ) -> Transfer:
        """Have node `to` fetch a model. `source`: who has it for sure (None: who the state names);
        `peers`: who fetches it at the same time.

        Raises:
            ModelNotFound: nobody has it.
            Unavailable: `to` cannot be asked.
        """
        holders = await self.holders(model)
        sources = dict.fromkeys((source, *holders)) if source is not None else dict.fromkeys(holders)
        if not sources:
            raise ModelNotFound(f"model '{model}' not found on any node")
        ask = CopyAsk(name=model, sources=tuple(sources)[:MAX_PEERS], peers=tuple(peers)[:MAX_PEERS])
        return await self.copy_here(ask) if to == self._me else await self._exchange.copy(to, ask)

    async def get_progress(self, transfer_id: str) -> Transfer:
        """
        Raises:
            NotFound: there is no such transfer.
            Unavailable: the node it goes to cannot be asked.
        """
        return await self._one(transfer_id, cancel=False)

    async def cancel(self, transfer_id: str) -> Transfer:
        """End it; what was fetched stays for the next time. Raises as `get_progress`."""
        return await self._one(transfer_id, cancel=True)

    async def list(self) -> Sequence[Transfer]:
        """Of all nodes that answer within two seconds, newest first."""
        state = self._state()
        others = [node for node, known in state.nodes.items() if known.alive and node != self._me]
        turns = asyncio.Semaphore(ASKED)

        async def of(node: NodeId) -> tuple[Transfer, ...]:
            async with turns:
                try:
                    return await self._exchange.transfers(node, TransferAsk())
                except OllamaDistributedError as exc:
                    log.info("distribution.transfers_unknown", node=node, error=exc.message)
                    return ()

        found = [self.asked(TransferAsk()), tuple(self._refused.values())]
        found += await asyncio.gather(*(of(node) for node in others[:MOST_NODES]))
        return sorted((one for some in found for one in some), key=lambda one: (-one.started_at, one.id))

    async def holders(self, model: str) -> Sequence[NodeId]:
        """Living nodes that have the version that counts, this one first."""
        key = name_key(model)
        state = self._state()
        found = [node for node in state.holders(key) if state.nodes[node].alive]
        mine_counts = self._me in found or self._me not in state.models.get(key, ())
        if mine_counts and await self.manifest_here(model) is not None:
            return [self._me, *(node for node in found if node != self._me)]
        return [node for node in found if node != self._me]

    def refused(self, model: str, to: NodeId, error: OllamaDistributedError, now: float) -> Transfer:
        """A transfer that did not begin, so that it can be seen among the others."""
        failed = Transfer(
            id=f"{self._me}.{random_id()}",
            model=model,
            state="failed",
            started_at=now,
            ended_at=now,
            error=error.message,
            code=error.code,
            kind="copy",
            node=to,
        )
        self._refused[failed.id] = failed
        if len(self._refused) > KEPT:
            del self._refused[next(iter(self._refused))]
        return failed

    # ── what other nodes ask (`adapters.peers.pieces.Here`) ─────────────────────────────

    async def manifest_here(self, name: str) -> bytes | None:
        return await self._library.manifest(ModelName.parse(name))

    async def copy_here(self, ask: CopyAsk) -> Transfer:
        if not any(
            one.state == "running" and name_key(one.model) == name_key(ask.name)
            for one in self._copies.list()
        ):
            self._source.expect(ask)
        return self._copies.start(ask.name)

    async def ended(self, transfer_id: str) -> Transfer:
        """Wait until a copy to this node is over, whichever way."""
        return await self._copies.ended(transfer_id)

    def asked(self, ask: TransferAsk) -> tuple[Transfer, ...]:
        """
        Raises:
            NotFound: there is no transfer of this id here.
        """
        if not ask.id:
            return (*self._copies.list(), *self._downloads.list())
        if ask.id in self._refused:
            return (self._refused[ask.id],)
        home = self._copies if any(one.id == ask.id for one in self._copies.list()) else self._downloads
        return (home.cancel(ask.id) if ask.cancel else home.get(ask.id),)

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _one(self, transfer_id: str, *, cancel: bool) -> Transfer:
        node = NodeId(transfer_id.partition(".")[0])
        ask = TransferAsk(id=transfer_id, cancel=cancel)
        if "." not in transfer_id or node == self._me or node not in self._state().nodes:
            found = self.asked(ask)
        else:
            found = await self._exchange.transfers(node, ask)
        if not found:
            raise NotFound(f"there is no transfer {transfer_id[:64]!r}")
        return found[0]


class Evict(Protocol):
    """Lets the copy of one node go (`distribution.disks.ClusterDisks.evict`)."""

    async def __call__(self, model: str, node: str, /, *, last_copy: bool) -> EvictAnswer: ...


class ModelManager:
    """`wall`: seconds since the Unix epoch. `delete`: of a name, in the whole cluster."""

    def __init__(
        self,
        me: NodeId,
        transfers: ModelTransfer,
        exchange: Exchange,
        state: Callable[[], ClusterState],
        download: Callable[[str], Transfer],
        wall: Callable[[], float],
        figures: Callable[[], PieceFigures],
        delete: Callable[[str], Awaitable[None]],
        evict: Evict,
    ) -> None:
        self.moves = transfers
        self._figures = figures
        self._me = me
        self._exchange = exchange
        self._state = state
        self._download = download
        self._wall = wall
        self._delete = delete
        self._evict = evict

    def download(self, name: str) -> Transfer:
        """Begin to fetch a model from its registry to this node.

        Raises:
            InvalidName, Forbidden: the name is none, or its registry may not be asked.
            QueueFull: too many run already.
        """
        return self._download(name)

    async def distribute(self, name: str, nodes: Sequence[str] = ()) -> Sequence[Transfer]:
        """Have these nodes fetch a model from those that have it; none named: every living node
        that lacks it. One transfer for each, also for those that could not be asked.

        Raises:
            ModelNotFound: nobody has it.
            NotFound, Conflict: a node is not known, or a name is of several.
        """
        holders = await self.moves.holders(name)
        if not holders:
            raise ModelNotFound(f"model '{name}' not found on any node")
        targets = self._targets(holders, nodes)
        turns = asyncio.Semaphore(ASKED)

        async def begin(to: NodeId) -> Transfer:
            async with turns:
                try:
                    peers = beside(targets, to, MAX_PEERS)
                    return await self.moves.transfer(name, holders[0], to, peers=peers)
                except OllamaDistributedError as exc:
                    return self.moves.refused(name, to, exc, self._wall())

        begun = await asyncio.gather(*(begin(node) for node in targets))
        log.info("distribution.distributed", model=name, nodes=len(targets))
        return begun

    def figures(self) -> PieceFigures:
        """Of the pieces that this node exchanged."""
        return self._figures()

    async def transfers(self) -> Sequence[Transfer]:
        return await self.moves.list()

    async def transfer(self, transfer_id: str) -> Transfer:
        return await self.moves.get_progress(transfer_id)

    async def cancel(self, transfer_id: str) -> Transfer:
        return await self.moves.cancel(transfer_id)

    async def remove(
        self, name: str, nodes: Sequence[str] = (), *, last_copy: bool = False
    ) -> Sequence[EvictAnswer]:
        """Delete a model; with `nodes`, only their copies of it, one after the other. Returns what
        that freed there. `last_copy`: even if no other node holds it.

        Raises:
            ModelNotFound: it is not there.
            Conflict: a copy must stay; says why, and where it is gone already.
            NotFound, Unavailable: a node is not known, or cannot be asked.
        """
        if not nodes:
            await self._delete(name)
            return ()
        done: list[EvictAnswer] = []
        for node in dict.fromkeys(nodes):
            try:
                done.append(await self._evict(name, node, last_copy=last_copy))
            except OllamaDistributedError as exc:
                if not done:
                    raise
                gone = ", ".join(one.name for one in done)
                raise type(exc)(f"{exc.message} (it is gone from {gone})") from exc
        return done

    async def get_status(self, name: str) -> ModelStatus:
        """
        Raises:
            ModelNotFound: no node has it or fetches it.
        """
        key = name_key(name)
        moving = tuple(one for one in await self.moves.list() if name_key(one.model) == key)
        status = self._status(key, moving)
        if not status.nodes and not any(one.state == "running" for one in moving):
            raise ModelNotFound(f"model '{name}' not found on any node")
        return status

    def list(self) -> Sequence[ModelStatus]:
        """Every model of the cluster, by name; without transfers."""
        return [self._status(key) for key in sorted(self._state().models)]

    def _status(self, key: str, moving: tuple[Transfer, ...] = ()) -> ModelStatus:
        state = self._state()
        current = state.current(key)
        found = [
            ModelPlace(
                node=node,
                name=state.nodes[node].name,
                status=state.nodes[node].status,
                digest=held.digest,
                size=held.size_bytes,
                current=current is not None and held.digest == current.digest,
            )
            for node, held in state.models.get(key, {}).items()
            if node in state.nodes
        ]
        return ModelStatus(
            model=current.display if current is not None else moving[0].model if moving else key,
            nodes=tuple(sorted(found, key=lambda place: (place.name, place.node))),
            transfers=moving,
        )

    def _targets(self, holders: Sequence[NodeId], nodes: Sequence[str]) -> Sequence[NodeId]:
        state = self._state()
        if nodes:
            return list(dict.fromkeys(state.resolve(node) for node in nodes))
        living = {node for node, known in state.nodes.items() if known.alive and not known.draining}
        return sorted((living | {self._me}) - set(holders))
