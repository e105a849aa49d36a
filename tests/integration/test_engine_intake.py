"""Connections that are read together: what comes at once, what waits, what never does."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import uvloop
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.call import Call
from ollama_distributed.adapters.engines.http import Route, UnixAddress
from ollama_distributed.adapters.engines.intake import MUCH_BYTES, Intake, intake, rest_s
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, Tokens

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="it is made of epoll"),
]

NEVER_S = 3600.0


def run(steps: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(SOON_S):
            await steps()

    for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())


class Pair:
    """A connection of an intake, and its other end."""

    def __init__(self, intake: Intake) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.seen: list[bytes] = []
        self.news = asyncio.Event()
        self._intake = intake
        intake.add(self.near.fileno(), self.hear, self.end)

    def hear(self, data: bytes) -> None:
        self.seen.append(data)
        self.news.set()

    def end(self, _: OSError | None) -> None:
        self.hear(b"")
        self.close()

    def close(self) -> None:
        self._intake.remove(self.near.fileno())
        self.near.close()
        self.far.close()

    async def next(self) -> bytes:
        while not self.seen:
            self.news.clear()
            await self.news.wait()
        return self.seen.pop(0)


async def until(met: Callable[[], bool]) -> None:
    while not met():
        await asyncio.sleep(0.001)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_after_a_pause_comes_at_once_and_what_follows_together() -> None:
    async def steps() -> None:
        both = Intake(0.01)
        one, two = Pair(both), Pair(both)
        for pair in (one, two):
            for data in (b"a", b"b"):
                pair.far.send(data)
        assert (await one.next(), await two.next()) == (b"ab", b"ab")
        await until(lambda: both._watching)  # nothing came for as long as the pace
        both._pace_s = NEVER_S
        one.far.send(b"c")
        assert await one.next() == b"c"
        two.far.send(b"d")
        one.far.send(b"e")
        await turns()
        assert one.seen == two.seen == []
        both.close()
        for pair in (one, two):
            pair.near.close()
            pair.far.close()

    run(steps)


def test_the_end_waits_for_nothing() -> None:
    async def steps() -> None:
        slow = Intake(NEVER_S)
        one, two = Pair(slow), Pair(slow)
        two.far.send(b"x")
        one.far.send(b"last")
        one.far.shutdown(socket.SHUT_WR)
        assert (await one.next(), await one.next()) == (b"last", b"")
        assert two.seen == []
        two.close()
        slow.close()
        slow.close()

    run(steps)


def test_who_sends_much_is_not_kept_waiting() -> None:
    async def steps() -> None:
        reads = Intake(0.001)
        one = Pair(reads)
        one.far.send(b"x" * MUCH_BYTES)
        assert await one.next() == b"x" * MUCH_BYTES
        reads._pace_s = NEVER_S
        one.far.send(b"y")
        assert await one.next() == b"y"
        one.close()
        reads.close()

    run(steps)


@pytest.mark.parametrize(("took_s", "rests_s"), [(0.0, 0.02), (0.0005, 0.02), (0.0015, 0.03), (9.0, 0.04)])
def test_where_reading_takes_long_the_rest_is_longer(took_s: float, rests_s: float) -> None:
    assert rest_s(0.02, took_s) == pytest.approx(rests_s)


def test_all_are_read_before_one_is_told() -> None:
    async def steps() -> None:
        quick = Intake(0.001)
        one, two = Pair(quick), Pair(quick)
        for pair in (one, two):
            pair.hear = partial(hear, pair)  # type: ignore[method-assign]
            quick.remove(pair.near.fileno())
            pair.far.send(b"x")
            quick.add(pair.near.fileno(), pair.hear, pair.end)
        await until(lambda: len(told) == 2)
        assert told == [1, 1], "what was read is told, and nothing came after"
        one.close()
        two.close()
        quick.close()
        told.clear()

    told: list[int] = []

    def hear(pair: Pair, data: bytes) -> None:
        told.append(len(data))
        pair.far.send(b"more")
        for other in list(pair._intake._readers):
            pair._intake.remove(other)

    run(steps)


def test_who_is_removed_is_not_read() -> None:
    async def steps() -> None:
        quick = Intake(0.001)
        one, two = Pair(quick), Pair(quick)
        quick.remove(one.near.fileno())
        quick.remove(one.near.fileno())
        one.far.send(b"x")
        one.far.shutdown(socket.SHUT_WR)
        two.far.send(b"y")
        assert await two.next() == b"y"
        await turns()
        assert one.seen == []
        quick.add(one.near.fileno(), one.hear, one.end)
        assert await one.next() == b"x"
        one.close()
        two.close()
        quick.close()

    run(steps)


def test_without_a_pace_there_is_none() -> None:
    assert intake(0.0) is None


# ── an answer ───────────────────────────────────────────────────────────────────────


def event(number: int) -> bytes:
    data = b'data: {"content":"%d ","tokens":[%d],"tokens_predicted":%d}\n\n' % (number, number, number)
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """Sends the head of a stream, and then what it is told."""

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self.writer: asyncio.StreamWriter | None = None
        self.asked = asyncio.Event()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_unix_server(self._answer, self.address.path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self.writer is not None:
            self.writer.close()
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.writer = writer
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.asked.set()

    def send(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


class Heard:
    def __init__(self, server: Server, reads: Intake | None) -> None:
        self.events: list[EngineEvent] = []
        self.news = asyncio.Event()
        self.call = Call(
            self.hear,
            lambda _: None,
            lambda call, error: call.fail(error),
            read_error=lambda *_: EngineError(),
            intake=reads,
        )
        self.call.send(Route(server.address, "POST", "/completion"), {}, CompletionStream())

    def hear(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.news.clear()
            await self.news.wait()

    @property
    def over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Done | EngineFailed)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Tokens))


@pytest.mark.parametrize("pace_s", [0.0, 0.001])
def test_an_answer_is_the_same_with_and_without(tmp_path: Path, pace_s: float) -> None:
    async def steps() -> None:
        reads = intake(pace_s)
        async with Server(tmp_path / "s") as server:
            heard = Heard(server, reads)
            await server.asked.wait()
            for i in range(1, 200):
                server.send(event(i))
                await asyncio.sleep(0)
            done = b'data: {"content":"","tokens":[],"stop":true,"stop_type":"eos"}\n\n'
            server.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))
            await heard.until(lambda: heard.over)
        assert heard.text == "".join(f"{i} " for i in range(1, 200))
        assert isinstance(heard.events[-1], Done)
        if reads is not None:
            reads.close()

    run(steps)


def test_the_first_token_comes_at_once_a_pause_holds_and_a_broken_answer_ends(tmp_path: Path) -> None:
    async def steps() -> None:
        reads = Intake(NEVER_S)
        async with Server(tmp_path / "s") as server:
            heard = Heard(server, reads)
            await server.asked.wait()
            server.send(event(1))
            await heard.until(lambda: heard.text == "1 ")
            heard.call.pause()
            server.send(event(2))
            assert server.writer is not None
            server.writer.close()  # in the middle of the answer
            await server.writer.wait_closed()
            await turns()
            assert heard.text == "1 "
            heard.call.resume()
            await heard.until(lambda: heard.over)
            assert isinstance(heard.events[-1], EngineFailed)
            assert heard.text == "1 2 "
        reads.close()

    run(steps)


def test_a_cancelled_answer_is_read_no_more(tmp_path: Path) -> None:
    async def steps() -> None:
        reads = Intake(0.001)
        async with Server(tmp_path / "s") as server:
            heard = Heard(server, reads)
            await server.asked.wait()
            server.send(event(1))
            await heard.until(lambda: heard.text == "1 ")
            heard.call.cancel()
            assert server.writer is not None
            server.send(event(2))
            await until(server.writer.is_closing)  # the other end sees it
            assert heard.text == "1 "
        reads.close()

    run(steps)
