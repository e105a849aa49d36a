"""What a streamed token costs the node's own code: `python -m bench.streamed_tokens`.

One process without sockets: what an engine would send is put into the connection by hand, and
what a client would get ends at a transport that drops it. Between them is all that a token passes
in a node: HTTP and events of the engine, lease, journal, decoder, dialect, the chunk for the
client. CPU time of the thread, of many rounds the one that took least: hardly anything else on the
machine is in it, and two versions of the code can be told apart by a few per cent.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import uvloop
from rich.console import Console
from rich.table import Table
from tests.answering import FixedMachine, Models

from bench.mock_backend import Api
from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.engines.call import Call, EventParser
from ollama_distributed.adapters.engines.exchange import Exchange
from ollama_distributed.adapters.engines.http import UnixAddress
from ollama_distributed.adapters.engines.kept import Connection, Kept
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.adapters.engines.remote.openai_stream import OpenAIStream
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.tokens import EngineSink
from ollama_distributed.gateway.dialects import ollama, openai
from ollama_distributed.gateway.fast import HotCycle
from ollama_distributed.gateway.gate import Gate, Head
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.streams.service import Answers
from ollama_distributed.testing.echo import EchoEngine, EchoRunner, echo_model

GROUPS = 100
"""Of tokens, for each stream in a round."""
ENGINE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LLAMA = (
    b'data: {"index":0,"content":" word","tokens":[%d],"stop":false,"id_slot":-1,"tokens_predicted":%d,'
    b'"tokens_evaluated":1}\n\n'
)
"""As llama.cpp b11669 says a token."""
MESSAGES = [{"role": "user", "content": "hello"}]


class Way(msgspec.Struct, frozen=True):
    """From an engine through a dialect."""

    name: str
    path: str
    body: dict[str, object]
    parser: Callable[[], EventParser]
    renders: bool
    """The node applies the template; else the engine takes the chat."""
    token: Callable[[int], bytes]
    """The engine's chunk of the token with this number."""


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_remote = Api("mock-ids", "vllm")
WAYS = (
    Way(
        "llama.cpp, OpenAI chat", "/v1/chat/completions", {"messages": MESSAGES},
        CompletionStream, True, lambda number: _chunk(LLAMA % (number % 50_000, number)),
    ),
    Way(
        "llama.cpp, Ollama chat", "/api/chat", {"messages": MESSAGES},
        CompletionStream, True, lambda number: _chunk(LLAMA % (number % 50_000, number)),
    ),
    Way(
        "vLLM, OpenAI completion", "/v1/completions", {"prompt": "hello"},
        OpenAIStream, True, lambda _: _remote.text[0],
    ),
    Way(
        "OpenAI server, OpenAI chat", "/v1/chat/completions", {"messages": MESSAGES},
        OpenAIStream, False, lambda _: _remote.chat[0],
    ),
)  # fmt: skip


class Wire(asyncio.Transport):
    """Drops what is written."""

    def __init__(self) -> None:
        self.last = b""
        """Of what was written."""

    def write(self, data: Any) -> None:
        self.last = data

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...

    def abort(self) -> None: ...


class Wires(Kept):
    """There is always a connection to the engine."""

    def take(self) -> Connection:
        connection = Connection(None)  # type: ignore[arg-type]  # whoever took it sets itself
        connection.transport = Wire()
        return connection


class ByHand:
    """In place of a `Route`: its exchanges get their answers by hand."""

    def __init__(self) -> None:
        self.made: list[Exchange] = []

    def send(self, body: bytes, **callbacks: Any) -> Exchange:
        exchange = Exchange(
            UnixAddress("/by/hand"),
            body,
            on_head=None,
            connect_deadline_s=1.0,
            idle_deadline_s=None,
            kept=Wires(),
            **callbacks,
        )
        self.made.append(exchange)
        return exchange


