"""The engines' HTTP client against a server that is told byte by byte what to send."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.fetch import fetch, fetch_json
from ollama_distributed.adapters.engines.http import Exchange, UnixAddress, request
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    EngineError,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
)

pytestmark = pytest.mark.integration

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Seen:
    """Records the callbacks of one exchange."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.error: OllamaDistributedError | None = None
        self.calls: list[str] = []
        self.started = asyncio.Event()
        self.over = asyncio.Event()

    def open(
        self, address: UnixAddress, *, body: bytes = b"", idle_deadline_s: float | None = None
    ) -> Exchange:
        return request(
            address,
            "POST",
            "/x",
            body=body,
            on_head=self.head,
            on_body=self.chunk,
            on_end=self.end,
            on_error=self.fail,
            idle_deadline_s=idle_deadline_s,
        )

    def head(self, status: int, headers: object) -> None:
        self.calls.append("head")
        self.status = status

    def chunk(self, data: bytes) -> None:
        self.calls.append("body")
        self.body += data
        self.started.set()

    def end(self) -> None:
        self.calls.append("end")
        self.over.set()

    def fail(self, error: OllamaDistributedError) -> None:
        self.calls.append("error")
        self.error = error
        self.over.set()


def serve(tmp_path: Path, handler: Handler, client: Callable[[UnixAddress], Awaitable[None]]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:  # also where the client is gone, and with it the loop
            writer.close()

    async def main() -> None:
        path = tmp_path / "s"
        async with asyncio.timeout(SOON_S):
            server = await asyncio.start_unix_server(handle, path)
            try:
                await client(UnixAddress(str(path)))
            finally:
                server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def answering(*parts: bytes, hold: bool = False) -> Handler:
    """Reads the request head, sends the parts one by one, then closes (or holds on)."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if hold:
            await reader.read()
        writer.close()

    return handle


WHOLE = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n{"a": 1}'
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"a"\r\n4\r\n: 1}\r\n0\r\n\r\n'
UNTIL_CLOSE = b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}'
AFTER_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE


@pytest.mark.parametrize("raw", [WHOLE, CHUNKED, UNTIL_CLOSE, AFTER_CONTINUE])
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_every_framing_gives_the_same_answer(tmp_path: Path, raw: bytes, step: int) -> None:
    async def client(address: UnixAddress) -> None:
        assert await fetch_json(address, "GET", "/", deadline_s=SOON_S) == (200, {"a": 1})

    serve(tmp_path, answering(*(raw[i : i + step] for i in range(0, len(raw), step))), client)


@pytest.mark.parametrize("raw", [b"", WHOLE[:30], WHOLE[:-1], CHUNKED[:-3]])
def test_a_connection_lost_half_way_is_a_dead_runner(tmp_path: Path, raw: bytes) -> None:
    async def client(address: UnixAddress) -> None:
        with pytest.raises(RunnerDied):
            await fetch(address, "GET", "/", deadline_s=SOON_S)

    serve(tmp_path, answering(raw), client)


@pytest.mark.parametrize("raw", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 30_000])
def test_what_is_not_http_is_refused(tmp_path: Path, raw: bytes) -> None:
    async def client(address: UnixAddress) -> None:
        with pytest.raises(EngineError):
            await fetch(address, "GET", "/", deadline_s=SOON_S)

    serve(tmp_path, answering(raw, hold=True), client)


def test_nobody_listens(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(Unavailable):
            await fetch(UnixAddress(str(tmp_path / "none")), "GET", "/", deadline_s=SOON_S)

    asyncio.run(main())


def test_a_body_over_the_bound_is_refused(tmp_path: Path) -> None:
    async def client(address: UnixAddress) -> None:
        with pytest.raises(EngineError):
            await fetch(address, "GET", "/", deadline_s=SOON_S, max_bytes=7)

    serve(tmp_path, answering(WHOLE), client)


PATIENCES_S = (0.05, 1.0, 10.0)
"""On a machine that is slow for a moment not even the beginning comes within the first."""


def test_a_deadline_for_the_whole_answer(tmp_path: Path) -> None:
    async def client(address: UnixAddress) -> None:
        for deadline_s in PATIENCES_S:
            with pytest.raises((DeadlineExceeded, Unavailable)) as late:
                await fetch(address, "GET", "/", deadline_s=deadline_s)
            if late.type is DeadlineExceeded:
                return
        raise AssertionError("it was never even connected")

    serve(tmp_path, answering(WHOLE[:-8], hold=True), client)


def test_a_deadline_for_silence_in_the_middle(tmp_path: Path) -> None:
    async def client(address: UnixAddress) -> None:
        for deadline_s in PATIENCES_S:
            seen = Seen()
            seen.open(address, idle_deadline_s=deadline_s)
            await seen.over.wait()
            assert isinstance(seen.error, DeadlineExceeded)
            if "head" in seen.calls:
                break
        assert seen.calls == ["head", "error"]

    serve(tmp_path, answering(WHOLE[:-8], hold=True), client)


def test_cancel_closes_the_connection_and_nothing_comes_after(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await reader.read()
        writer.close()
        closed.set()

    async def client(address: UnixAddress) -> None:
        seen = Seen()
        exchange = seen.open(address)
        await seen.started.wait()
        exchange.cancel()
        exchange.cancel()
        await closed.wait()
        assert seen.calls == ["head", "body"]

    serve(tmp_path, handle, client)


def test_cancel_before_the_connection_is_made(tmp_path: Path) -> None:
    async def client(address: UnixAddress) -> None:
        seen = Seen()
        seen.open(address).cancel()
        await fetch_json(address, "GET", "/", deadline_s=SOON_S)  # a later exchange is done by now
        assert seen.calls == []

    serve(tmp_path, answering(WHOLE), client)


def test_a_paused_exchange_stops_the_sender(tmp_path: Path) -> None:
    """Backpressure: the server cannot get rid of 16 MB while the reader is paused."""
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 16777216\r\n\r\n")
        for _ in range(16):
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1 << 20
        writer.close()

    async def client(address: UnixAddress) -> None:
        seen = Seen()
        exchange = seen.open(address)
        await seen.started.wait()
        exchange.pause()
        previous = -1
        while sent != previous:
            previous = sent
            await asyncio.sleep(0.05)
        assert sent < 8 << 20
        assert len(seen.body) < 4 << 20
        exchange.resume()
        await seen.over.wait()
        assert len(seen.body) == 16 << 20

    serve(tmp_path, handle, client)


def test_a_defect_in_a_callback_ends_the_exchange(tmp_path: Path) -> None:
    async def client(address: UnixAddress) -> None:
        seen = Seen()

        def broken(data: bytes) -> None:
            raise ZeroDivisionError

        request(address, "GET", "/", on_body=broken, on_end=seen.end, on_error=seen.fail)
        await seen.over.wait()
        assert seen.calls == ["error"]
        assert seen.error is not None
        assert isinstance(seen.error.__cause__, ZeroDivisionError)

    serve(tmp_path, answering(WHOLE), client)


@pytest.mark.parametrize("bad", ["/a b", "/a\r\nx: y", "no-slash", "/é"])
def test_a_path_cannot_smuggle(bad: str) -> None:
    async def main() -> None:
        with pytest.raises(ValueError):
            await fetch(UnixAddress("/none"), "GET", bad, deadline_s=1)
        with pytest.raises(ValueError):
            await fetch(UnixAddress("/none"), "GET", "/", headers={"a": "b\r\nc: d"}, deadline_s=1)

    asyncio.run(main())
