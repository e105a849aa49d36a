"""The cluster's listener as ASGI: one route for joiners, every other behind a node certificate.

GET  /cluster/v1/join   the CA certificates, public
POST /cluster/v1/join   join with a token, or renew with the node's own key
else                    the inner app, once the peer's certificate was checked; it finds the
                        `Peer` in `scope["state"]["peer"]`

Sits behind `PeerCertificates` (`listener.py`), which says who the peer is. Header limits and
deadlines are the protocol's; body size, body deadline and the number of joins at once are here.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.identity.listener import TLS
from ollama_distributed.adapters.identity.tls import peer_of
from ollama_distributed.base.errors import (
    BodyTooLarge,
    Forbidden,
    Internal,
    Malformed,
    MethodNotAllowed,
    OllamaDistributedError,
    QueueFull,
    RequestTimeout,
    Unavailable,
)
from ollama_distributed.cluster.identity.admission import Admission
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.identity.wire import (
    JOIN_PATH,
    MAX_REQUEST_BYTES,
    CAAnswer,
    Credentials,
    ErrorAnswer,
    JoinRequest,
    RenewRequest,
)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_DEADLINE_S = 10.0
"""A request has 2 KiB; a joiner that needs longer is holding the door open."""
ANSWER_DEADLINE_S = 10.0
"""Several refusals of the store (2 s each) and the signing."""
MAX_JOINS = 64
"""At once; more are told to come again."""

_PEER = "ollama_distributed.peer"

log = structlog.get_logger("identity.handshake")


class ClusterListener:
    """`check_peer` raises for a peer that may not speak here (removed, another cluster);
    `status_of` is the gateway's: only it knows HTTP statuses."""

    def __init__(
        self,
        inner: App,
        admission: Admission,
        *,
        check_peer: Callable[[Peer], None],
        status_of: Callable[[OllamaDistributedError], int],
    ) -> None:
        self._inner = inner
        self._admission = admission
        self._check_peer = check_peer
        self._status_of = status_of
        self._joins = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Internal("the cluster's listener speaks HTTP only")
        try:
            if scope["path"] == JOIN_PATH:
                answer: msgspec.Struct = await self._join(scope, receive)
            else:
                peer = peer_of_scope(scope)
                self._check_peer(peer)
                scope.setdefault("state", {})["peer"] = peer
                await self._inner(scope, receive, send)
                return
        except OllamaDistributedError as refused:
            await _send(
                send,
                self._status_of(refused),
                ErrorAnswer(refused.message, refused.code),
                retry_after_s=refused.retry_after_s if isinstance(refused, QueueFull) else 0.0,
            )
            return
        await _send(send, 200, answer)

    async def _join(self, scope: Scope, receive: Receive) -> CAAnswer | Credentials:
        if scope["method"] == "GET":
            return CAAnswer(tuple(pem.decode() for pem in self._admission.authorities()))
        if scope["method"] != "POST":
            raise MethodNotAllowed("GET the CA, or POST a request to join")
        if self._joins >= MAX_JOINS:
            raise QueueFull("too many nodes join at this moment", retry_after_s=1.0)
        self._joins += 1
        try:
            request = await _read(scope, receive)
            source = scope["client"][0] if scope.get("client") else ""
            with anyio.fail_after(ANSWER_DEADLINE_S):
                if isinstance(request, JoinRequest):
                    return await self._admission.join(request, source)
                return await self._admission.renew(request, source)
        except TimeoutError as late:
            raise Unavailable("the cluster cannot decide now; try again") from late
        except OllamaDistributedError:
            raise
        except Exception as defect:
            # The joiner must not see a foreign error's text; the log must, without the request.
            log.exception("join.failed", error=type(defect).__name__)
            raise Internal("the join failed; the server's log has the details") from defect
        finally:
            self._joins -= 1


def peer_of_scope(scope: Scope) -> Peer:
    """Read from the certificate once per connection.

    Raises:
        Forbidden: the connection has no node certificate.
    """
    known = scope.get("extensions", {})
    peer = known.get(_PEER)
    if isinstance(peer, Peer):
        return peer
    connection = known.get(TLS)
    if not isinstance(connection, ssl.SSLObject):
        raise Forbidden("a node certificate is needed here")
    peer = known[_PEER] = peer_of(connection)
    return peer


async def _read(scope: Scope, receive: Receive) -> JoinRequest | RenewRequest:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:12]) > MAX_REQUEST_BYTES:
        raise BodyTooLarge(f"a request to join has at most {MAX_REQUEST_BYTES} bytes")
    body = bytearray()
    more = True
    try:
        with anyio.fail_after(BODY_DEADLINE_S):
            while more:
                event = await receive()
                if event["type"] != "http.request":
                    raise RequestTimeout("the joiner went away")
                body += event.get("body", b"")
                if len(body) > MAX_REQUEST_BYTES:
                    raise BodyTooLarge(f"a request to join has at most {MAX_REQUEST_BYTES} bytes")
                more = event.get("more_body", False)
    except TimeoutError as slow:
        raise RequestTimeout("the request to join came too slowly") from slow
    try:
        return msgspec.json.decode(body, type=JoinRequest | RenewRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Not chained: the decoder's text may quote the secret.
        raise Malformed(
            "the request to join cannot be read; do both machines run the same version?"
        ) from None


async def _send(send: Send, status: int, answer: msgspec.Struct, *, retry_after_s: float = 0.0) -> None:
    body = msgspec.json.encode(answer)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    ]
    if retry_after_s:
        headers.append((b"retry-after", str(max(1, round(retry_after_s + 0.5))).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
