"""WebSockets on a socket: the upgrade, hostile clients, and the SDK's both clients."""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from tests.gateway_bench import HELLO, Connection, Server, gateway, serving, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.queue import QueueAnswer, QueueNode, QueueRow, QueueWaiting
from ollama_distributed.client import Client, SyncClient, errors
from ollama_distributed.gateway import websocket
from ollama_distributed.testing.inference import ScriptedInference

SUBSCRIBE = '{"type": "subscribe", "channel": "queues"}'
PING, TEXT, CONT = 9, 1, 0
FIN = 0x80


class Queues:
    """A `gateway.queue_port.Queues` whose figures a test sets."""

    def __init__(self) -> None:
        self.waiting_now = 1
        self.error: Exception | None = None

    async def queue(self, node: str = "") -> QueueAnswer:
        if self.error is not None:
            raise self.error
        row = QueueRow(model="m", node="n-1", waiting=self.waiting_now)
        return QueueAnswer(nodes=(QueueNode(node="n1", name="n-1", waiting=self.waiting_now, models=(row,)),))

    async def waiting(self) -> Iterable[QueueWaiting]:
        return ()

    def shed(self, *_: Any) -> None: ...


@asynccontextmanager
async def world(queues: Any, port: int = 0) -> AsyncIterator[Server]:
    app = gateway(ScriptedInference(HELLO), queues=queues)
    async with serving(app, adapter="fast", port=port) as server:
        yield server


def url(server: Server, path: str = "/api/v1/ws") -> str:
    return f"ws://127.0.0.1:{server.port}{path}"


async def test_an_upgrade_and_what_is_none() -> None:
    async with world(Queues()) as server:
        async with connect(url(server), proxy=None) as socket:
            assert socket.response is not None
            assert "sec-websocket-extensions" not in socket.response.headers  # deflate was offered
            await socket.send(SUBSCRIBE)
            assert '"event":"now"' in str(await socket.recv())
        for path, headers, status in (
            ("/api/v1/other", {}, 404),
            ("/api/v1/ws", {"Origin": "https://evil.example"}, 403),
            ("/api/v1/ws", {"Authorization": "Bearer odk_wrong"}, 401),
        ):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(url(server, path), proxy=None, additional_headers=headers):
                    pass
            assert refused.value.response.status_code == status
        async with await server.connect() as plain:
            await plain.send(b"GET /api/v1/ws HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n")
            assert b'"queues"' in await plain.reader.readuntil(b"]}")
        await until(lambda: len(server.watch) == 0, "no connection is left")


async def opened(server: Server) -> Connection:
    """A WebSocket without a library between."""
    client = await server.connect()
    key = base64.b64encode(os.urandom(16))
    await client.send(
        b"GET /api/v1/ws HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
    )
    assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return client


def frame(kind: int, data: bytes = b"", *, fin: bool = True) -> bytes:
    """Masked with zeros, as a client's are."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xff" + struct.pack("!Q", len(data))
    return bytes([kind | (FIN if fin else 0)]) + size + b"\0\0\0\0" + data


async def closed_with(client: Connection) -> int:
    """The code of the server's close; 0: it closed without one."""
    data = b""
    try:
        while chunk := await client.reader.read(65536):
            data += chunk
    except ConnectionError:
        pass  # it does not read on what a flood still sends
    at = data.rfind(bytes([FIN | 8]))
    return int.from_bytes(data[at + 2 : at + 4], "big") if at >= 0 else 0


FLOODS = {
    "pings": (frame(PING) * 20_000, 1008),
    "fragments": (frame(TEXT, b"{", fin=False) + frame(CONT, fin=False) * 20_000, 1008),
    "messages": (frame(TEXT, b"{}") * 1_000, 1008),
    "a terabyte": (bytes([FIN | TEXT, 0xFF]) + struct.pack("!Q", 2**40) + b"\0\0\0\0", 1009),
    "no UTF-8": (frame(TEXT, b"\xff\xff"), 1007),
    "no mask": (bytes([FIN | TEXT, 2]) + b"{}", 1002),
}


async def test_a_hostile_client_is_closed_and_nobody_else_notices() -> None:
    queues = Queues()
    async with world(queues) as server, connect(url(server), proxy=None) as good:
        await good.send(SUBSCRIBE)
        for name, (flood, code) in FLOODS.items():
            async with await opened(server) as bad:
                await bad.send(flood)
                # 0: what it still sends is not read, so that it may see a reset in place of the close
                assert await closed_with(bad) in (code, 0), name
        queues.waiting_now = 2
        await heard(good, '"waiting":2')
        await until(lambda: len(server.watch) == 1, "only the good one is left")


