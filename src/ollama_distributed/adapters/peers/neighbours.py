"""Fetching from outside as one cluster: both sides of the hop.

The answer to `outside/follow` is a number, as a `Result`, whenever more bytes have come, and an
empty `Result` at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.calls import Awaited, Sender
from ollama_distributed.adapters.peers.door import PeerDoor, Put
from ollama_distributed.adapters.peers.pool import PeerPool, message
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DeadlineExceeded, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.refusal import Refusal, error_of
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.distribution.matchmaker import Matchmaker
from ollama_distributed.distribution.neighbours import (
    BlobAnswer,
    BlobAsk,
    PulledAnswer,
    PulledAsk,
    TurnAnswer,
    TurnAsk,
)
from ollama_distributed.distribution.ports import Blobs
from ollama_distributed.distribution.together import Together
from ollama_distributed.models.names import BlobId

TURN, BLOB, PULLED, FOLLOW = "outside/turn", "outside/blob", "outside/pulled", "outside/follow"

QUESTION_S = 2.0
PULLED_S = 120.0
"""A registry may be slow; pings say that the other node still waits for it."""
AWAY_S = 5.0
"""A node that could not be reached is not asked again for so long: each try may take a second."""

T = TypeVar("T")


class Following(Awaited):
    """Implements `Call`. `done` is set when the other node has it all."""

    __slots__ = ("_told",)

    def __init__(self, sender: Sender, node: NodeId, asked: bytes, told: Callable[[int], None]) -> None:
        super().__init__(sender, node, asked)
        self._told = told

    def heard(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            reply = wire.decode_reply(payload)
            if isinstance(reply, Refusal):
                self._settle(error_of(reply))
            elif isinstance(reply, wire.Result):
                here = _decoded(reply.value, self.node)
                if here is None:
                    self._settle(None)
                else:
                    self._told(here)


def _decoded(value: bytes, node: NodeId) -> int | None:
    try:
        return msgspec.msgpack.decode(value, type=int | None)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise Unavailable(
            f"the answer of node {node} cannot be read; do both run versions that fit?"
        ) from failure


class NeighbourCalls:
    """Implements `distribution.neighbours.Neighbours`."""

    def __init__(self, pool: PeerPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._away: dict[NodeId, float] = {}

    async def turn(self, node: NodeId, ask: TurnAsk) -> NodeId | None:
        return (await self._asked(node, TURN, ask, TurnAnswer)).node

    async def size(self, node: NodeId, blob: str) -> int | None:
        return (await self._asked(node, BLOB, BlobAsk(blob=blob), BlobAnswer)).size

    async def pulled(self, node: NodeId, name: str) -> bytes:
        ask = PulledAsk(name=name)
        return (
            await self._pool.ask(node, PULLED, ask, PulledAnswer, deadline_s=PULLED_S, fresh=False)
        ).manifest

    async def follow(self, node: NodeId, blob: str, told: Callable[[int], None]) -> None:
        call = Following(self._pool, node, message(FOLLOW, BlobAsk(blob=blob)), told)
        self._pool.send(call, node)
        try:
            await call.done  # a node that goes silent is noticed by the pool
        finally:
            call.cancel()

    async def _asked(self, node: NodeId, route: str, ask: msgspec.Struct, answer: type[T]) -> T:
        """A quick question, that may be asked twice."""
        now = self._clock.monotonic()
        if now < self._away.get(node, now):
            raise Unavailable(f"node {node} could not be reached a moment ago")
        try:
            found = await self._pool.ask(node, route, ask, answer, deadline_s=QUESTION_S, fresh=False)
        except (Unavailable, DeadlineExceeded):
            self._away[node] = now + AWAY_S
            raise
        self._away.pop(node, None)
        return found


def open_outside(door: PeerDoor, matchmaker: Matchmaker, together: Together, blobs: Blobs) -> None:
    """Answer other nodes' questions."""

    async def turn(peer: Peer, ask: TurnAsk) -> TurnAnswer:
        return TurnAnswer(node=matchmaker.asked(peer.node, ask))

    async def blob(_peer: Peer, ask: BlobAsk) -> BlobAnswer:
        return BlobAnswer(size=await blobs.blob_size(BlobId.parse(ask.blob)))

    async def pulled(_peer: Peer, ask: PulledAsk) -> PulledAnswer:
        return PulledAnswer(manifest=await together.pulled(ask.name))

    async def follow(_peer: Peer, ask: BlobAsk, put: Put) -> bytes:
        async def tell(here: int) -> None:
            await put(_frame(here))

        await together.followed(BlobId.parse(ask.blob), tell)
        return _frame(None)

    door.add(TURN, turn, TurnAsk)
    door.add(BLOB, blob, BlobAsk)
    door.add(PULLED, pulled, PulledAsk)
    door.add_stream(FOLLOW, follow, BlobAsk)


def _frame(here: int | None) -> bytes:
    return wire.reply_frame(wire.Result(msgspec.Raw(wire.encode(here))))
