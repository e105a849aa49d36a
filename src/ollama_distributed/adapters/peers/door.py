"""The serving side of the hop: an ASGI app that other nodes send their requests to.

It sits behind `adapters.identity.handshake_server.ClusterListener`, which has checked the
caller's certificate, and leads to this node's own serving, never on to a third node. Each
answer is a stream of frames (`wire.py`). What runs ends when the caller goes away, when the
caller stops reading for too long, and when this node closes.

    door = PeerDoor(node, serving, catalog, serving.unload, draining=..., status_of=status_of)
    door.add("voters/prepare", prepare, Nothing)
    ClusterListener(door, admission, ...)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec
import structlog

from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.outlet import Outlet
from ollama_distributed.adapters.peers.rights import Callers, callers_of, may
from ollama_distributed.adapters.peers.written import Answered
from ollama_distributed.adapters.sockets import LIFELINE, Lifeline
from ollama_distributed.base.errors import (
    Forbidden,
    Internal,
    Malformed,
    MethodNotAllowed,
    NotFound,
    OllamaDistributedError,
    QueueFull,
    RequestTimeout,
    Unavailable,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, Queued, RerankRequest
from ollama_distributed.base.tokens import SourceEvent, SourceSink
from ollama_distributed.catalog.wire import ShownModel
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.streams.ports import Source

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")

BODY_DEADLINE_S = 30.0
MAX_BODIES_BYTES = 256 * 1024 * 1024
"""Bodies that are being read, together: half of what the gateway allows itself."""
TICK_S = 1.0
ROW_NUMBERS = 16_384
"""Of vectors in one frame: coding them takes 0.3 ms."""

log = structlog.get_logger(__name__)


class Library(Protocol):
    """`catalog.service.Catalog`: this node's own models."""

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel: ...


Handler = Callable[[Peer, Any], Awaitable[Any]]
"""Who asks and the decoded body; returns what msgpack can say."""
Put = Callable[[bytes], Awaitable[None]]
"""Sends a frame; waits while the caller does not read."""
Streaming = Callable[[Peer, Any, Put], Awaitable[bytes]]
"""As `Handler`, but may send frames before it returns the last one."""


Believe = Callable[[Peer, bytes], Identity]
"""Whom a request is for, by what the caller asserts. Raises `Forbidden`."""
Whom = Callable[[Any], Any]
"""Puts the identity that the caller proves in place of the one that it says."""


class _Route(msgspec.Struct, frozen=True):
    handler: Handler
    body: Any
    callers: Callers
    work: bool
    """Refused while this node drains."""
    streaming: Streaming | None = None
    """In place of `handler`."""


