"""A WebSocket of the gateway without a socket: the client's side, as ASGI has it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.gateway_bench import until


@asynccontextmanager
async def opened(app: Callable[..., Awaitable[None]], socket: AsgiSocket) -> AsyncIterator[AsgiSocket]:
    running = asyncio.create_task(app(socket.scope, socket.receive, socket.send))  # type: ignore[arg-type]  # a coroutine function
    try:
        await until(lambda: socket.status != 0, "an answer to the handshake")
        yield socket
    finally:
        socket.leave()
        await running


class AsgiSocket:
    """The client's side, as ASGI has it."""

    def __init__(self, key: str, headers: Mapping[str, str] | None = None, *, peer: str = "10.0.0.9") -> None:
        fields = {"host": "127.0.0.1:8080", **{n.replace("_", "-"): v for n, v in (headers or {}).items()}}
        if key:
            fields["authorization"] = f"Bearer {key}"
        self.scope: dict[str, Any] = {
            "type": "websocket",
            "path": "/api/v1/ws",
            "scheme": "ws",
            "client": (peer, 5),
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "extensions": {"websocket.http.response": {}},
        }
        self.status = 0
        self.body: Any = None
        self.code: int | None = None
        self.told: list[Any] = []
        self.reads = asyncio.Event()
        """Cleared: it takes nothing."""
        self.reads.set()
        self._in: asyncio.Queue[Any] = asyncio.Queue()
        self._in.put_nowait({"type": "websocket.connect"})

    async def receive(self) -> Any:
        return await self._in.get()

    async def send(self, message: Any) -> None:
        match message["type"]:
            case "websocket.accept":
                self.status = 101
            case "websocket.http.response.start":
                self.status = message["status"]
            case "websocket.http.response.body":
                self.body = json.loads(message["body"])
            case "websocket.send":
                await self.reads.wait()
                self.told.append(json.loads(message["text"]))
            case "websocket.close":
                self.code = message["code"]

    def say(self, message: Any) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self._in.put_nowait({"type": "websocket.receive", "text": text})

    def subscribe(self, channel: str, of: str = "") -> None:
        self.say({"type": "subscribe", "channel": channel, "id": of})

    def leave(self) -> None:
        self.reads.set()
        self._in.put_nowait({"type": "websocket.disconnect", "code": 1005})

    async def until(self, kind: str, **fields: Any) -> Any:
        """The first message like that, taken off."""
        wanted = {"type": kind, **fields}
        found: list[Any] = []

        def there() -> bool:
            found[:] = [one for one in self.told if wanted.items() <= one.items()]
            return bool(found)

        await until(there, str(wanted))
        self.told.remove(found[0])
        return found[0]
