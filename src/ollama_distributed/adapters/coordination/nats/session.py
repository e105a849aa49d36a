"""One connection to NATS: kept up for ever, its errors in our words.

Defaults changed, each for a reason: reconnect without end and with jitter (10,000 nodes come
back within seconds, not at once); pings of 1 s (a hung server is seen in 3 s); nothing is
buffered while disconnected (a write must not happen minutes after it was refused).
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Mapping

import anyio
import msgspec
import nats.errors
import structlog
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ollama_distributed.base.errors import Unavailable

log = structlog.get_logger()

CONNECTION_ERROR = "coordination.connection_error"

RECONNECT_S = (0.1, 0.5)
PING_INTERVAL_S = 1
MAX_PINGS = 2
CONNECT_TIMEOUT_S = 2


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers are and who we are to them."""

    urls: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    tls_hostname: str | None = None


class NoResponders(Exception):
    """The server knows nobody who listens there: the request reached no one."""


class Session:
    """Enter it to connect; leave it to close."""

    def __init__(self, address: Address, *, name: str) -> None:
        self._address = address
        self._name = name
        self._connection = Client()
        self._up = anyio.Event()
        self._on_reconnect: list[Callable[[], None]] = []

    async def open(self, timeout_s: float) -> None:
        """
        Raises:
            Unavailable: no server within `timeout_s`.
        """
        try:
            with anyio.fail_after(timeout_s):
                await self._connection.connect(
                    list(self._address.urls),
                    name=self._name,
                    user=self._address.user,
                    password=self._address.password,
                    tls=self._address.tls,
                    tls_hostname=self._address.tls_hostname,
                    max_reconnect_attempts=-1,
                    reconnect_to_server_handler=_with_jitter,
                    connect_timeout=CONNECT_TIMEOUT_S,
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=MAX_PINGS,
                    pending_size=0,
                    inbox_prefix=f"_INBOX_{self._name}",
                    error_cb=self._failed,
                    disconnected_cb=self._went_down,
                    reconnected_cb=self._came_up,
                )
        except (TimeoutError, OSError, nats.errors.Error) as exc:
            await self._connection.close()
            raise Unavailable(f"no coordination server answers at {', '.join(self._address.urls)}") from exc
        self._up.set()

    async def close(self) -> None:
        await self._connection.close()

    @property
    def connected(self) -> bool:
        return self._connection.is_connected

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._on_reconnect.append(callback)

    async def wait_connected(self) -> None:
        while not self._connection.is_connected:
            await self._up.wait()

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """
        Raises:
            NoResponders: it reached no one.
            Unavailable: it was not sent.
            TimeoutError: no answer; it may have had its effect.
        """
        try:
            answer = await self._connection.request(
                subject, data, timeout=timeout_s, headers=dict(headers) if headers else None
            )
        except nats.errors.NoRespondersError as exc:
            raise NoResponders from exc
        except nats.errors.TimeoutError as exc:
            raise TimeoutError from exc
        except (nats.errors.Error, OSError) as exc:
            raise Unavailable("no connection to the coordination server") from exc
        return answer.data

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """
        Raises:
            Unavailable: it was not sent.
        """
        try:
            await self._connection.publish(subject, data, headers=dict(headers) if headers else None)
        except (nats.errors.Error, OSError) as exc:
            raise Unavailable("no connection to the coordination server") from exc

    async def subscribe(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """From its return on nothing is missed while the connection holds; kept over
        reconnects. `callback` runs on the loop, in order.

        Raises:
            Unavailable: there is no connection.
        """

        async def call(message: Msg) -> None:
            callback(message)

        try:
            subscription = await self._connection.subscribe(subject, cb=call)
            await self._connection.flush(timeout=CONNECT_TIMEOUT_S)
        except (nats.errors.Error, OSError) as exc:
            raise Unavailable("no connection to the coordination server") from exc
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        """From its return on the servers send nothing more: a request that comes later is
        told that nobody answers."""
        try:
            await subscription.unsubscribe()
            if self.connected:
                await self._connection.flush(timeout=CONNECT_TIMEOUT_S)
        except (nats.errors.Error, OSError):
            return  # the connection is gone, and the subscription with it

    def inbox(self) -> str:
        return self._connection.new_inbox()

    # ── what the connection tells ───────────────────────────────────────────────────

    async def _failed(self, error: Exception) -> None:
        # Refused permissions come this way only; the call itself just times out.
        log.warning(CONNECTION_ERROR, reason=str(error) or type(error).__name__)

    async def _went_down(self) -> None:
        self._up = anyio.Event()

    async def _came_up(self) -> None:
        self._up.set()
        for callback in self._on_reconnect:
            callback()


def _with_jitter(servers: list[Server], _: dict[str, object]) -> tuple[Server, float]:
    return random.choice(servers), random.uniform(*RECONNECT_S)  # noqa: S311  # spreads load, guards nothing
