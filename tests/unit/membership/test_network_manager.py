"""Typed messages: to all and to one, acknowledged; what is bad is refused and stays alone."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import msgspec
import pytest

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.errors import Conflict, Invalid, NotOffered, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.network import (
    HANDLER_S,
    MAX_BODY_BYTES,
    MAX_HANDLERS,
    TYPES,
    Message,
    MessageType,
    NetworkManager,
    Peer,
)
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

pytestmark = pytest.mark.anyio

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Slow:
    """Every message takes 10 ms."""

    def delay_s(self, source: str, target: str) -> float:
        return 0.01


class Listener:
    def __init__(self) -> None:
        self.heard: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.heard.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for message in self.heard]


@asynccontextmanager
async def _network(engine: MemoryEngine, node: NodeId) -> AsyncIterator[NetworkManager]:
    async with (
        engine.client(node) as coordination,
        NetworkManager(coordination, node=node, clock=VirtualClock(), chance=random.Random(node)) as manager,
    ):
        yield manager


@asynccontextmanager
async def _three() -> AsyncIterator[tuple[MemoryEngine, NetworkManager, NetworkManager, NetworkManager]]:
    engine = MemoryEngine(Slow())
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(_network(engine, node)) for node in (A, B, C)]
        await anyio.sleep(0.1)
        yield engine, a, b, c


@pytest.mark.parametrize("kind", TYPES)
async def test_a_broadcast_reaches_everyone_in_order(kind: MessageType) -> None:
    async with _three() as (_, a, b, c):
        listeners = [Listener(), Listener(), Listener()]
        for manager, listener in zip((a, b, c), listeners, strict=True):
            manager.subscribe(kind, listener)
        for n in range(20):
            await a.broadcast(kind, b"%d" % n)
        await anyio.sleep(0.1)
        for listener in listeners:
            assert listener.bodies == [b"%d" % n for n in range(20)]
            assert listener.heard[0] == Message(type=kind, sender=A, body=b"0")


async def test_only_the_type_that_was_asked_for() -> None:
    async with _three() as (_, a, b, _c):
        listener = Listener()
        b.subscribe("config-update", listener)
        await a.broadcast("model-sync", b"x")
        await a.broadcast("config-update", b"y")
        await anyio.sleep(0.1)
        assert listener.bodies == [b"y"]


async def test_a_message_to_one_is_acknowledged_when_it_is_handled() -> None:
    async with _three() as (_, a, b, c):
        mine, other = Listener(), Listener()
        b.subscribe("model-sync", mine)
        c.subscribe("model-sync", other)
        await a.send_to(B, "model-sync", b"hello")
        assert mine.heard == [Message(type="model-sync", sender=A, body=b"hello", direct=True)]
        assert other.heard == []


async def test_nobody_there_and_nobody_interested_are_told_apart() -> None:
    async with _three() as (_, a, _b, _c):
        with pytest.raises(Unavailable):
            await a.send_to(NodeId("gone"), "model-sync")
        with pytest.raises(NotOffered):
            await a.send_to(B, "model-sync")


async def test_one_handlers_failure_is_not_the_others() -> None:
    async def defective(message: Message) -> None:
        raise KeyError("a defect")

    async def refusing(message: Message) -> None:
        raise Conflict("not in this state")

    async with _three() as (_, a, b, _c):
        listener = Listener()
        for handler in (defective, refusing, listener):
            b.subscribe("model-sync", handler)
        await a.broadcast("model-sync", b"1")
        await a.broadcast("model-sync", b"2")
        with pytest.raises(Unavailable, match="not in this state"):
            await a.send_to(B, "model-sync", b"3")
        assert sorted(listener.bodies) == [b"1", b"2", b"3"]


async def test_a_handler_that_hangs_is_given_up() -> None:
    async def hanging(message: Message) -> None:
        await anyio.sleep_forever()

    async with _three() as (_, a, b, _c):
        listener = Listener()
        b.subscribe("model-sync", hanging)
        b.subscribe("config-update", listener)
        await a.broadcast("model-sync")
        await a.broadcast("config-update", b"behind it")
        await anyio.sleep(HANDLER_S - 1)
        assert listener.bodies == []
        await anyio.sleep(2)
        assert listener.bodies == [b"behind it"]
        with pytest.raises(Unavailable, match="took longer"):
            await a.send_to(B, "model-sync", timeout_s=HANDLER_S + 1)


async def test_an_ended_subscription_hears_nothing() -> None:
    async with _three() as (_, a, b, _c):
        listener = Listener()
        end = b.subscribe("model-sync", listener)
        end()
        end()
        await a.broadcast("model-sync")
        await anyio.sleep(0.1)
        assert listener.heard == []


async def test_peers_connect_once_they_answer_and_tell_their_listeners() -> None:
    async with _three() as (_, a, _b, _c):
        told: list[tuple[str, str, bool]] = []

        def defective(peer: Peer, connected: bool) -> None:
            raise KeyError("a defect")

        a.on_peer(defective)
        a.on_peer(lambda peer, connected: told.append((peer.node, peer.address, connected)))
        peer = await a.connect(B, "10.0.0.2:7443")
        assert peer.rtt_s == pytest.approx(0.02)
        await a.connect(B, "10.0.0.2:7443")
        await a.connect(B, "10.0.0.9:7443")
        assert {node: known.address for node, known in a.peers.items()} == {B: "10.0.0.9:7443"}
        with pytest.raises(Unavailable):
            await a.connect(NodeId("gone"), "10.0.0.3:7443")
        await a.disconnect(B)
        await a.disconnect(B)
        assert dict(a.peers) == {}
        assert told == [(B, "10.0.0.2:7443", True), (B, "10.0.0.9:7443", True), (B, "10.0.0.9:7443", False)]


async def test_a_body_too_long_and_an_unknown_type_are_refused_by_the_sender() -> None:
    async with _three() as (_, a, b, _c):
        listener = Listener()
        b.subscribe("model-sync", listener)
        await a.send_to(B, "model-sync", b"x" * MAX_BODY_BYTES)
        assert len(listener.heard) == 1
        with pytest.raises(Invalid):
            await a.broadcast("model-sync", b"x" * (MAX_BODY_BYTES + 1))
        for attempt in (a.broadcast("gossip"), a.send_to(B, "gossip")):  # type: ignore[arg-type]
            with pytest.raises(Invalid):
                await attempt
        with pytest.raises(Invalid):
            a.subscribe("gossip", listener)  # type: ignore[arg-type]
        for _ in range(MAX_HANDLERS - 1):
            b.subscribe("model-sync", listener)
        with pytest.raises(Invalid):
            b.subscribe("model-sync", listener)


async def test_bad_messages_are_dropped_and_the_next_one_is_heard() -> None:
    async with _three() as (engine, _a, b, _c):
        listener = Listener()
        b.subscribe("model-sync", listener)
        raw = engine.clients[A]
        good = msgspec.msgpack.encode({"sender": "a", "body": b"good"})
        for subject, data in (
            ("bcast.a.model-sync", b""),
            ("bcast.a.model-sync", b"\xc1"),
            ("bcast.a.model-sync", b"x" * (MAX_BODY_BYTES + 1000)),
            ("bcast.a.model-sync", msgspec.msgpack.encode({"sender": "c"})),  # in another's name
            ("bcast.a.model-sync", msgspec.msgpack.encode({"sender": ""})),
            ("bcast.a.gossip", good),
        ):
            await raw.publish(subject, data)
        await raw.publish("bcast.a.model-sync", good)
        await anyio.sleep(0.1)
        assert listener.bodies == [b"good"]
        answer = await raw.request("cmd.b.msg.model-sync", b"\xc1")
        assert msgspec.msgpack.decode(answer)["handled"] is False
        answer = await raw.request("cmd.b.msg.gossip", good)
        assert msgspec.msgpack.decode(answer)["handled"] is False
        assert listener.bodies == [b"good"]
