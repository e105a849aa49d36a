"""Connections to other nodes and the calls on them: the calling side of the hop.

A node has as many kept-alive connections as it had calls at once, the last used first, so
that the rest grow old and close. A few are opened at a time; a call that waits for that takes one that
becomes free before. The TLS context is asked for anew for each connection and
the other side's certificate is checked before a byte is sent. One timer for all watches for
calls that nothing was heard of and connections that nobody used.

A call that fails on a connection that was used before, with not a byte of an answer, goes out
once more on a fresh one: the other node had closed it while it lay idle.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.calls import Question, RemoteGeneration
from ollama_distributed.adapters.peers.link import Call, Link
from ollama_distributed.adapters.sockets import CALLER_UNHEARD_S, tune
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    Forbidden,
    OllamaDistributedError,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    InferenceRequest,
    RerankRequest,
    RerankResult,
    Usage,
)
from ollama_distributed.base.tokens import Resume, SourceSink, Written
from ollama_distributed.catalog.wire import ShownModel

log = structlog.get_logger(__name__)

T = TypeVar("T")

CONNECT_DEADLINE_S = 1.0
"""For the TCP and TLS handshakes together; within a site they take 3 ms."""
MAX_ADDRESSES = 3
"""Of one node that are tried, best first."""
MAX_LINKS = 1024
"""To one node: a call has one to itself while it runs."""
MAX_OPENING = 8
"""Connections to one node that are being opened. A handshake takes some milliseconds of both nodes'
processors: where hundreds come at once, all would miss their deadline, and be tried again."""
IDLE_S = 30.0
"""A free connection is closed after this; the other side's listener waits twice as long."""
AGE_S = 3600.0
"""A connection takes no new call after this: certificates live 24 h and are renewed at half."""
SWEEP_S = 1.0
WRITTEN_DEADLINE_S = 1.0
"""It is a look into memory, and a client waits that lost its stream."""
QUESTION_DEADLINE_S = 900.0
"""An embedding may wait for a model to load, and for those before it; pings say it lives."""


class TLS(Protocol):
    """`adapters.identity.tls.NodeTLS`."""

    def client(self) -> ssl.SSLContext: ...


CheckPeer = Callable[[ssl.SSLObject, NodeId], object]
"""Raises `Forbidden` when another node than that is on the other side of the connection, or one
that was removed: `lambda connection, node: peer_of(connection, expected=node)`."""
Addresses = Callable[[NodeId], Sequence[str]]
"""`host:port` of a node's cluster listener, best first (`Advert.hop`)."""


class _Road:
    """What there is to one node."""

    __slots__ = ("best", "failed_at", "failure", "free", "gate", "links", "opening")

    def __init__(self) -> None:
        self.free: list[Link] = []
        self.links: set[Link] = set()
        self.opening = 0
        """Calls that wait for a connection."""
        self.gate = asyncio.Semaphore(MAX_OPENING)
        self.failure: OllamaDistributedError | None = None
        """Why the latest attempt to open one failed."""
        self.failed_at = 0.0
        self.best = ""
        """The address that answered last."""