class Runner(EchoRunner):
    """Its answers are put in by hand."""

    route: ByHand
    parser: Callable[[], EventParser]
    renders: bool

    def generate(self, request: CompletionRequest, sink: EngineSink) -> Call:  # type: ignore[override]  # a `Generation`, too
        return self._call(request.together, sink)

    def chat(self, request: ChatRequest, sink: EngineSink) -> Call:  # type: ignore[override]  # a `Generation`, too
        return self._call(request.together, sink)

    def _call(self, together: bool, sink: EngineSink) -> Call:
        joins = together and self.parser is OpenAIStream  # as the runners do
        call = Call(sink, lambda _: None, lambda *_: None, read_error=lambda *_: EngineError(), joins=joins)
        call.send(self.route, {}, self.parser())  # type: ignore[arg-type]  # as a `Route`
        return call


class Engine(EchoEngine):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.route, self._way = ByHand(), way

    async def load(self, model: Any, plan: LoadPlan, on_progress: Any = None) -> Runner:  # noqa: ARG002  # the port's
        runner = Runner(plan, self.info, self.settings, None)
        runner.route, runner.parser, runner.renders = self.route, self._way.parser, self._way.renders
        self.runners.append(runner)
        return runner


class Client:
    """What a `HotCycle` needs of its connection."""

    def __init__(self) -> None:
        self.transport = Wire()
        self.loop = asyncio.get_running_loop()
        self.no_event = asyncio.Event()

    def default_head(self) -> bytes:
        return b""

    def finish(self) -> None: ...

    def hot_complete(self, cycle: HotCycle) -> None: ...


async def measure(way: Way, together: int, streams: int, rounds: int) -> float:
    """CPU microseconds for a token."""
    clock, engine = SystemClock(), Engine(way)
    rules = ServingSettings(rules=Rules(slots=streams))
    serving = Serving(Models(echo_model("m")), [engine], FixedMachine(), clock, rules)
    path = HotPath(
        routes=(*ollama.ROUTES, *openai.ROUTES),
        inference=Answers(serving, clock),
        gate=Gate(Authenticator((), require_key=False, wall=clock.time), SitePolicy(), Limits()),
        clock=clock,
        observe=lambda _: None,
        spawn=lambda coroutine: asyncio.get_running_loop().create_task(coroutine).cancel,
        offload=None,  # type: ignore[arg-type]  # for large bodies only
    )
    body = msgspec.json.encode({"model": "m", "stream": True, **way.body})
    head = Head("POST", way.path, {"host": "127.0.0.1", "content-length": str(len(body))}, 1, "127.0.0.1")
    least = float("inf")
    for _ in range(rounds):
        asked = []
        for _ in range(streams):
            client = Client()
            cycle = HotCycle(client, keep_alive=True, chunked=True)  # type: ignore[arg-type]  # as a `FastProtocol`
            cycle.exchange = path.open(head, cycle)
            cycle.exchange.receive(body)
            cycle.exchange.body_complete()
            asked.append((client, cycle))
        while len(engine.route.made) < streams:
            if any(cycle.response_started for _, cycle in asked):
                raise RuntimeError("an answer ended before it began")
            await asyncio.sleep(0)
        answers, engine.route.made = engine.route.made, []
        for answer in answers:
            answer.data_received(ENGINE_HEAD + way.token(1))
        groups = [
            b"".join(map(way.token, range(first, first + together)))
            for first in range(2, 2 + GROUPS * together, together)
        ]
        await asyncio.sleep(0)
        before = time.thread_time()
        for group in groups:
            for answer in answers:
                answer.data_received(group)
            await asyncio.sleep(0)
        least = min(least, time.thread_time() - before)
        for client, cycle in asked:
            assert client.transport.last.count(b"word") in (1, together)
            assert cycle.exchange is not None
            assert not cycle.exchange.ended
            cycle.exchange.disconnected()
        await asyncio.sleep(0)
    await serving.close(drain_s=0)
    return least / (GROUPS * together * streams) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.streamed_tokens", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of which the one counts that took least")
    parser.add_argument("--only", default="", help="ways whose names contain this")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    shapes = ((1, 1), (1, 8), (3, 1), (5, 8))
    table = Table(title="CPU us of a streamed token, in one process")
    for column in ("", *(f"{together} together, {streams} streams" for together, streams in shapes)):
        table.add_column(column)
    for way in WAYS:
        if args.only in way.name:
            found = [uvloop.run(measure(way, *shape, args.rounds)) for shape in shapes]
            table.add_row(way.name, *(f"{us:.2f}" for us in found))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
