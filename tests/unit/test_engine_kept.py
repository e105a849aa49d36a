"""Connections to an engine that are kept: used again, given up, and replaced when they went stale."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.call import Call
from ollama_distributed.adapters.engines.framing import Whole
from ollama_distributed.adapters.engines.http import Exchange, Route, TcpAddress
from ollama_distributed.adapters.engines.kept import Kept
from ollama_distributed.base.errors import Internal, OllamaDistributedError, RunnerDied, Unavailable
from ollama_distributed.base.tokens import Done, EngineEvent

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STREAMED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"
LAST = b"0\r\n\r\n"


class Server:
    """Answers each request with the next of `answers`; `None`: closes the connection instead."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while self.answers:
                await reader.readuntil(b"{}")
                answer = self.answers.pop(0)
                if answer is None:
                    break
                writer.write(answer)
            else:
                await reader.read()
        except asyncio.IncompleteReadError:
            pass
        writer.close()


class Client:
    def __init__(self, port: int, kept: Kept) -> None:
        self.kept = kept
        self.route = Route(TcpAddress("127.0.0.1", port), "POST", "/", kept=kept)

    def ask(self, on_body: Callable[[bytes], None] = lambda _: None) -> tuple[Exchange, asyncio.Future[None]]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def fail(error: OllamaDistributedError) -> None:
            ended.set_exception(error)

        exchange = self.route.send(
            b"{}", on_body=on_body, on_end=lambda: ended.set_result(None), on_error=fail
        )
        return exchange, ended

    async def whole(self) -> None:
        await self.ask()[1]


def run(server: Server, steps: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        client = Client(listening.sockets[0].getsockname()[1], Kept())
        async with listening:
            async with asyncio.timeout(SOON_S):
                await steps(client)
            client.kept.close()
            assert not len(client.kept)
            for writer in server.writers:
                writer.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_one_connection_carries_one_answer_after_the_other() -> None:
    server = Server(WHOLE, STREAMED + LAST, WHOLE)

    async def steps(client: Client) -> None:
        for _ in range(3):
            await client.whole()
            assert len(client.kept) == 1

    run(server, steps)
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        WHOLE + b"HTTP/1.1 200 OK\r\n",
    ],
)
def test_a_connection_that_cannot_be_trusted_with_another_is_not_kept(answer: bytes) -> None:
    async def steps(client: Client) -> None:
        await client.whole()
        assert not len(client.kept)
        await client.whole()

    run(server := Server(answer, WHOLE), steps)
    assert server.connections == 2


def test_a_connection_that_went_stale_is_replaced_once() -> None:
    async def steps(client: Client) -> None:
        await client.whole()
        await client.whole()  # the server closes instead, and is asked again

    run(server := Server(WHOLE, None, WHOLE), steps)
    assert server.connections == 2

    async def twice(client: Client) -> None:
        await client.whole()
        with pytest.raises(RunnerDied):
            await client.whole()

    run(server := Server(WHOLE, None, None), twice)
    assert server.connections == 2


def test_an_answer_that_broke_off_is_not_asked_for_again() -> None:
    async def steps(client: Client) -> None:
        await client.whole()
        parts: list[bytes] = []
        _, ended = client.ask(parts.append)
        with pytest.raises(RunnerDied):
            await ended
        assert parts == [b"ok"]

    async def serve_and_break(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (WHOLE, STREAMED):
            await reader.readuntil(b"{}")
            writer.write(answer)
        writer.close()

    server = Server()
    server.serve = serve_and_break  # type: ignore[method-assign]
    run(server, steps)


def test_who_leaves_at_the_last_word_leaves_a_connection_that_can_be_used() -> None:
    async def steps(client: Client) -> None:
        exchange, _ = client.ask(lambda _: exchange.leave())
        await until(lambda: bool(server.writers))
        assert not len(client.kept)
        await until(lambda: len(server.answers) == 1 and exchange.status == 200)
        server.writers[0].write(LAST)
        await until(lambda: len(client.kept) == 1)
        exchange, _ = client.ask(lambda _: exchange.cancel())
        await until(lambda: not len(client.kept))

    run(server := Server(STREAMED, STREAMED), steps)


def test_nothing_is_kept_once_it_is_closed() -> None:
    async def steps(client: Client) -> None:
        client.kept.close()
        await client.whole()
        assert not len(client.kept)

    run(Server(WHOLE), steps)


def test_a_server_that_is_gone_is_said_to_be() -> None:
    async def main() -> None:
        with pytest.raises(Unavailable):
            await Client(1, Kept()).whole()

    asyncio.run(main())


def test_an_answer_that_ended_is_gone_without_the_collector() -> None:
    """It comes seldom, and until then what a request was would lie in the way of the next."""

    class Said:
        def feed(self, data: bytes) -> list[EngineEvent]:
            assert data == b"ok"
            return [Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=1)]

    async def steps(client: Client) -> None:
        await client.whole()
        gc.disable()
        try:
            over = asyncio.Event()
            call = Call(
                lambda _: None,
                lambda _: over.set(),
                lambda _, __: None,
                read_error=lambda _, __: Internal(),
                framing=Whole,
            )
            call.send(client.route, {}, Said())
            there = weakref.ref(call)
            del call
            await over.wait()
            await until(lambda: there() is None)
        finally:
            gc.enable()

    run(server := Server(WHOLE, WHOLE), steps)
    assert server.connections == 1
