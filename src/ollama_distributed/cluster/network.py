"""Typed messages between nodes over the bus: to all, or to one that acknowledges.

At most once, and no consensus: what must not be lost is a record of the replicated state, and
a message only says that there is news. Messages to all come on `bcast.<sender>.<type>`, where
the bus vouches for the sender. A message to one (`cmd.<peer>.msg.<type>`) comes from a member
of the cluster, but which one is the sender's word: no handler may grant anything on it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias, get_args

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Invalid, NotOffered, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster import ports
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.cluster.tasks import end

MessageType: TypeAlias = Literal[
    "model-sync", "consensus", "health-check", "config-update", "membership", "key-uses"
]
"""`model-sync`: models of the sender changed; `consensus`: leadership or voters did;
`config-update`: the cluster's config did; `membership`: a node comes or goes; `health-check`:
answered by every node, by itself; `key-uses`: when keys were used last at the sender."""
TYPES: tuple[MessageType, ...] = get_args(MessageType)

MAX_BODY_BYTES = 256 * 1024
"""A quarter of what the bus carries; blobs and prompts never go this way."""
SEND_S = 2.0
HANDLER_S = 10.0
"""A handler that takes longer is given up: the messages behind it wait."""
MAX_HANDLERS = 64
"""Of one type."""

MESSAGE_REFUSED = "message.refused"
HANDLER_FAILED = "message.handler_failed"
PEER_CALLBACK_FAILED = "peer.callback_failed"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler gets."""

    type: MessageType
    sender: NodeId
    body: bytes = b""
    direct: bool = False
    """To this node alone: `sender` is then the sender's word only."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId
    address: str
    """`host:port` of its hop listener; what this room does not dial."""
    rtt_s: float
    """Of the health check when it was connected."""


Handler: TypeAlias = Callable[[Message], Awaitable[None]]
PeerCallback: TypeAlias = Callable[[Peer, bool], None]
"""Called with True when a peer connects, or its address changes; with False when it goes."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _Envelope(msgspec.Struct, frozen=True):
    sender: _Name
    body: bytes = b""


class _Acknowledgement(msgspec.Struct, frozen=True):
    handled: bool
    error: str = ""
    code: str = ""


_encode = msgspec.msgpack.Encoder().encode
_envelopes = msgspec.msgpack.Decoder(_Envelope)
_acknowledgements = msgspec.msgpack.Decoder(_Acknowledgement)


