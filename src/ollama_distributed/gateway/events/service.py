"""WebSockets at `/api/v1/ws`: which handshakes are answered with one, and how many there may be.

ASGI. A handshake passes what every request passes (`gate.py`), and one thing more: a browser's
cookie counts only from a page of this node itself. What a page reads over a WebSocket no CORS header
withholds from it, and a page at another port of the same host is of the same site to the browser
(cross-site WebSocket hijacking, CWE-1385).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import structlog

from ollama_distributed.base import events
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Forbidden, NotFound, OllamaDistributedError, QueueFull
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.asgi import Receive, Scope, Send
from ollama_distributed.gateway.cookies import SESSION, read_cookie
from ollama_distributed.gateway.errors import as_ours, render_seed
from ollama_distributed.gateway.events.channels import OWN, Channel
from ollama_distributed.gateway.events.connection import AGAIN, Connection, Goodbye
from ollama_distributed.gateway.events.hub import Hub
from ollama_distributed.gateway.gate import Gate, Head, credential, read_head, request_id
from ollama_distributed.gateway.origins import is_own_origin
from ollama_distributed.gateway.summary import Observer, Outcome, Summary
from ollama_distributed.gateway.tasks import Tasks

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_HTTP = {"ws": "http", "wss": "https"}
_BROKE = 1011


class Events:
    """All WebSockets of a node."""

    def __init__(
        self, channels: Mapping[str, Channel], *, gate: Gate, clock: Clock, observe: Observer, tasks: Tasks
    ) -> None:
        self.hub = Hub(channels, tasks)
        self._gate = gate
        self._clock = clock
        self._observe = observe
        self._open: Counter[tuple[str, str, str]] = Counter()
        """By whose they are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # that it connects
        client = scope.get("client")
        head = read_head(
            "GET", scope["path"], scope["headers"], client[0] if client else None, _HTTP[scope["scheme"]]
        )
        start, own_id = self._clock.monotonic(), request_id(head.headers)
        try:
            identity = self._admitted(head)
        except OllamaDistributedError as error:
            status = await _refuse(scope, send, error, own_id)
            self._sum_up(own_id, status, start, error_code=error.code)
            return
        whose = identity.owner
        self._open[whose] += 1
        connection = Connection(self.hub, self._gate, head, identity, self._clock)
        goodbye: Goodbye | None = None
        try:
            await send({"type": "websocket.accept", "headers": [(b"x-request-id", own_id.encode("ascii"))]})
            goodbye = await connection.run(receive, send)
            if goodbye is not None:
                await send({"type": "websocket.close", "code": goodbye.code, "reason": goodbye.reason})
        except OSError:
            return  # the client is gone
        except Exception as exc:
            log.exception("gateway.request_broke", request_id=own_id, path=head.path)
            goodbye = Goodbye(_BROKE, as_ours(exc).code)
            await send({"type": "websocket.close", "code": goodbye.code, "reason": goodbye.reason})
        finally:
            self._open[whose] -= 1
            if not self._open[whose]:
                del self._open[whose]
            ended = f"websocket_{goodbye.code}" if goodbye is not None and goodbye.code != AGAIN else ""
            self._sum_up(own_id, 101, start, identity, connection.bytes_out, error_code=ended)

    def _admitted(self, head: Head) -> Identity:
        """
        Raises:
            OllamaDistributedError: the handshake is refused.
        """
        identity = self._gate.admit(head, OWN).identity
        check_page(head)
        if head.path != events.PATH:
            raise NotFound("there is nothing at this path; WebSockets are at " + events.PATH)
        limits = self._gate.limits
        if self._open.total() >= limits.sockets or self._open[identity.owner] >= limits.sockets_per_caller:
            raise QueueFull("too many WebSockets are open; close one, or ask another node")
        return identity

    def _sum_up(
        self,
        own_id: RequestId,
        status: int,
        start: float,
        identity: Identity | None = None,
        bytes_out: int = 0,
        *,
        error_code: str,
    ) -> None:
        outcome: Outcome = "ok" if status == 101 and not error_code else "error"
        self._observe(
            Summary(
                request_id=own_id,
                method="GET",
                route=events.PATH,
                status=status,
                outcome=outcome,
                error_code=error_code,
                took_s=self._clock.monotonic() - start,
                bytes_out=bytes_out,
                role=identity.role if identity else "",
                key_id=(identity.key_id or "") if identity else "",
                team=identity.team if identity else "",
            )
        )


def check_page(head: Head) -> None:
    """
    Raises:
        Forbidden: a session's cookie, and not from a page of this node.
    """
    headers = head.headers
    if credential(headers) or not read_cookie(headers, SESSION, secure=head.secure):
        return
    if not is_own_origin(headers.get("origin", ""), headers.get("host", "")):
        raise Forbidden("a session opens WebSockets from a page of this node only; send a key instead")


async def _refuse(scope: Scope, send: Send, error: OllamaDistributedError, own_id: RequestId) -> int:
    """Answer the handshake with an error; its status."""
    rendered = render_seed(error, own_id)
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", rendered.content_type.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
        (b"x-request-id", own_id.encode("ascii")),
    ]
    headers += [(name.encode("ascii"), value.encode("latin-1")) for name, value in rendered.headers]
    messages: list[dict[str, Any]] = [
        {"type": "websocket.http.response.start", "status": rendered.status, "headers": headers},
        {"type": "websocket.http.response.body", "body": rendered.body},
    ]
    if "websocket.http.response" not in scope.get("extensions", {}):
        messages = [{"type": "websocket.close", "code": 1008}]  # ASGI: before accept, this is a 403
    try:
        for message in messages:
            await send(message)
    except OSError:
        pass  # the client is gone
    return rendered.status
