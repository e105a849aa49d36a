"""Nodes of one cluster in one process: real serving over the echo engine, real mutual TLS.

async with cluster(tmp_path) as nodes:
    a, b = await nodes.add("a"), await nodes.add("b", models=("m",))
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.adapters.identity.handshake_server import ClusterListener
from ollama_distributed.adapters.identity.tls import NodeTLS, peer_of
from ollama_distributed.adapters.peers import pool
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.adapters.peers.written import open_written
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.assertions import Asserter, Believer
from ollama_distributed.cluster.identity.issuing import issue
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.load import Load
from ollama_distributed.gateway.errors import status_of
from ollama_distributed.models.held import held_model
from ollama_distributed.routing.service import Router
from ollama_distributed.serving.queues import Waiting
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Holdings, Intent, Member
from ollama_distributed.streams.service import Answers
from ollama_distributed.testing.echo import EchoEngine
from tests.integration.identity_listener import Seat, listening
from tests.limits import SOON_S


async def until(condition: Callable[[], object], what: str = "", within_s: float = SOON_S) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"never came: {what or condition}") from None


class Machine:
    def cores(self) -> int:
        return 2

    def memory_available_bytes(self) -> int:
        return 2**40


def text_request(model: str, text: str = "hello there", **fields: Any) -> InferenceRequest:
    return InferenceRequest(
        request_id=RequestId("r1"),
        identity=Identity("admin", KeyId("k1"), "team"),
        model=model,
        prompt=TextPrompt(text=text, raw=True),
        **fields,
    )


class HopNode:
    """One node. `draining` is what it says of itself; the state says the rest."""

    def __init__(self, nodes: HopNodes, name: str) -> None:
        self.id = NodeId(name)
        self.nodes = nodes
        self.draining = False
        self.addresses: dict[NodeId, tuple[str, ...]] = {}
        """Where this node believes others to be, if not where they say."""
        self.loads: dict[NodeId, Load] = {}
        self.asked: list[NodeId] = []
        self.believed: list[Identity] = []

    async def open(
        self,
        closing: AsyncExitStack,
        models: tuple[str, ...],
        echo: Mapping[str, Any],
        settings: Any,
        queue: Waiting | None,
    ) -> None:
        seat, folder = self.nodes.seat, self.nodes.folder / self.id
        self.engine = EchoEngine({"models": models, **echo})
        self.store = BlobStore(folder / "models")
        closing.callback(self.store.close)
        self.catalog = Catalog(self.store, remotes=[self.engine])
        await self.catalog.start()
        self.serving = Serving(self.catalog, [self.engine], Machine(), SystemClock(), settings, queue=queue)
        closing.push_async_callback(self.serving.close, 0.0)
        files = IdentityFiles(folder)
        keys = files.node_keys()
        csr = ca.make_request(keys.tls)
        record = NodeRecord(
            node=self.id,
            role="server" if self.id == "a" else "node",
            key_sha256=ca.public_key_sha256(ca.check_request(csr)),
            nats_user=keys.nats.public,
            admitted_at=seat.world.now,
        )
        files.save(
            issue(seat.world.keys, seat.world.facts, record, csr, observed="127.0.0.1", now=seat.world.now)
        )
        self.tls = NodeTLS(files.certificate, files.key, files.authorities)
        self.door = PeerDoor(
            self.id,
            self.serving,
            self.catalog,
            self.serving.unload,
            draining=lambda: self.draining,
            status_of=status_of,
            believe=Believer(seat.world.facts.cluster, lambda: seat.world.now, self.told).believe,
        )
        self.listener = ClusterListener(
            self.door, seat.world.admission, check_peer=seat.check, status_of=status_of
        )
        self.address = await closing.enter_async_context(
            listening(self.listener, self.tls.server(client_required=False))
        )
        closing.push_async_callback(self.door.close)
        asserter = Asserter(seat.world.facts.cluster, self.id, keys.tls, lambda: seat.world.now)
        self.pool = PeerPool(
            self.hops,
            self.tls,
            lambda connection, node: peer_of(connection, expected=node),
            asserter.say,
        )
        closing.push_async_callback(self.pool.close)
        self.router = Router(self.serving, self.catalog, self.pool, self, random.Random(7).randrange)
        self.answers = Answers(self.router, SystemClock(), generated=self.door.answered.find)
        open_written(self.door, self.answers)

    def told(self, identity: Identity) -> Identity:
        """Whom a request is for, as this node knows it."""
        self.believed.append(identity)
        return identity

    @property
    def hop(self) -> str:
        return str(self.address)

    def hops(self, node: NodeId) -> tuple[str, ...]:
        known = self.state().nodes.get(node)
        told = known.advert.hop if known is not None and known.advert is not None else ()
        return self.addresses.get(node, told)

    # ── ClusterView ─────────────────────────────────────────────────────────────────

    @property
    def me(self) -> NodeId:
        return self.id

    def state(self) -> ClusterState:
        return self.nodes.state

    def interest(self, nodes: Iterable[NodeId]) -> None:
        self.asked += nodes

    def report(self, node: NodeId) -> Load | None:
        return self.loads.get(node)


class HopNodes:
    def __init__(self, folder: Path, closing: AsyncExitStack) -> None:
        self.folder = folder
        self.seat = Seat(folder / "seat")
        self.state = ClusterState()
        self._closing = closing

    async def add(
        self,
        name: str,
        models: tuple[str, ...] = (),
        *,
        echo: Mapping[str, Any] | None = None,
        settings: ServingSettings | None = None,
        queue: Waiting | None = None,
    ) -> HopNode:
        node = HopNode(self, name)
        await node.open(self._closing, models, echo or {}, settings, queue)
        self.write(
            state_keys.advert(node.id),
            Advert(
                node=node.id,
                name=f"{name}-name",
                role="node",
                version="1",
                boot="b",
                started_at=1.0,
                hop=(node.hop,),
            ),
        )
        self.write(
            state_keys.holdings(node.id),
            Holdings(node=node.id, models=tuple(map(held_model, node.catalog.list()))),
        )
        self.status(node, "online")
        return node

    def write(self, key: str, record: msgspec.Struct | None) -> None:
        value = None if record is None else encode(record)
        self.state = apply(self.state, key, value, self.state.revision + 1)

    def status(self, node: HopNode, status: Any) -> None:
        self.write(state_keys.member(node.id), Member(node=node.id, status=status, since=1.0))

    def drain(self, node: HopNode, *, drain: bool = True) -> None:
        node.draining = drain
        self.write(state_keys.intent(node.id), Intent(node=node.id, drain=drain))


@asynccontextmanager
async def cluster(folder: Path, *, connect_s: float = SOON_S) -> AsyncIterator[HopNodes]:
    """`connect_s`: for a handshake, of which this process does both sides, however rarely it runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "CONNECT_DEADLINE_S", connect_s)
        async with AsyncExitStack() as closing:
            yield HopNodes(folder, closing)
