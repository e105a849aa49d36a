"""Connections to an engine's UNIX socket that are made at once, or before they are needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.engines import dial
from ollama_distributed.adapters.engines.dial import Ahead
from ollama_distributed.adapters.engines.http import Route, UnixAddress
from ollama_distributed.base.errors import OllamaDistributedError

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


class Server:
    """Answers each request with the number of its connection."""

    def __init__(self, address: UnixAddress) -> None:
        self.address = address
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        body = b"%d" % self.connections
        try:
            if b"content-length: 2" in await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
            writer.write(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # nobody asked anything
        writer.close()


@asynccontextmanager
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(UnixAddress(str(tmp_path / "s")))
    listening = await asyncio.start_unix_server(made.handle, made.address.path)
    try:
        with anyio.fail_after(SOON_S):
            yield made
    finally:
        listening.close()


async def answered(route: Route, request: bytes = b"{}") -> bytes:
    """The body; raises what the exchange told."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    body = bytearray()

    def failed(error: OllamaDistributedError) -> None:
        over.set_exception(error)

    route.send(request, on_body=body.extend, on_end=lambda: over.set_result(None), on_error=failed)
    await over
    return bytes(body)


async def heard(there: Server, count: int) -> None:
    """So many connections have come to the server."""
    while len(there.writers) < count:
        await asyncio.sleep(0.001)


async def test_what_was_opened_meanwhile_carries_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "AHEAD_S", 2 * SOON_S)  # none is too old, however slow the machine is
    async with server(tmp_path) as there:
        ahead = Ahead(there.address.path)
        route = Route(there.address, "POST", "/x", ahead=ahead)
        ahead.open()
        ahead.open()
        await heard(there, 1)
        assert await answered(Route(there.address, "GET", "/", body=False)) == b"2"
        assert await answered(route) == b"1"
        assert await answered(route) == b"3", "each is for one request; without one there is a new one"
        ahead.open()
        ahead.close()
        assert await answered(route) == b"5"
        ahead.open()
        assert ahead.take() is None, "it was closed"


async def test_one_that_the_server_closed_is_replaced(tmp_path: Path) -> None:
    async with server(tmp_path) as there:
        ahead = Ahead(there.address.path)
        ahead.open()
        await heard(there, 1)
        there.writers[0].close()
        await there.writers[0].wait_closed()
        assert await answered(Route(there.address, "POST", "/x", ahead=ahead)) == b"2"


async def test_one_that_is_too_old_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(tmp_path) as there:
        monkeypatch.setattr(dial, "AHEAD_S", -1.0)
        ahead = Ahead(there.address.path)
        ahead.open()
        ahead.open()
        assert await answered(Route(there.address, "POST", "/x", ahead=ahead)) == b"3"


async def test_a_server_that_is_not_there_is_told_to_who_needs_it(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "nobody"))
    ahead = Ahead(address.path)
    ahead.open()
    with pytest.raises(OllamaDistributedError, match="cannot connect"):
        await answered(Route(address, "POST", "/x", ahead=ahead))


async def test_a_request_that_does_not_go_out_at_once_goes_out_whole(tmp_path: Path) -> None:
    """The kernel takes some 200 KiB; the rest is the transport's, also on a connection that was ahead."""
    got = asyncio.get_running_loop().create_future()
    body = bytes(range(256)) * 16_384

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        got.set_result(await reader.readexactly(len(body)))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    address = UnixAddress(str(tmp_path / "s"))
    listening = await asyncio.start_unix_server(handle, address.path)
    with anyio.fail_after(SOON_S):
        for ahead in (None, Ahead(address.path)):
            if ahead is not None:
                ahead.open()
            assert await answered(Route(address, "POST", "/x", ahead=ahead), body) == b"ok"
            assert await got == body
            got = asyncio.get_running_loop().create_future()
    listening.close()


async def test_cancelled_before_the_loop_knows_of_the_connection(tmp_path: Path) -> None:
    async with server(tmp_path) as there:
        route = Route(there.address, "POST", "/x")
        heard_of: list[object] = []
        route.send(b"{}", on_body=heard_of.append, on_end=lambda: None, on_error=heard_of.append).cancel()
        await heard(there, 1)
        assert await answered(route) == b"2"
        assert heard_of == []