class PeerPool:
    """Implements `routing.ports.Peers`, and asks other nodes the rest. `async with`, or `close`."""

    def __init__(
        self, addresses: Addresses, tls: TLS, check: CheckPeer, say: Callable[[Identity], bytes] | None = None
    ) -> None:
        self._addresses = addresses
        self._tls = tls
        self._check = check
        self._say = say
        self._roads: dict[NodeId, _Road] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = 0.0
        """When the timer is to fire."""
        self._closed = False

    async def __aenter__(self) -> PeerPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ── calls ───────────────────────────────────────────────────────────────────────

    def start(
        self,
        node: NodeId,
        request: InferenceRequest,
        sink: SourceSink,
        resume: Resume | None = None,
    ) -> RemoteGeneration:
        """Begin a generation there. What goes wrong comes as `EngineFailed`.

        Raises:
            Invalid: the request cannot be said in msgpack.
        """
        asked = wire.GenerateAsk(request=request, resume=resume, hears_place=True)
        generation = RemoteGeneration(self, node, self._message(wire.GENERATE, asked, request), sink)
        self.send(generation, node)
        return generation

    async def embed(self, node: NodeId, request: EmbedRequest) -> EmbedResult:
        question = await self._ask(node, wire.EMBED, request)
        return EmbedResult(vectors=tuple(question.rows), usage=question.result(Usage))

    async def rerank(self, node: NodeId, request: RerankRequest) -> RerankResult:
        return (await self._ask(node, wire.RERANK, request)).result(RerankResult)

    async def count_tokens(self, node: NodeId, request: InferenceRequest) -> int:
        return (await self._ask(node, wire.COUNT_TOKENS, request)).result(int)

    async def written(self, node: NodeId, request: InferenceRequest) -> Written | None:
        asked = await self._ask(node, wire.WRITTEN, wire.WrittenAsk(request=request), WRITTEN_DEADLINE_S)
        return asked.result(Written | None)  # type: ignore[arg-type]  # a union is no class

    async def hand_over(self, node: NodeId, request: InferenceRequest, written: Written) -> None:
        await self._ask(
            node, wire.HANDED, wire.HandedAsk(request=request, written=written), WRITTEN_DEADLINE_S
        )

    async def show(self, node: NodeId, name: str, *, verbose: bool = False) -> ShownModel:
        return (await self._ask(node, wire.SHOW, wire.ShowAsk(name=name, verbose=verbose), 30.0)).result(
            ShownModel
        )

    async def unload(self, node: NodeId, name: str) -> None:
        await self._ask(node, wire.UNLOAD, wire.UnloadAsk(name=name), 30.0)

    async def ask(
        self,
        node: NodeId,
        route: str,
        body: msgspec.Struct,
        answer: type[T],
        *,
        deadline_s: float,
        fresh: bool = True,
    ) -> T:
        """Ask on a route that was added to the other node's door (`PeerDoor.add`). `fresh`: on a
        connection of its own; else what the route does may be done twice, because one had gone stale.

        Raises:
            Unavailable: it cannot be reached, or broke off; whether it acted is not known then.
            DeadlineExceeded: no answer in time.
            OllamaDistributedError: what it refused with.
        """
        return (await self._ask(node, route, body, deadline_s, fresh=fresh)).result(answer)

    async def _ask(
        self,
        node: NodeId,
        route: str,
        body: msgspec.Struct,
        deadline_s: float = QUESTION_DEADLINE_S,
        *,
        fresh: bool = False,
    ) -> Question:
        """Cancel-safe: a cancelled wait closes the connection, so that the other node stops too."""
        question = Question(self, node, self._message(route, body, getattr(body, "request", body)))
        self.send(question, node, fresh=fresh)
        try:
            async with asyncio.timeout(deadline_s):
                await question.done
        except TimeoutError as late:
            raise DeadlineExceeded(f"node {node} did not answer within {deadline_s:g} s") from late
        finally:
            question.cancel()
        return question

    def _message(self, route: str, body: Any, asked: Any) -> bytes:
        """`asked`: what may be for somebody."""
        identity = getattr(asked, "identity", None)
        said = self._say(identity) if self._say is not None and identity is not None else b""
        return message(route, body, said)

    # ── connections ─────────────────────────────────────────────────────────────────

    def send(self, call: Call, node: NodeId, *, fresh: bool = False) -> None:
        """Give the call a connection: one that is free, at once, or a new one. `fresh`: only new."""
        if self._closed:
            call.broke(Unavailable("this node is shutting down"), answered=False, reused=False)
            return
        road = self._roads.get(node)
        if road is None:
            road = self._roads[node] = _Road()
        if not fresh and (link := self._free(road)) is not None:
            call.taken(link)
            link.begin(call)
            return
        if len(road.links) + road.opening >= MAX_LINKS:
            call.broke(
                QueueFull(f"too many requests to node {node} run already"), answered=False, reused=False
            )
            return
        road.opening += 1
        task = asyncio.get_running_loop().create_task(
            self._open(road, node, call, fresh=fresh), name=f"hop to {node}"
        )
        call.opening(task)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _free(self, road: _Road) -> Link | None:
        """One that is there already."""
        now = asyncio.get_running_loop().time()
        while road.free:
            link = road.free.pop()
            if link.open and now - link.opened_at < AGE_S:
                return link
            link.close()
        return None

    def drop(self, node: NodeId, reason: str) -> None:
        """Cut every connection to a node: it was removed from the cluster."""
        road = self._roads.pop(node, None)
        if road is not None:
            for link in list(road.links):
                link.cut(Unavailable(f"node {node}: {reason}"))

    async def close(self) -> None:
        """Cut everything. Idempotent."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for task in list(self._opening):
            task.cancel()
        for node in list(self._roads):
            self.drop(node, "this node is shutting down")
        await asyncio.gather(*self._opening, return_exceptions=True)

    async def _open(self, road: _Road, node: NodeId, call: Call, *, fresh: bool) -> None:
        """A connection for this call. A task root: what goes wrong is the call's."""
        try:
            link = await (self._connected(road, node) if fresh else self._in_turn(road, node))
        except OllamaDistributedError as error:
            call.broke(error, answered=False, reused=False)
            return
        except asyncio.CancelledError:
            if self._closed:
                call.broke(Unavailable("this node is shutting down"), answered=False, reused=False)
            raise
        except Exception:
            log.exception("peers.connect_defect", node=node)
            call.broke(Unavailable(f"node {node} cannot be reached"), answered=False, reused=False)
            return
        finally:
            road.opening -= 1
        if self._sweeper is None:
            self._sweep_later()
        call.taken(link)
        link.begin(call)

    async def _in_turn(self, road: _Road, node: NodeId) -> Link:
        """A new one, or one that became free meanwhile.

        Raises:
            Unavailable: as `_connected`, or it failed for another call meanwhile.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        async with road.gate:
            if (link := self._free(road)) is not None:
                return link
            if road.failure is not None and road.failed_at > since:
                raise Unavailable(road.failure.message)
            try:
                return await self._connected(road, node)
            except Unavailable as failure:
                road.failure, road.failed_at = failure, loop.time()
                raise

    async def _connected(self, road: _Road, node: NodeId) -> Link:
        """
        Raises:
            Unavailable: no address of the node answers, or another node does.
        """
        known = list(self._addresses(node))
        if road.best in known:
            known.remove(road.best)
            known.insert(0, road.best)
        failures: list[str] = []
        for address in known[:MAX_ADDRESSES]:
            try:
                link = await self._connect(node, address)
            except (OSError, TimeoutError, Forbidden, ValueError) as failure:  # ssl.SSLError is OSError
                said = getattr(failure, "strerror", None) or str(failure) or "no answer in time"
                failures.append(f"{address}: {said}")
                continue
            road.best = address
            road.links.add(link)
            return link
        why = "; ".join(failures) or "it has told no address"
        raise Unavailable(f"node {node} cannot be reached ({why})")

    async def _connect(self, node: NodeId, address: str) -> Link:
        loop = asyncio.get_running_loop()
        host, _, port = address.rpartition(":")
        link = Link(self, node, loop.time())
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                transport, _ = await loop.create_connection(
                    lambda: link, host.strip("[]"), int(port), ssl=self._tls.client()
                )
            tune(transport.get_extra_info("socket"), CALLER_UNHEARD_S)
            self._check(transport.get_extra_info("ssl_object"), node)
        except BaseException:
            link.close()
            raise
        return link

    # ── home of links ───────────────────────────────────────────────────────────────

    def free(self, link: Link) -> None:
        road = self._roads.get(link.node)
        if road is None or link not in road.links:
            link.close()  # the node was dropped meanwhile
        else:
            road.free.append(link)

    def gone(self, link: Link) -> None:
        road = self._roads.get(link.node)
        if road is not None:
            road.links.discard(link)
            if link in road.free:
                road.free.remove(link)

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep_at = loop.time() + SWEEP_S
        self._sweeper = loop.call_at(self._sweep_at, self._sweep)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        stood_still_s = max(0.0, now - self._sweep_at)  # what was said meanwhile is still to be read
        for node, road in list(self._roads.items()):
            for link in list(road.links):
                quiet_s = now - link.quiet_since
                if link.busy and quiet_s - stood_still_s > wire.SILENT_S and not link.paused:
                    link.cut(Unavailable(f"node {node} said nothing for {wire.SILENT_S:g} s"))
                elif not link.busy and quiet_s > IDLE_S:
                    link.close()
            if not road.links and not road.opening:
                del self._roads[node]
        self._sweeper = None
        if self._roads:
            self._sweep_later()


def message(route: str, body: Any, said: bytes = b"") -> bytes:
    """Head and body of a request. `said`: whom it is for, as this node asserts.

    Raises:
        Invalid, BodyTooLarge: it cannot be said.
    """
    payload = wire.encode(body)
    if len(payload) > wire.MAX_BODY_BYTES:
        raise wire.too_large()
    head = (
        f"POST {wire.PREFIX}{route} HTTP/1.1\r\nhost: node\r\n"
        f"content-type: application/msgpack\r\ncontent-length: {len(payload)}\r\n"
    )
    identity = b"x-identity: %b\r\n" % said if said else b""
    return b"%b%b\r\n%b" % (head.encode("ascii"), identity, payload)
