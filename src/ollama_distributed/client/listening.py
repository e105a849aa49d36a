"""`WSClient`: events over one WebSocket, subscribed to and unsubscribed from as one goes.

`Client.events` beneath: lost connections are opened again, and what was missed meanwhile is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from ollama_distributed.base.events import What
from ollama_distributed.client.address import socket_base
from ollama_distributed.client.aio import Client
from ollama_distributed.client.errors import ClientError, ConnectionLost
from ollama_distributed.client.following import Event, Follower
from ollama_distributed.client.transport import TIMEOUT_S

if TYPE_CHECKING:
    import asyncio
    import ssl


class WSMessage(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    """The channel."""
    event: What | Literal[""] = ""
    """now: it is so when one subscribes; changed: so since now; gone: for the last time."""
    id: str = ""
    """Of what it is about, in its channel."""
    time: float = 0.0
    """Seconds since the Unix epoch, by the server's clock."""
    data: dict[str, Any]
    """As in docs/events.md, whole each time."""


class WSClient:
    """Follows what happens at `/api/v1/ws`.

    Used as `async with WSClient("ws://localhost:8080/api/v1/ws") as ws`, it is connected inside.

    Args:
        url: ws:// or wss:// (http:// and https:// too), with or without the path; or a list, as `Client`
            takes. Default: `OLLAMA_HOST`, else this machine.
        api_key, timeout, retries, verify: as of `Client`.

    Every method raises `ClientError` or one of its kin.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = 2,
        verify: bool | str | Path | ssl.SSLContext = True,
    ) -> None:
        urls = (url,) if isinstance(url, str) else url
        bases = None if urls is None else [socket_base(one) for one in urls]
        self._client = Client(bases, api_key, timeout=timeout, retries=retries, verify=verify)
        self._begin()

    def _begin(self) -> None:
        self._follower = Follower(refused=self._refused)
        self._following = self._client._following(self._follower)
        self._told: deque[WSMessage] = deque()
        """Heard and not taken yet."""
        self._coming: dict[str, asyncio.Future[None]] = {}
        """Channels of which not all is told that there is."""
        self._ended: deque[ClientError] = deque()
        """Of channels that were taken away, and `listen` has not said so yet."""
        self._reading: asyncio.Lock | None = None

    async def __aenter__(self) -> Self:
        await self.aclose()
        self._begin()
        await self._following.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up; `listen` ends."""
        await self._following.close()

    async def subscribe(self, channel: str, id: str = "") -> None:  # noqa: A002  # as on the wire
        """Follow a channel, or only one request, node or transfer of it; returns when that holds.

        Raises:
            ValueError: there is no such channel.
            Forbidden: one may not follow it.
            NotFound: the server has no such channel.
            Unavailable: nothing is heard of it now.
        """
        import asyncio

        commands = self._follower.subscribe(channel, id)
        answered = self._coming.get(channel)
        if answered is None:
            answered = self._coming[channel] = asyncio.get_running_loop().create_future()
        await self._following.send(commands)
        while not answered.done():
            await self._hear(answered.done)
        answered.result()

    async def unsubscribe(self, channel: str, id: str = "") -> None:  # noqa: A002  # as on the wire
        """Nothing more comes of it. Idempotent."""
        await self._following.send(self._follower.unsubscribe(channel, id))
        if not self._follower.follows(channel):
            self._answered(channel)

    async def listen(self) -> AsyncGenerator[WSMessage]:
        """What there is of all that one subscribed to, then each change, until the client is closed.

        Raises:
            ClientError: a channel was taken away (the others go on with the next `listen`), or there is no
                connection and none can be made.
        """
        while True:
            while self._told:
                yield self._told.popleft()
            if self._ended:
                raise self._ended.popleft()
            try:
                await self._hear(lambda: bool(self._told or self._ended))
            except ConnectionLost:
                if self._following.closed:
                    return
                raise

    async def _hear(self, enough: Callable[[], bool]) -> None:
        """One message more, unless another task that read meanwhile heard `enough`."""
        import asyncio

        if self._reading is None:
            self._reading = asyncio.Lock()
        async with self._reading:
            if enough():
                return
            for event in await self._following.next():
                self._take(event)

    def _take(self, event: Event) -> None:
        if event.what == "ready":
            self._answered(event.channel)
        elif event.what != "idle":
            data = msgspec.to_builtins(event.data)
            self._told.append(
                WSMessage(type=event.channel, event=event.what, id=event.id, time=event.time, data=data)
            )

    def _answered(self, channel: str) -> None:
        coming = self._coming.pop(channel, None)
        if coming is not None and not coming.done():
            coming.set_result(None)

    def _refused(self, channel: str, error: ClientError) -> None:
        coming = self._coming.pop(channel, None)
        if coming is not None and not coming.done():
            coming.set_exception(error)
        else:
            self._ended.append(error)
