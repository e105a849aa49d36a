"""One connection to NATS: kept up for ever, its errors in our words.

Defaults changed, each for a reason: reconnect without end and with jitter (10,000 nodes come
back within seconds, not at once); pings of 1 s (a hung server is seen in 3 s); nothing is
buffered while disconnected (a write must not happen minutes after it was refused); TLS before
the server's first word. The servers are the ones we are told of: they advertise no others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

import anyio
import msgspec
import nats.errors
import structlog
from nats.aio.client import Client, Server, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as LiveSubscription
from nats.aio.transport import TcpTransport

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

CONNECTION_ERROR = "coordination.connection_error"

RECONNECT_S = (0.1, 0.5)
PING_INTERVAL_S = 1
MAX_PINGS = 2
CONNECT_TIMEOUT_S = 2
CLOSE_S = 1
SHORT_CONNECT_S = 2.0
"""For one server of several; one that lives takes milliseconds."""
POLL_S = 0.05
BUFFER_BYTES = 32 * 1024
"""The library's own default: of one read."""
MAX_FAILURES = 16
NO_CONNECTION = "no connection to the coordination server"


class Login(Protocol):
    """Who we are to the servers, and how we know them. Asked at each connection, so renewed
    certificates and JWTs are used. `adapters.identity.nats_access` has them."""

    @property
    def tls_hostname(self) -> str:
        """What a server's certificate must state, wherever it is dialled."""
        ...

    def tls(self) -> ssl.SSLContext: ...

    def jwt(self) -> str: ...

    def sign(self, nonce: bytes) -> bytes:
        """With the private key of the JWT's user."""
        ...


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are (`tls://host:port`) and who we are to them."""

    urls: tuple[str, ...]
    login: Login


class NoResponders(Exception):
    """The server knows nobody who listens there: the request reached no one."""


class Subscription:
    """Kept over reconnects, and made as soon as there is a connection."""

    def __init__(self, subject: str, callback: Callable[[Msg], None]) -> None:
        self.subject = subject
        self.callback = callback
        self.live: LiveSubscription | None = None


class _Transport(TcpTransport):
    """Closes at once: TLS would wait 30 s for the farewell of a server that hangs, and for ever
    where the handshake was broken off (asyncio's stream is not told of that end)."""

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    async def wait_closed(self) -> None:
        await asyncio.sleep(0)  # an aborted socket is closed at the loop's next turn


class Connection(Client):
    """The library's client, but for five things: each connection asks for the TLS context anew,
    a broken one is given up at once, an answer that nobody waits for any more ends nothing, no
    error that a server reports is final (a JWT that expired was renewed meanwhile), and `flush`
    does not return before the server has all that was sent."""

    def __init__(self, login: Login) -> None:
        super().__init__()
        self._login = login

    @property
    def ssl_context(self) -> ssl.SSLContext:
        return self._login.tls()

    async def _connect_to_server(self, s: Srv) -> None:
        s.last_attempt = time.monotonic()
        self._transport = _Transport()  # type: ignore[no-untyped-call]  # the library's constructor
        await self._transport.connect(
            s.uri, buffer_size=BUFFER_BYTES, connect_timeout=self.options["connect_timeout"]
        )

    async def flush(self, timeout: float = CONNECT_TIMEOUT_S) -> None:  # noqa: ASYNC109  # the library's signature
        # The library's ping overtakes what waits for its writing task: a subscription, for instance.
        await self._flush_pending(force_flush=True)
        await super().flush(timeout)  # type: ignore[arg-type]  # it takes parts of a second, too

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():  # who waited has gone; the library would stop reading
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg.lower():
            await super()._process_err(err_msg)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {err_msg}"))


async def connect(connection: Connection, address: Address, *, name: str, **options: object) -> None:
    """Connect `connection` as `address` says."""
    login = address.login
    await connection.connect(
        list(address.urls),
        name=name,
        inbox_prefix=f"_INBOX_{name}",
        tls_hostname=login.tls_hostname,
        tls_handshake_first=True,
        user_jwt_cb=lambda: bytearray(login.jwt().encode()),
        signature_cb=lambda nonce: base64.b64encode(login.sign(nonce.encode())),
        connect_timeout=CONNECT_TIMEOUT_S,
        **options,  # type: ignore[arg-type]  # what the library names
    )


@asynccontextmanager
async def short_connection(address: Address, *, name: str) -> AsyncIterator[Connection]:
    """A connection for a question or two: to whichever server answers first, not kept up.

    Raises:
        Unavailable: none answers, or the connection breaks inside.
    """
    connection = await _first_that_answers(address, name)
    try:
        yield connection
    except (OSError, nats.errors.Error, TimeoutError) as exc:
        raise Unavailable(f"the coordination server does not answer: {_reason(exc)}") from exc
    finally:
        await connection.close()


async def _first_that_answers(address: Address, name: str) -> Connection:
    failure: Exception | None = None
    for url in random.sample(address.urls, len(address.urls)):
        connection = Connection(address.login)
        one = msgspec.structs.replace(address, urls=(url,))
        try:
            with anyio.fail_after(SHORT_CONNECT_S):
                await connect(
                    connection,
                    one,
                    name=name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # two tries; 0 would mean without end
                    reconnect_time_wait=POLL_S,
                    error_cb=_ignore,
                )
            return connection
        except (OSError, nats.errors.Error, TimeoutError) as exc:
            failure = exc
            await connection.close()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await connection.close()
            raise
    raise Unavailable(f"no coordination server answers: {_reason(failure)}") from failure


def _reason(failure: Exception | None) -> str:
    return str(failure) or type(failure).__name__


async def _ignore(_: Exception) -> None:
    """A server that is not there: the next one is tried, or the question fails."""


class Session:
    """`start` it to connect in the background; `close` it in the end."""

    def __init__(self, address: Address, *, name: str) -> None:
        self._address = address
        self._name = name
        self._connection = Connection(address.login)
        self._connecting: asyncio.Task[None] | None = None
        self._began = False
        """From now on the library repeats subscriptions by itself."""
        self._up = anyio.Event()
        self._on_connect: list[Callable[[], None]] = []
        self._subscriptions: list[Subscription] = []
        self._failures: dict[str, None] = {}
        """What went wrong since the last connection, each thing once, in order."""

    # ── life ────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._connecting = asyncio.create_task(self._connect(), name="connect to coordination")

    async def open(self, timeout_s: float) -> None:
        """`start`, and wait for the connection.

        Raises:
            Unavailable: no server within `timeout_s`.
        """
        self.start()
        try:
            with anyio.fail_after(timeout_s):
                await self.wait_connected()
        except TimeoutError as exc:
            await self.close()
            urls = ", ".join(self._address.urls)
            reasons = "; ".join(self._failures) or "silence"
            raise Unavailable(f"no coordination server answers at {urls}: {reasons}") from exc

    async def close(self) -> None:
        if self._connecting is not None:
            await end([self._connecting])
        if self._connection.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError):  # what was published leaves first
                await self._connection.flush(timeout=CLOSE_S)
        await self._connection.close()

    async def _connect(self) -> None:
        """The first time; from then on the library reconnects."""
        await connect(
            self._connection,
            self._address,
            name=self._name,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_S[0],
            reconnect_to_server_handler=_with_jitter,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=MAX_PINGS,
            pending_size=0,
            error_cb=self._failed,
            disconnected_cb=self._went_down,
            reconnected_cb=self._came_up,
        )
        waiting = list(self._subscriptions)
        self._began = True
        for subscription in waiting:
            await self._make(subscription)
        await self._came_up()

    @property
    def connected(self) -> bool:
        return self._connection.is_connected

    def update_servers(self, urls: Iterable[str]) -> None:
        """The servers to try from the next reconnect on; a connection to one that is no longer
        named stays until it ends. Never empty."""
        self._address = msgspec.structs.replace(self._address, urls=tuple(urls))
        assert self._address.urls, "a client without servers would never come back"
        if not self._connection.is_closed:
            self._connection.set_server_pool(list(self._address.urls))

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Called after each connection, the first one too."""
        self._on_connect.append(callback)

    async def wait_connected(self) -> None:
        while not (self._connection.is_connected and self._up.is_set()):
            await self._up.wait()

    # ── speaking ────────────────────────────────────────────────────────────────────

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """
        Raises:
            NoResponders: it reached no one.
            Unavailable: it was not sent.
            TimeoutError: no answer; it may have had its effect.
        """
        if not self.connected:
            raise Unavailable(NO_CONNECTION)
        try:
            answer = await self._connection.request(
                subject, data, timeout=timeout_s, headers=dict(headers) if headers else None
            )
        except nats.errors.NoRespondersError as exc:
            raise NoResponders from exc
        except nats.errors.TimeoutError as exc:
            raise TimeoutError from exc
        except (nats.errors.Error, OSError) as exc:
            raise Unavailable(NO_CONNECTION) from exc
        return answer.data

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """
        Raises:
            Unavailable: it was not sent.
        """
        if not self.connected:
            raise Unavailable(NO_CONNECTION)
        try:
            await self._connection.publish(subject, data, headers=dict(headers) if headers else None)
        except (nats.errors.Error, OSError) as exc:
            raise Unavailable(NO_CONNECTION) from exc

    async def subscribe(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """From its return on nothing is missed while a connection holds; without one it begins
        with the next. `callback` runs on the loop, in order."""
        subscription = Subscription(subject, callback)
        self._subscriptions.append(subscription)
        if self._began:
            await self._make(subscription)
        return subscription

    async def _make(self, subscription: Subscription) -> None:
        async def call(message: Msg) -> None:
            subscription.callback(message)

        try:
            subscription.live = await self._connection.subscribe(subscription.subject, cb=call)
            if self.connected:
                await self._connection.flush(timeout=CONNECT_TIMEOUT_S)
        except (nats.errors.Error, OSError) as exc:
            # The connection broke; the next one repeats what the library holds.
            await self._failed(exc)

    async def unsubscribe(self, subscription: Subscription) -> None:
        """From its return on the servers send nothing more: a request that comes later is
        told that nobody answers."""
        self._subscriptions.remove(subscription)
        if subscription.live is None:
            return
        try:
            await subscription.live.unsubscribe()
            if self.connected:
                await self._connection.flush(timeout=CONNECT_TIMEOUT_S)
        except (nats.errors.Error, OSError):
            return  # the connection is gone, and the subscription with it

    def inbox(self) -> str:
        return self._connection.new_inbox()

    # ── what the connection tells ───────────────────────────────────────────────────

    async def _failed(self, error: Exception) -> None:
        # Refused permissions come this way only; the call itself just times out.
        reason = str(error) or type(error).__name__
        if reason not in self._failures:  # a server that is away says the same ten times a second
            log.warning(CONNECTION_ERROR, reason=reason)
        if len(self._failures) < MAX_FAILURES:
            self._failures[reason] = None

    async def _went_down(self) -> None:
        if self._up.is_set():
            self._up = anyio.Event()

    async def _came_up(self) -> None:
        self._failures.clear()
        self._up.set()
        for callback in self._on_connect:
            callback()


def _with_jitter(servers: list[Server], _: dict[str, object]) -> tuple[Server, float]:
    return random.choice(servers), random.uniform(*RECONNECT_S)  # noqa: S311  # spreads load, guards nothing
