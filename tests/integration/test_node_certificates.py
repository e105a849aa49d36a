"""What a certificate of a node opens, and what none, a foreign, an expired and a revoked one do: every
route of the API over TLS, every route of the door between nodes, and the bus, over real sockets."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.callers import CALLERS, LOGINS, REFUSED, REVOKED, STRANGERS, Line, contexts, said
from tests.integration.identity_listener import Seat
from tests.limits import SOON_S
from tests.trust import Trust
from tests.unit.access.test_matrix import Anything
from tests.unit.access.test_matrix import World as WholeApp

import ollama_distributed
from ollama_distributed.adapters.coordination.nats.config import ClusterBlock
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.identity.handshake_server import ClusterListener
from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.rights import ROWS
from ollama_distributed.adapters.sockets import listen
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.wire import JOIN_PATH
from ollama_distributed.gateway.errors import status_of
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.rights import PUBLIC
from ollama_distributed.node.api_tls import CertificateFiles
from ollama_distributed.node.cluster.door import Door
from ollama_distributed.node.doors import Stop, serve

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

# ── the API ─────────────────────────────────────────────────────────────────────────


async def test_a_node_certificate_opens_nothing_of_the_api(tmp_path: Path) -> None:
    """Every route of the app, by its own TLS listener: as without a certificate."""
    whole, trust = WholeApp(), Trust(tmp_path)
    trust.issue("n0")
    files = trust.files("n0")
    listener = listen("0.0.0.0", 0)  # as other machines reach it: with TLS
    stop, ready = Stop(), asyncio.Event()
    serving = asyncio.create_task(
        serve(
            whole.app,
            [listener],
            limits=Limits(),
            drain_s=0,
            certificate=CertificateFiles(files.certificate, files.key),
            stop=stop,
            on_started=ready.set,
            on_tls=lambda _: None,
        )
    )
    try:
        async with asyncio.timeout(SOON_S):
            await ready.wait()
        made = contexts(tmp_path, trust.keys, trust.cluster)
        lines = {
            caller: Line(listener.getsockname()[1], made[caller]) for caller in ("none", "node", "server")
        }
        proxied = "x-forwarded-for: 192.0.2.1\r\n"
        for method, path, _ in whole.routes():
            if path.startswith("/api/v1/auth/") and path in PUBLIC:
                continue
            asked = re.sub(r"\{[^}]*\}", "x", path)
            statuses = {
                caller: await line.ask(method, asked, body=b"{}", headers=proxied)
                for caller, line in lines.items()
            }
            assert len(set(statuses.values())) == 1, (method, path, statuses)
            assert (statuses["none"] == 401) == (path not in PUBLIC), (method, path, statuses)
        for line in lines.values():
            line.close()
    finally:
        stop.all()
        await serving


# ── the door between nodes ──────────────────────────────────────────────────────────


@asynccontextmanager
async def door(seat: Seat) -> AsyncIterator[int]:
    """With every route that there is, in front of a node that does nothing: its port."""
    peer_door = PeerDoor(
        NodeId("n0"), Anything(), Anything(), Anything(), draining=lambda: False, status_of=status_of
    )
    own = {"generate", "embed", wire.RERANK, wire.COUNT_TOKENS, wire.SHOW, wire.UNLOAD}
    for route in set(ROWS) - own:
        peer_door.add(route, Anything(), int)
    app = ClusterListener(peer_door, seat.world.admission, check_peer=seat.check, status_of=status_of)
    listening = Door(app, seat.tls.server(client_required=False), listen("127.0.0.1", 0))
    await listening.open()
    try:
        yield listening.port
    finally:
        await peer_door.close()
        await listening.close(0.0)


async def test_every_route_between_nodes_by_every_certificate(tmp_path: Path) -> None:
    """Who may is told that an empty body says nothing; who may not hears that or less."""
    seat = Seat(tmp_path / "n0")
    seat.removed[REVOKED] = NodeRecord(
        node=REVOKED,
        role="server",
        key_sha256="",
        nats_user="",
        admitted_at=time.time() - 100,
        removed_at=time.time() - 1,
    )
    made = contexts(tmp_path, seat.world.keys, seat.world.facts.cluster)
    async with door(seat) as port:
        for caller in CALLERS:
            line = Line(port, made[caller])
            for route, callers in ROWS.items():
                may = caller == "server" or (caller == "node" and callers == "members")
                status = await line.ask("POST", wire.PREFIX + route)
                expected = 400 if may else REFUSED if caller in ("foreign CA", "expired") else 403
                assert status == expected, (caller, route, status)
            line.close()


async def test_the_door_between_nodes_has_nothing_of_the_api(tmp_path: Path) -> None:
    seat, whole = Seat(tmp_path / "n0"), WholeApp()
    made = contexts(tmp_path, seat.world.keys, seat.world.facts.cluster)
    async with door(seat) as port:
        line = Line(port, made["server"])
        for method, path, _ in whole.routes():
            asked = re.sub(r"\{[^}]*\}", "x", path)
            key = f"authorization: Bearer {whole.keys['admin']}\r\n"
            status = await line.ask(method, asked, body=b"{}", headers=key)
            assert status == 404, (method, path, status)
        line.close()
        nobody = Line(port, made["none"])
        assert await nobody.ask("GET", JOIN_PATH) == 200, "the CA is for all: who joins has its hash"
        assert await nobody.ask("POST", JOIN_PATH, body=b"{}") == 400
        nobody.close()


# ── the bus ─────────────────────────────────────────────────────────────────────────


async def test_a_certificate_alone_is_no_login_to_the_bus(tmp_path: Path) -> None:
    """Clients' port and that of routes: a certificate is needed, and more than one."""
    trust = Trust(tmp_path)
    made = contexts(tmp_path, trust.keys, trust.cluster)
    with listen("127.0.0.1", 0) as free:
        routes = free.getsockname()[1]
    others = (f"127.0.0.1:{routes}",)
    block = ClusterBlock(name=trust.cluster, host="127.0.0.1", port=routes, routes=others)
    async with NatsServer(tmp_path / "n1", trust.access("n1"), name="n1", cluster=block) as server:
        for port in (server.port, routes):
            for caller in CALLERS:
                for login in LOGINS:
                    heard = await said(port, made[caller], login)
                    where = (port == routes, caller, heard)
                    assert b"PONG" not in heard, where
                    assert b"+OK" not in heard, where
                    # "revoked" shows a good certificate here: what ends with it is its login.
                    assert (b"Authorization Violation" in heard) != (caller in STRANGERS), where


def test_every_row_is_a_route() -> None:
    """One that nobody adds any more is a hole for the next of that name."""
    source = Path(ollama_distributed.__file__).parent
    texts = [path.read_text() for path in source.rglob("*.py") if path.name != "rights.py"]
    for route in ROWS:
        assert any(f'"{route}"' in text for text in texts), route