class PeerDoor:
    def __init__(
        self,
        me: NodeId,
        source: Source,
        library: Library,
        unload: Callable[[str], Awaitable[None]],
        *,
        draining: Callable[[], bool],
        status_of: Callable[[OllamaDistributedError], int],
        believe: Believe | None = None,
    ) -> None:
        self._me = me
        self._source = source
        self._library = library
        self._unload_model = unload
        self._draining = draining
        self._status_of = status_of
        self._believe = believe
        self.answered = Answered(time.monotonic)
        self._reading_bytes = 0
        self._routes: dict[str, _Route] = {}
        self._outlets: set[Outlet] = set()
        self._empty = asyncio.Event()
        """Set when the last of them ended after `close` began."""
        self._ticker: asyncio.TimerHandle | None = None
        self._closed = False
        for name, handler, body, work in (
            (wire.RERANK, self._rerank, RerankRequest, True),
            (wire.COUNT_TOKENS, self._count_tokens, InferenceRequest, True),
            (wire.SHOW, self._show, wire.ShowAsk, False),
            (wire.UNLOAD, self._unload, wire.UnloadAsk, False),
        ):
            self._routes[wire.PREFIX + name] = _Route(handler, body, callers_of(name), work)
        self._generate_path = wire.PREFIX + wire.GENERATE
        self._embed_path = wire.PREFIX + wire.EMBED
        self._generate_form = msgspec.msgpack.Decoder(wire.GenerateAsk)

    def add(
        self,
        route: str,
        handler: Callable[[Peer, T], Awaitable[Any]],
        body: type[T],
    ) -> None:
        """One more question: `POST /cluster/v1/<route>`; see `PeerPool.ask`. The handler's errors
        reach the caller as they are. Who may ask is in `rights.py`.

        Raises:
            LookupError: that does not name the route.
        """
        path = wire.PREFIX + route
        if path in self._routes or path in (self._generate_path, self._embed_path):
            raise ValueError(f"two handlers for {path}")
        self._routes[path] = _Route(handler, body, callers_of(route), False)

    def add_stream(self, route: str, streaming: Streaming, body: type[T]) -> None:
        """One more question, whose answer is frames of its own kind."""
        self.add(route, _unused, body)
        path = wire.PREFIX + route
        self._routes[path] = msgspec.structs.replace(self._routes[path], streaming=streaming)

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse what is new, so that it goes to another node; let what runs end for `drain_s`,
        then end it with an error that says why. Idempotent."""
        self._closed = True
        if self._outlets:
            with contextlib.suppress(TimeoutError):  # what still runs is ended below
                async with asyncio.timeout(drain_s):
                    await self._empty.wait()
        for outlet in list(self._outlets):
            outlet.end_with(Unavailable(f"node {self._me} is shutting down"))
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    def move(self, elsewhere: Callable[[str], bool]) -> int:
        """End generations so that their callers go on with them at another node; how many. Left alone
        is what cannot be continued. `elsewhere`: another node has the model."""
        moving = [one for one in self._outlets if one.generates and one.movable and elsewhere(one.model)]
        for outlet in moving:
            outlet.end_with(Unavailable(f"node {self._me} drains; another one goes on"))
        return len(moving)

    def drop(self, node: NodeId) -> None:
        """End what runs for a node that was removed from the cluster."""
        for outlet in list(self._outlets):
            if outlet.caller == node:
                outlet.gone()

    # ── ASGI ────────────────────────────────────────────────────────────────────────

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        peer: Peer = scope["state"]["peer"]
        try:
            route = self._admitted(scope["method"], path, peer)
            body = await self._read(scope, receive)
            whom = partial(self._for_whom, peer, _assertion(scope))
            await self._served(path, route, peer, whom, body, scope["extensions"][LIFELINE], send)
        except OllamaDistributedError as refused:
            await _refuse(send, self._status_of(refused), refused)

    async def _served(
        self,
        path: str,
        route: _Route | None,
        peer: Peer,
        whom: Whom,
        body: bytes,
        lifeline: Lifeline,
        send: Send,
    ) -> None:
        outlet = Outlet(peer.node, send)
        self._outlets.add(outlet)
        lifeline.add(outlet.gone)
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        try:
            if path == self._generate_path:
                await self._generate(whom, body, outlet)
            elif route is not None:
                await self._answer(route, peer, whom, body, outlet)
            else:
                await self._embed(whom, body, outlet)
        except OllamaDistributedError:
            raise
        except Exception as defect:
            log.exception("peers.door_defect", route=path, caller=peer.node)
            if outlet.started:
                raise
            raise Internal(f"internal error on node {self._me}; its log has the details") from defect
        finally:
            lifeline.discard(outlet.gone)
            self._outlets.discard(outlet)
            if self._closed and not self._outlets:
                self._empty.set()

    def _for_whom(self, peer: Peer, said: bytes, asked: Any) -> Any:
        """The question with the identity that the caller proves, where it is for somebody at all.

        Raises:
            Forbidden: it proves none, or one that is not good here.
        """
        request = getattr(asked, "request", asked)
        if self._believe is None or not hasattr(request, "identity"):
            return asked
        known = msgspec.structs.replace(request, identity=self._believe(peer, said))
        if request is asked:
            return known
        return msgspec.structs.replace(asked, request=known)

    def _tick(self) -> None:
        """One timer for the pings and deadlines of all answers."""
        loop = asyncio.get_running_loop()
        for outlet in list(self._outlets):
            outlet.tick(loop.time())
        self._ticker = loop.call_later(TICK_S, self._tick) if self._outlets else None

    def _admitted(self, method: str, path: str, peer: Peer) -> _Route | None:
        route = self._routes.get(path)
        if route is None and path not in (self._generate_path, self._embed_path):
            raise NotFound(f"{path} is not known to node {self._me}; does it run an older version?")
        if method != "POST":
            raise MethodNotAllowed("questions to a node are POST")
        if route is not None and not may(peer.role, route.callers):
            raise Forbidden("only a server of the cluster may ask this")
        if self._closed:
            raise Unavailable(f"node {self._me} is shutting down")
        if (route is None or route.work) and self._draining():
            raise Unavailable(f"node {self._me} is draining, or short of memory, and takes no new work")
        return route

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """
        Raises:
            BodyTooLarge, QueueFull, RequestTimeout, Malformed.
        """
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if not declared.isdigit():
            raise Malformed("the length of the body is missing")
        size = int(declared[:12])
        if size > wire.MAX_BODY_BYTES:
            raise wire.too_large()
        if self._reading_bytes + size > MAX_BODIES_BYTES:
            raise QueueFull(f"node {self._me} reads too many large requests now", retry_after_s=1.0)
        event = await receive()  # nearly always all of it is here: no timer for that
        if event["type"] == "http.request" and not event.get("more_body", False):
            whole: bytes = event.get("body", b"")
            return whole
        pieces = bytearray()
        self._reading_bytes += size
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                while True:
                    if event["type"] != "http.request":
                        raise RequestTimeout("the caller went away")
                    pieces += event.get("body", b"")
                    if not event.get("more_body", False):
                        return bytes(pieces)
                    event = await receive()
        except TimeoutError as slow:
            raise RequestTimeout("the body came too slowly") from slow
        finally:
            self._reading_bytes -= size

    # ── answers ─────────────────────────────────────────────────────────────────────

    async def _generate(self, whom: Whom, body: bytes, outlet: Outlet) -> None:
        ask: wire.GenerateAsk = whom(_decoded(self._generate_form, body))
        outlet.model = ask.request.model
        self.answered.begins(ask, outlet)
        try:
            hear = outlet.hear if ask.hears_place else _without_place(outlet.hear)
            generation = self._source.start(ask.request, hear, ask.resume)
            await outlet.run(generation)
        finally:
            self.answered.ended(ask, outlet)

    async def _embed(self, whom: Whom, body: bytes, outlet: Outlet) -> None:
        request: EmbedRequest = whom(_decoded(msgspec.msgpack.Decoder(EmbedRequest), body))

        async def rows() -> bytes:
            result = await self._source.embed(request)
            batch: list[tuple[float, ...]] = []
            numbers = 0
            for vector in result.vectors:
                batch.append(vector)
                numbers += len(vector)
                if numbers >= ROW_NUMBERS:
                    await outlet.put(wire.reply_frame(wire.Rows(tuple(batch))))
                    batch, numbers = [], 0
            if batch:
                await outlet.put(wire.reply_frame(wire.Rows(tuple(batch))))
            return _result(result.usage)

        await outlet.answer(self._guarded(rows, outlet, request.request_id))

    async def _answer(self, route: _Route, peer: Peer, whom: Whom, body: bytes, outlet: Outlet) -> None:
        asked = whom(_decoded(msgspec.msgpack.Decoder(route.body), body))

        async def one() -> bytes:
            if route.streaming is not None:
                return await route.streaming(peer, asked, outlet.put)
            return _result(await route.handler(peer, asked))

        await outlet.answer(self._guarded(one, outlet, getattr(asked, "request_id", "")))

    async def _guarded(self, work: Callable[[], Awaitable[bytes]], outlet: Outlet, request_id: str) -> bytes:
        """The root of a question's task: whatever goes wrong is its answer."""
        try:
            return await work()
        except OllamaDistributedError as error:
            return wire.refusal_frame(error)
        except Exception:
            log.exception("peers.door_defect", request_id=request_id, caller=outlet.caller)
            where = f"internal error on node {self._me}; its log has it under the request id"
            return wire.refusal_frame(Internal(where))

    async def _rerank(self, _peer: Peer, request: RerankRequest) -> Any:
        return await self._source.rerank(request)

    async def _count_tokens(self, _peer: Peer, request: InferenceRequest) -> Any:
        return await self._source.count_tokens(request)

    async def _show(self, _peer: Peer, asked: wire.ShowAsk) -> Any:
        return await self._library.show(asked.name, verbose=asked.verbose)

    async def _unload(self, _peer: Peer, asked: wire.UnloadAsk) -> Any:
        await self._unload_model(asked.name)


def _assertion(scope: Scope) -> bytes:
    """What the caller says of whom the request is for; empty: nothing."""
    said: bytes = next((value for name, value in scope["headers"] if name == b"x-identity"), b"")
    return said


def _decoded(form: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    """
    Raises:
        Malformed: the caller runs a version that does not fit.
    """
    try:
        return form.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Not chained: the decoder's text may quote the prompt.
        raise Malformed("the request of the other node cannot be read; do both versions fit?") from None


def _without_place(hear: SourceSink) -> SourceSink:
    """For a caller of an older version."""

    def heard(event: SourceEvent) -> None:
        if type(event) is not Queued:
            hear(event)

    return heard


async def _unused(_peer: Peer, _asked: Any) -> None:
    """Of a streaming route."""


def _result(value: Any) -> bytes:
    return wire.reply_frame(wire.Result(msgspec.Raw(wire.encode(value))))


async def _refuse(send: Send, status: int, error: OllamaDistributedError) -> None:
    """Before anything ran: a whole answer, in the same frames."""
    body = wire.refusal_frame(error)
    headers = [
        (b"content-type", wire.FRAMES_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    with contextlib.suppress(OSError):  # the caller is gone
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
