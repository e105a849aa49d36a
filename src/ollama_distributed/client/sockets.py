"""Events over a WebSocket, for both clients: opened as any call is, followed for as long as one likes.

`websockets` is imported on first use. It would follow redirects, with the key: ours does not.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from ollama_distributed.base.events import PATH
from ollama_distributed.client.answers import error_of
from ollama_distributed.client.attempts import Failure, Outcome, Succeeded
from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import ClientError, ConnectionLost
from ollama_distributed.client.following import IDLE, Event, Follower
from ollama_distributed.client.reattach import MORE_RETRIES
from ollama_distributed.client.transport import Settings

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection as AsyncConnection
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Response
    from websockets.sync.client import ClientConnection as SyncConnection

OPEN: Call[None] = Call(method="GET", path=PATH, decode=lambda _: None, repeat="always")
"""For how it is tried: nothing is lost where it is opened twice."""
ABNORMAL = 1006
"""RFC 6455 7.4.1: it ended without being closed."""


class _Refused(Exception):
    """The server answered the handshake with something else."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class AsyncTries(Protocol):
    """`client.aio.Client._tried`."""

    def __call__(
        self, call: Call[Any], attempt: Callable[[str], Awaitable[Outcome]], retries: int | None, /
    ) -> Awaitable[Any]: ...


class Tries(Protocol):
    """`client.sync.SyncClient._tried`."""

    def __call__(self, call: Call[Any], attempt: Callable[[str], Outcome], retries: int | None, /) -> Any: ...


class Following:
    """One connection after another, as long as they are followed. One task reads at a time."""

    def __init__(self, settings: Settings, tried: AsyncTries, follower: Follower) -> None:
        self._settings = settings
        self._tried = tried
        self._follower = follower
        self._retries = settings.retries
        self._socket: AsyncConnection | None = None
        self._closing = AsyncExitStack()
        self.closed = False

    async def open(self) -> AsyncConnection:
        """The connection that there is, else a new one.

        Raises:
            ClientError: it is refused, nobody answers, or all is closed.
        """
        if self.closed:
            raise ConnectionLost("the client for events was closed")
        if self._socket is None:

            async def attempt(url: str) -> Outcome:
                return await _opened_async(self._settings, url, self._closing)

            self._socket = await self._tried(OPEN, attempt, self._retries)
            self._retries = max(self._retries, MORE_RETRIES)
            await self.send(self._follower.begin())
        return self._socket

    async def send(self, commands: Sequence[str]) -> None:
        """Without a connection they are not needed: the next begins with all that is followed."""
        from websockets.exceptions import ConnectionClosed

        socket = self._socket
        if socket is None:
            return
        try:
            for command in commands:
                await socket.send(command)
        except ConnectionClosed:
            pass  # whoever reads finds out

    async def next(self, idle_s: float | None = None) -> list[Event]:
        """Of the next message.

        Raises:
            ClientError: it is over.
        """
        import asyncio

        from websockets.exceptions import ConnectionClosed

        socket = await self.open()
        try:
            async with asyncio.timeout(idle_s):
                text = await socket.recv()
        except TimeoutError:
            return [IDLE]
        except ConnectionClosed as exc:
            await self._left()
            _raise_if_over(self._follower, exc, 0 if self.closed else self._settings.retries)
            return []
        events, commands = self._follower.heard(text)
        await self.send(commands)
        return events

    async def close(self) -> None:
        self.closed = True
        await self._left()

    async def _left(self) -> None:
        self._socket = None
        await self._closing.aclose()


async def follow(following: Following, idle_s: float | None) -> AsyncGenerator[Event]:
    try:
        while True:
            for event in await following.next(idle_s):
                yield event
    finally:
        await following.close()


def follow_sync(
    settings: Settings, tried: Tries, follower: Follower, idle_s: float | None
) -> Generator[Event, None, None]:
    from websockets.exceptions import ConnectionClosed

    retries = settings.retries
    while True:
        with ExitStack() as closing:

            def attempt(url: str, closing: ExitStack = closing) -> Outcome:
                return _opened(settings, url, closing)

            socket: SyncConnection = tried(OPEN, attempt, retries)
            try:
                for command in follower.begin():
                    socket.send(command)
                while True:
                    try:
                        text = socket.recv(idle_s)
                    except TimeoutError:
                        yield IDLE
                        continue
                    events, commands = follower.heard(text)
                    yield from events
                    for command in commands:
                        socket.send(command)
            except ConnectionClosed as exc:
                _raise_if_over(follower, exc, retries)
        retries = max(retries, MORE_RETRIES)


def _raise_if_over(follower: Follower, closed: ConnectionClosed, retries: int) -> None:
    """Unless another connection is to be opened: one that said nothing would be followed by many."""
    code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd is not None else (ABNORMAL, "")
    error = follower.lost(code, reason)
    if not error.retryable or not retries or not follower.heard_any:
        raise error from closed


async def _opened_async(settings: Settings, url: str, closing: AsyncExitStack) -> Outcome:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import InvalidStatus, WebSocketException

    class Connection(ClientConnection):
        async def handshake(self, *args: Any, **named: Any) -> None:
            try:
                await super().handshake(*args, **named)
            except InvalidStatus as exc:
                raise _Refused(exc.response) from exc

    try:
        opening = connect(**settings.socket_arguments(url), create_connection=Connection)
        return Succeeded(await closing.enter_async_context(opening))
    except _Refused as refused:
        return _refusal(refused.response)
    except (OSError, WebSocketException) as exc:
        return Failure(stage="connect", text=str(exc) or type(exc).__name__)


def _opened(settings: Settings, url: str, closing: ExitStack) -> Outcome:
    from websockets.exceptions import InvalidStatus, WebSocketException
    from websockets.sync.client import ClientConnection, connect

    class Connection(ClientConnection):
        def handshake(self, *args: Any, **named: Any) -> None:
            try:
                super().handshake(*args, **named)
            except InvalidStatus as exc:
                raise _Refused(exc.response) from exc

    try:
        opening = connect(**settings.socket_arguments(url), create_connection=Connection)
        return Succeeded(closing.enter_context(opening))
    except _Refused as refused:
        return _refusal(refused.response)
    except (OSError, WebSocketException) as exc:
        return Failure(stage="connect", text=str(exc) or type(exc).__name__)


def _refusal(response: Response) -> ClientError:
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return error_of(response.status_code, headers, bytes(response.body or b""), now=time.time())
