"""The API's HTTP servers: a plain one on loopback, one with TLS where other machines come in."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence

import uvicorn

from ollama_distributed.cluster.loops import in_background
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.app import Gateway
from ollama_distributed.gateway.events.connection import MOST_MESSAGE_BYTES
from ollama_distributed.gateway.fast import fast_protocol_class
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.websocket import socket_class
from ollama_distributed.node.api_tls import ApiTLS, CertificateFiles
from ollama_distributed.node.listeners import bound

Leave = Callable[[float], Awaitable[None]]
"""Hands over for so many seconds at most, then tells who still listens."""
HAND_OVER_S = 2.0
"""For giving what was said to other nodes: the first that takes it is enough, and has a second for it."""
LAST_WORDS_S = 1.0
"""After that, for who listens to read that the answer goes on elsewhere, before the doors close."""


async def _nothing(_hand_over_s: float) -> None:
    pass


def parting(drain_s: float) -> tuple[float, float]:
    """When in a drain that long the rest is left, and how long it is handed over then: a short drain
    is shared alike. Pure."""
    last_s = min(drain_s, HAND_OVER_S + LAST_WORDS_S)
    return drain_s - last_s, last_s * HAND_OVER_S / (HAND_OVER_S + LAST_WORDS_S)


class Stop:
    """SIGINT and SIGTERM. The first lets running answers end, the second cuts them."""

    def __init__(self) -> None:
        self.wanted = False
        self.leave: Leave = _nothing
        """Called before what still runs at the end of the drain is cut."""
        self._servers: list[_Server] = []

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def drain_within(self, seconds: int) -> None:
        """How long running answers may go on, from now on."""
        for server in self._servers:
            server.config.timeout_graceful_shutdown = seconds

    def adopt(self, server: _Server) -> None:
        self._servers.append(server)
        server.should_exit = self.wanted

    def all(self) -> None:
        """As a first signal does."""
        self.wanted = True
        for server in self._servers:
            server.should_exit = True

    def _signalled(self) -> None:
        for server in self._servers:
            server.force_exit = self.wanted
        self.all()


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, leaves signals to the node, and looks at nothing while
    nothing happens."""

    def __init__(
        self, config: uvicorn.Config, handshake_s: float, on_started: Callable[[], None], stop: Stop
    ) -> None:
        self._exit = asyncio.Event()
        super().__init__(config)
        self._handshake_s = handshake_s
        self._on_started = on_started
        self._stop = stop

    @property
    def should_exit(self) -> bool:
        return self._exit.is_set()

    @should_exit.setter
    def should_exit(self, wanted: bool) -> None:
        self._exit.set() if wanted else self._exit.clear()

    async def main_loop(self) -> None:
        await self.on_tick(0)  # the headers of all answers
        await self._exit.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        for listener in sockets or ():  # as uvicorn does, but that it gives a TLS handshake a minute
            server = await asyncio.get_running_loop().create_server(
                self._connection,
                sock=listener,
                backlog=self.config.backlog,
                ssl=self.config.ssl,
                ssl_handshake_timeout=self._handshake_s if self.config.ssl else None,
            )
            self.servers.append(server)
        self._on_started()

    def _connection(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]  # uvicorn's own class, by its contract
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain_s = self.config.timeout_graceful_shutdown or 0

        async def leave() -> None:
            answers_end_s, hand_over_s = parting(drain_s)
            await asyncio.sleep(answers_end_s)
            await self._stop.leave(hand_over_s)

        leaving = asyncio.create_task(leave(), name="leave what still runs")
        try:
            await super().shutdown(sockets)
        finally:
            await end([leaving])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: Gateway,
    listeners: Sequence[socket.socket],
    *,
    limits: Limits,
    drain_s: int,
    certificate: CertificateFiles,
    stop: Stop,
    on_started: Callable[[], None],
    on_tls: Callable[[ApiTLS], None],
) -> None:
    """Serve until `stop`. `on_started` is called once, when every listener answers; `on_tls` before that,
    where there is a listener with TLS.

    Raises:
        Invalid: the certificate cannot be used.
        Unavailable: the node's own certificate does not come.
    """
    plain = [listener for listener in listeners if not bound(listener).secure]
    secure = [listener for listener in listeners if bound(listener).secure]
    waiting = sum(1 for group in (plain, secure) if group)

    def started() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            on_started()

    async def answer(group: list[socket.socket], context: ssl.SSLContext | None) -> None:
        server = _Server(_http(app, limits, drain_s, context), limits.handshake_deadline_s, started, stop)
        stop.adopt(server)
        try:
            if not stop.wanted:
                await server.serve(sockets=group)
        finally:
            stop.all()  # one server alone is half a node

    async def answer_with_tls() -> None:
        # Waits for its certificate; the plain server answers meanwhile.
        tls = await ApiTLS.opened(certificate, given_up=lambda: stop.wanted)
        if tls is None:
            return
        on_tls(tls)
        async with contextlib.AsyncExitStack() as stack:
            in_background(stack, "api certificate", tls.follow)
            await answer(secure, tls.front)

    serving = [asyncio.create_task(answer(plain, None), name="api")] if plain else []
    if secure:
        serving.append(asyncio.create_task(answer_with_tls(), name="api with TLS"))
    try:
        await asyncio.gather(*serving)
    finally:
        stop.all()
        await asyncio.wait(serving)


def _http(app: Gateway, limits: Limits, drain_s: int, context: ssl.SSLContext | None) -> uvicorn.Config:
    http = fast_protocol_class(app.hot, limits, app.overload)
    return uvicorn.Config(
        app,
        http=http,
        ws=socket_class(http),
        ws_max_size=MOST_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # 1 MB of zeros comes as 1 KB
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=drain_s,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
