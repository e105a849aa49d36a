"""A hot path over a `ScriptedInference`, an `Out` that remembers, and a gateway on a socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.errors import ModelNotFound
from ollama_distributed.base.inference import Delta, Finished, Opened, Usage
from ollama_distributed.gateway.app import Gateway, create_app
from ollama_distributed.gateway.dialects import ollama, seed
from ollama_distributed.gateway.events.connection import MOST_MESSAGE_BYTES
from ollama_distributed.gateway.fast import fast_protocol_class
from ollama_distributed.gateway.gate import Gate, Head
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.gateway.ports import VersionInfo
from ollama_distributed.gateway.protocol import protocol_class
from ollama_distributed.gateway.websocket import socket_class
from tests.limits import SOON_S

HOST = {"host": "127.0.0.1:8080"}
WALL = 1_700_000_000.25
STAMP = "2023-11-14T22:13:20.250000Z"
USAGE = Usage(
    prompt_tokens=7, completion_tokens=2, total_s=0.5, load_s=0.25, prompt_s=0.125, completion_s=0.0625
)
HELLO = (Opened(prompt_tokens=7), Delta(text="Hel"), Delta(text="lo"), Finished(reason="stop", usage=USAGE))


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return WALL


class Recorder:
    """An `Out`: refuses a second end, as a socket would."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.streamed = False

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert self.status == 0, "two heads"
        self.status = status
        self.headers = {name.decode(): value.decode() for name, value in headers}

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self._begin(status, headers)
        self.body = body
        self.ended = True

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._begin(status, headers)
        self.streamed = True

    def write(self, data: bytes) -> None:
        assert self.streamed
        assert not self.ended
        self.body += data

    def end(self) -> None:
        assert not self.ended, "two ends"
        self.ended = True

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        assert self.body.endswith(b"\n")
        return [json.loads(line) for line in self.body.splitlines()]


class Bench:
    """Opens exchanges and keeps their summaries."""

    def __init__(
        self,
        inference: Any,
        *,
        limits: Limits | None = None,
        require_key: bool = False,
        keys: tuple[Any, ...] = (),
        policy: SitePolicy | None = None,
        routes: Any = (*ollama.ROUTES, *seed.ROUTES),
    ) -> None:
        self.inference = inference
        self.summaries: list[Any] = []
        self.tasks: list[Any] = []
        self.clock = Clock()
        self.path = HotPath(
            routes=routes,
            inference=inference,
            gate=Gate(
                Authenticator(keys, require_key=require_key, wall=self.clock.time),
                policy or SitePolicy(),
                limits or Limits(),
            ),
            clock=self.clock,
            observe=self.summaries.append,
            spawn=self.spawn,
            offload=self.offload,
        )

    def spawn(self, coroutine: Any) -> Any:
        """Runs it to its end at once: a fake answers without waiting."""
        try:
            coroutine.send(None)
        except StopIteration:
            return lambda: None
        raise AssertionError("the fake waited")

    async def offload(self, work: Any) -> Any:
        return work()

    def open(
        self, path: str, *, method: str = "POST", peer: str | None = "127.0.0.1", **headers: str
    ) -> tuple[Any, Recorder]:
        out = Recorder()
        fields = {**HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.path.open(Head(method, path, fields, 1, peer), out), out

    def post(self, path: str, body: Any, **headers: str) -> Recorder:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        exchange, out = self.open(path, **headers)
        exchange.receive(data)
        exchange.body_complete()
        return out


# ── a gateway on a socket ───────────────────────────────────────────────────────────

DEADLINE_S = SOON_S


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `what`, with a deadline."""
    assert what
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


class NoModels:
    """A catalogue without models."""

    def list(self) -> list[Any]:
        return []

    async def resolve(self, name: str) -> Any:
        raise ModelNotFound(f"model '{name}' not found")


class NothingLoaded:
    def loaded(self) -> list[Any]:
        return []

    async def unload(self, name: str) -> None:
        return None


def gateway(inference: Any, *, limits: Limits | None = None, **extra: Any) -> Gateway:
    parts = {
        "catalog": NoModels(),
        "residents": NothingLoaded(),
        "authenticator": Authenticator((), require_key=False, wall=lambda: WALL),
        "version": VersionInfo(version="1.2.3", ollama="0.32.15", node="n1"),
    }
    return create_app(inference=inference, limits=limits, **{**parts, **extra})


class Server:
    def __init__(self, port: int, app: Gateway, watch: Any, server: uvicorn.Server) -> None:
        self.port = port
        self.app = app
        self.watch = watch
        self.server = server

    async def connect(self) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", self.port))


@asynccontextmanager
async def serving(
    app: Gateway, *, adapter: str, limits: Limits | None = None, port: int = 0
) -> AsyncIterator[Server]:
    """`adapter`: `fast`, or `asgi` for the same limits with ASGI in between. `port`: 0 for a free one."""
    limits = limits or Limits()
    kind = (
        fast_protocol_class(app.hot, limits, app.overload)
        if adapter == "fast"
        else protocol_class(limits, app.overload)
    )
    config = uvicorn.Config(
        app,
        http=kind,
        ws=socket_class(kind),
        ws_max_size=MOST_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        lifespan="off",
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", port))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started or task.done(), "the server starts")
        yield Server(listener.getsockname()[1], app, kind.watch, server)
    finally:
        server.should_exit = True
        server.force_exit = True
        async with asyncio.timeout(DEADLINE_S):
            await task
            await app.close()
        listener.close()


@asynccontextmanager
async def talking(inference: Any, adapter: str, limits: Limits | None = None) -> AsyncIterator[Connection]:
    """One connection to a gateway over `inference`."""
    app = gateway(inference, limits=limits)
    async with serving(app, adapter=adapter, limits=limits) as server, await server.connect() as client:
        yield client


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """A client that sends exactly the bytes it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            return

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, body: bytes | dict[str, Any], *fields: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.send(request_bytes("POST", path, data, *fields))

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(DEADLINE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        status, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        return int(status.split()[1]), {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }

    async def chunk(self) -> bytes:
        """One piece of a chunked body; empty at its end."""
        async with asyncio.timeout(DEADLINE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def answer(self) -> Answer:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while piece := await self.chunk():
                body += piece
        else:
            async with asyncio.timeout(DEADLINE_S):
                body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body)

    async def closed(self) -> bool:
        """Whether the server closes the connection without another byte."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self.reader.read(1) == b""
            except ConnectionResetError:
                return True


def request_bytes(method: str, path: str, body: bytes = b"", *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1:8080", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
