"""Events over a WebSocket, for both clients: opened as any call is, followed for as long as one likes.

`websockets` is imported on first use. It would follow redirects, with the key: ours does not.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from ollama_distributed.base.events import PATH
from ollama_distributed.client.answers import error_of
from ollama_distributed.client.attempts import Failure, Outcome, Succeeded
from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import ClientError
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


async def follow(
    settings: Settings, tried: AsyncTries, follower: Follower, idle_s: float | None
) -> AsyncGenerator[Event]:
    import asyncio

    from websockets.exceptions import ConnectionClosed

    retries = settings.retries
    while True:
        async with AsyncExitStack() as closing:

            async def attempt(url: str, closing: AsyncExitStack = closing) -> Outcome:
                return await _opened_async(settings, url, closing)

            socket: AsyncConnection = await tried(OPEN, attempt, retries)
            try:
                for command in follower.begin():
                    await socket.send(command)
                while True:
                    try:
                        async with asyncio.timeout(idle_s):
                            text = await socket.recv()
                    except TimeoutError:
                        yield IDLE
                        continue
                    events, commands = follower.heard(text)
                    for event in events:
                        yield event
                    for command in commands:
                        await socket.send(command)
            except ConnectionClosed as exc:
                _raise_if_over(follower, exc, retries)
        retries = max(retries, MORE_RETRIES)


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