class NetworkManager:
    """An async context manager; inside, messages arrive."""

    def __init__(
        self, coordination: Coordination, *, node: NodeId, clock: Clock, chance: random.Random
    ) -> None:
        self._coordination = coordination
        self._node = node
        self._clock = clock
        self._chance = chance
        self._peers: dict[NodeId, Peer] = {}
        self._peer_callbacks: list[PeerCallback] = []
        self._handlers: dict[MessageType, list[Handler]] = {kind: [] for kind in TYPES}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> NetworkManager:
        for name, step in (("broadcasts", self._hear), ("messages", self._serve)):
            work = keep_going(name, step, self._chance)
            self._tasks.append(asyncio.create_task(work, name=f"{name} at {self._node}"))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end(self._tasks)

    # ── peers ───────────────────────────────────────────────────────────────────────

    @property
    def peers(self) -> Mapping[NodeId, Peer]:
        return MappingProxyType(self._peers)

    def on_peer(self, callback: PeerCallback) -> None:
        self._peer_callbacks.append(callback)

    async def connect(self, peer: NodeId, address: str) -> Peer:
        """Note a peer once it answers a health check. Idempotent; a new address replaces the old.

        Raises:
            Unavailable, DeadlineExceeded: it does not answer.
        """
        rtt_s = await self.ping(peer)
        before = self._peers.get(peer)
        known = self._peers[peer] = Peer(node=peer, address=address, rtt_s=rtt_s)
        if before is None or before.address != address:
            self._tell(known, True)
        return known

    async def disconnect(self, peer: NodeId) -> None:
        """Forget a peer. Idempotent; messages still reach it by its id."""
        known = self._peers.pop(peer, None)
        if known is not None:
            self._tell(known, False)

    async def ping(self, peer: NodeId) -> float:
        """Seconds that a message to `peer` and back takes.

        Raises:
            Unavailable, DeadlineExceeded: it does not answer.
        """
        began = self._clock.monotonic()
        await self.send_to(peer, "health-check")
        return self._clock.monotonic() - began

    def _tell(self, peer: Peer, connected: bool) -> None:
        for callback in list(self._peer_callbacks):
            try:
                callback(peer, connected)
            except Exception:  # one listener's defect is not the others'
                log.exception(PEER_CALLBACK_FAILED, peer=peer.node)

    # ── messages ────────────────────────────────────────────────────────────────────

    async def broadcast(self, kind: MessageType, body: bytes = b"") -> None:
        """To every node that listens now, this one too.

        Raises:
            Invalid: the body is too long.
            Unavailable: this node has no connection.
        """
        await self._coordination.publish(f"bcast.{self._node}.{kind}", self._wrap(kind, body))

    async def send_to(
        self, peer: NodeId, kind: MessageType, body: bytes = b"", *, timeout_s: float = SEND_S
    ) -> None:
        """Returns once every handler of `peer` is done with it.

        Raises:
            Invalid: the body is too long.
            NotOffered: nobody there handles this type.
            Unavailable: the peer is not there, or a handler failed.
            DeadlineExceeded: no acknowledgement in time; it may have been handled.
        """
        data = await self._coordination.request(
            f"cmd.{peer}.msg.{kind}", self._wrap(kind, body), timeout_s=timeout_s
        )
        try:
            acknowledgement = _acknowledgements.decode(data)
        except msgspec.DecodeError as exc:
            raise Unavailable(f"node {peer} answered something that is no acknowledgement") from exc
        if acknowledgement.handled:
            return
        if acknowledgement.code == NotOffered.code:
            raise NotOffered(f"node {peer} handles no {kind} messages")
        raise Unavailable(f"node {peer} could not handle a {kind} message: {acknowledgement.error}")

    def subscribe(self, kind: MessageType, handler: Handler) -> Callable[[], None]:
        """Call `handler` for each message of this type; the answer ends that. Messages to all
        are handled one after the other, in order, so a handler is quick (`HANDLER_S`); what it
        raises is logged.

        Raises:
            Invalid: there is no such type, or it has too many handlers.
        """
        if kind not in self._handlers:
            raise Invalid(f"there is no message type {kind!r}")
        handlers = self._handlers[kind]
        if len(handlers) >= MAX_HANDLERS:
            raise Invalid(f"{kind} has {MAX_HANDLERS} handlers already")
        handlers.append(handler)

        def unsubscribe() -> None:
            if handler in handlers:
                handlers.remove(handler)

        return unsubscribe

    def _wrap(self, kind: str, body: bytes) -> bytes:
        if kind not in self._handlers:
            raise Invalid(f"there is no message type {kind!r}")
        if len(body) > MAX_BODY_BYTES:
            raise Invalid(f"a message has at most {MAX_BODY_BYTES} bytes, this one {len(body)}")
        return _encode(_Envelope(self._node, body))

    # ── arrivals ────────────────────────────────────────────────────────────────────

    async def _hear(self) -> None:
        async with self._coordination.subscribe("bcast.*.*") as arrivals:
            async for arrival in arrivals:
                try:
                    message = _read(arrival)
                except Invalid as exc:
                    log.warning(MESSAGE_REFUSED, subject=arrival.subject, error=exc.message)
                else:
                    await self._handle(message)

    async def _serve(self) -> None:
        async with self._coordination.serve(f"cmd.{self._node}.msg.*", self._acknowledge):
            await anyio.sleep_forever()

    async def _acknowledge(self, arrival: ports.Message) -> bytes:
        try:
            message = _read(arrival)
        except Invalid as exc:
            log.warning(MESSAGE_REFUSED, subject=arrival.subject, error=exc.message)
            return _encode(_Acknowledgement(False, exc.message, exc.code))
        if not self._handlers[message.type] and message.type != "health-check":
            return _encode(_Acknowledgement(False, code=NotOffered.code))
        failed = await self._handle(message)
        return _encode(_Acknowledgement(not failed, error=failed))

    async def _handle(self, message: Message) -> str:
        """Hand it to every handler; what went wrong, empty: nothing."""
        failed = ""
        for handler in list(self._handlers[message.type]):
            try:
                with anyio.fail_after(HANDLER_S):
                    await handler(message)
            except TimeoutError:
                failed = f"its handler took longer than {HANDLER_S:.0f} s"
                log.warning(HANDLER_FAILED, type=message.type, sender=message.sender, error=failed)
            except OllamaDistributedError as exc:
                failed = exc.message
                log.warning(HANDLER_FAILED, type=message.type, sender=message.sender, code=exc.code)
            except Exception:  # a task root: one handler's defect is not the others'
                failed = "its handler failed"
                log.exception(HANDLER_FAILED, type=message.type, sender=message.sender)
        return failed


def _read(arrival: ports.Message) -> Message:
    """
    Raises:
        Invalid: not one of our messages.
    """
    if len(arrival.data) > MAX_BODY_BYTES + 256:
        raise Invalid(f"{len(arrival.data)} bytes are too many for a message")
    words = arrival.subject.split(".")
    direct = words[0] == "cmd"
    kind = words[-1]
    if kind not in TYPES:
        raise Invalid(f"there is no message type {kind[:40]!r}")
    try:
        envelope = _envelopes.decode(arrival.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Invalid(f"not a message: {exc}") from exc
    if not direct and envelope.sender != words[1]:
        raise Invalid(f"it says to be of {envelope.sender}, the bus says {words[1]}")
    return Message(type=kind, sender=NodeId(envelope.sender), body=envelope.body, direct=direct)