async def heard(socket: ClientConnection, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in str(await socket.recv()):
            pass


async def test_who_does_not_take_what_it_is_sent_is_cut() -> None:
    async with world(Queues()) as server, await opened(server):
        (stuck,) = server.watch._connections
        assert isinstance(stuck, websocket.LimitedSocket)
        stuck.pause_writing()
        now = stuck.loop.time()
        stuck.check_deadlines(now)
        stuck.check_deadlines(now + stuck.limits.reader_deadline_s - 1)
        assert not stuck.transport.is_closing()
        stuck.resume_writing()
        stuck.check_deadlines(now + stuck.limits.reader_deadline_s)
        stuck.pause_writing()
        stuck.check_deadlines(now + stuck.limits.reader_deadline_s)
        assert not stuck.transport.is_closing()
        stuck.check_deadlines(now + 2 * stuck.limits.reader_deadline_s)
        await until(lambda: len(server.watch) == 0, "it is cut")


async def test_the_server_ends_and_says_so() -> None:
    async with world(Queues()) as server, connect(url(server), proxy=None) as socket:
        server.server.should_exit = True
        with pytest.raises(ConnectionClosed) as ended:
            await socket.recv()
        assert ended.value.rcvd is not None
        assert ended.value.rcvd.code == 1012


# ── the SDK ─────────────────────────────────────────────────────────────────────────


def _told(event: Any) -> tuple[str, int]:
    return event.what, int(event.data.waiting)


async def _next(events: AsyncIterator[Any]) -> Any:
    """Of those that tell something: a slow machine is idle before the first."""
    while (event := await anext(events)).what == "idle":
        pass
    return event


async def test_the_async_client_follows_through_a_restart() -> None:
    queues = Queues()
    async with world(queues) as server:
        port = server.port
        client = Client(f"http://127.0.0.1:{port}", "")
        assert [row.name for row in (await client.channels()).channels] == ["queue", "queues"]
        events = client.events("queues", idle_s=0.05)
        assert _told(await _next(events)) == ("now", 1)
        assert (await _next(events)).what == "ready"
        assert (await anext(events)).what == "idle", "nothing happens"
        queues.waiting_now = 2
        assert _told(await _next(events)) == ("changed", 2)
    queues.waiting_now = 3
    async with world(queues, port), aclosing(events):
        assert _told(await _next(events)) == ("changed", 3)


async def test_the_sync_client() -> None:
    queues = Queues()
    async with world(queues) as server:

        def follow() -> list[tuple[str, int]]:
            with SyncClient(f"http://127.0.0.1:{server.port}", "") as client:
                events, told = client.events("queues", of="n-1", idle_s=0.05), []
                for event in events:
                    if event.what == "ready":
                        queues.waiting_now = 2
                    if event.data is not None:
                        told.append(_told(event))
                    if len(told) == 2:
                        break
                events.close()
                return told

        assert await asyncio.to_thread(follow) == [("now", 1), ("changed", 2)]
        await until(lambda: len(server.watch) == 0, "it hung up")


async def test_a_key_that_is_not_valid_is_said_as_by_every_call() -> None:
    async with world(Queues()) as server:
        key = "odk_aaaaaaaa_" + "0" * 43 + "_000000"
        with pytest.raises(errors.Unauthenticated):
            await anext(Client(f"http://127.0.0.1:{server.port}", key).events("queue"))
        with pytest.raises(errors.NotFound, match="metrics"):
            await anext(Client(f"http://127.0.0.1:{server.port}", "").events("metrics"))
    with pytest.raises(errors.ConnectionFailed):
        await anext(Client(f"http://127.0.0.1:{server.port}", "", retries=0).events("queue"))


async def test_a_server_that_ends_every_connection_is_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(Queues()) as server:
        monkeypatch.setattr(server.app._events.hub, "join", _broken)
        with pytest.raises(errors.ConnectionLost):
            await anext(Client(f"http://127.0.0.1:{server.port}", "").events("queues"))


async def _broken(*_: Any) -> Any:
    raise RuntimeError("a defect")


async def test_a_channel_that_cannot_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from ollama_distributed.gateway.events import hub

    monkeypatch.setattr(hub, "FIRST_S", 0.05)
    queues = Queues()
    queues.error = Unavailable("nobody leads")
    async with world(queues) as server:
        with pytest.raises(errors.Unavailable, match="queues"):
            await anext(Client(f"http://127.0.0.1:{server.port}", "").events("queues"))
