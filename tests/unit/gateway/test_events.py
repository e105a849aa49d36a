"""Events over a WebSocket, without a socket: who is told what, and what ends a connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import pytest
from tests.event_sockets import AsgiSocket, opened
from tests.gateway_bench import WALL, until

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.roles import Right
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.errors import Forbidden, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.policies import Policy
from ollama_distributed.base.queue import Ask, QueueAnswer, QueuedRow, QueueNode, QueueWaiting, key_of
from ollama_distributed.gateway.events import connection as connections
from ollama_distributed.gateway.events.channels import Channel, QueuedRequests, channels_of, sees
from ollama_distributed.gateway.events.hub import Hub
from ollama_distributed.gateway.events.outbox import MOST, MOST_REPLIES, Outbox, Unread
from ollama_distributed.gateway.events.rows import Row
from ollama_distributed.gateway.events.service import Events, check_page
from ollama_distributed.gateway.gate import Gate, Head
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.gateway.tasks import Tasks

READ_QUEUE = Right("read", "queue")
FAST_S = 0.001


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return WALL


class Shown:
    """A channel whose rows a test sets."""

    def __init__(self, **rows: str) -> None:
        self.rows = {name: Row(name, json.dumps(text).encode()) for name, text in rows.items()}
        self.asked = 0
        self.error: Exception | None = None
        self.channel = Channel("queues", "", READ_QUEUE, "/api/v1/queue", self.ask, FAST_S)

    async def ask(self) -> Iterable[Row]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return tuple(self.rows.values())

    def set(self, name: str, text: str, **fields: Any) -> None:
        self.rows[name] = Row(name, json.dumps(text).encode(), **fields)


class World:
    """All WebSockets of a node, with keys of two teams."""

    def __init__(self, *channels: Channel, limits: Limits | None = None) -> None:
        self.clock = Clock()
        self.keys: dict[str, str] = {}
        self.records = {}
        for name, role, team in (
            ("admin", "admin", "default"),
            ("operator", "operator", "default"),
            ("mine", "user", "a"),
            ("yours", "user", "b"),
            ("viewer", "viewer", "a"),
        ):
            self.keys[name], self.records[name] = make_key(role, now=0.0, team=team)  # type: ignore[arg-type]  # of ROLES
        self.authenticator = Authenticator((), require_key=True, wall=self.clock.time)
        self.share()
        self.summaries: list[Summary] = []
        self.tasks = Tasks()
        self.events = Events(
            {channel.name: channel for channel in channels},
            gate=Gate(self.authenticator, SitePolicy(hosts=["gpu.example"]), limits or Limits()),
            clock=self.clock,
            observe=self.summaries.append,
            tasks=self.tasks,
        )

    def share(self, **policies: Policy) -> None:
        self.authenticator.share({one.id: one for one in self.records.values()}, policies)

    def open(self, kind: str, **headers: str) -> AbstractAsyncContextManager[AsgiSocket]:
        return opened(self.events, AsgiSocket(self.keys.get(kind, ""), headers))


# ── channels ────────────────────────────────────────────────────────────────────────


async def test_what_there_is_then_what_changes_then_what_is_gone() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    async with world.open("admin") as socket:
        socket.subscribe("queues")
        assert (await socket.until("queues"))["event"] == "now"
        assert (await socket.until("subscribed"))["channel"] == "queues"
        shown.set("a", "two")
        shown.set("b", "new")
        assert (await socket.until("queues", id="a"))["data"] == "two"
        assert (await socket.until("queues", id="b"))["event"] == "changed"
        del shown.rows["a"]
        assert await socket.until("queues", id="a") == {
            "type": "queues", "event": "gone", "channel": "", "id": "a", "time": WALL, "data": "two",
        }  # fmt: skip
        asked = shown.asked
        await until(lambda: shown.asked > asked + 3, "it is asked again and again")
        assert socket.told == []  # nothing changed


async def test_a_channel_is_asked_while_somebody_listens() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    async with world.open("admin") as one, world.open("operator") as two:
        assert shown.asked == 0
        for socket in (one, two):
            socket.subscribe("queues")
            await socket.until("subscribed")
        one.say({"type": "unsubscribe", "channel": "queues"})
        await one.until("unsubscribed")
        shown.set("a", "two")
        await two.until("queues", event="changed")
        assert not [message for message in one.told if message["event"] == "changed"]
    asked = shown.asked
    await asyncio.sleep(0)
    assert shown.asked == asked
    assert [summary.outcome for summary in world.summaries] == ["ok", "ok"]
    assert {summary.status for summary in world.summaries} == {101}


async def test_a_channel_that_cannot_be_asked_is_asked_again() -> None:
    shown = Shown(a="one")
    shown.error = Unavailable("nobody leads")
    world = World(shown.channel)
    async with world.open("admin") as socket:
        socket.subscribe("queues")
        await until(lambda: shown.asked > 2, "it is asked again")
        shown.error = None
        await socket.until("subscribed")


async def test_of_one_thing_only() -> None:
    shown = Shown(a="one", b="two")
    shown.set("c", "three", about="by-name")
    world = World(shown.channel)
    async with world.open("admin") as socket:
        socket.subscribe("queues", "a")
        socket.subscribe("queues", "by-name")
        await socket.until("subscribed", id="by-name")
        assert {one["id"] for one in socket.told if one["type"] == "queues"} == {"a", "c"}


def _waiting(number: int, team: str, key: str, position: int = 1) -> QueuedRow:
    return QueuedRow(
        number=number,
        request_id=f"r{number}",
        model="m",
        node="n-1",
        position=position,
        eta_s=2.04,
        since=WALL,
        key=key,
        team=team,
    )


class TwoTeams:
    """Queues of one node; a `gateway.queue_port.Queues`."""

    def __init__(self) -> None:
        self.rows = [_waiting(1, "a", "key1"), _waiting(2, "b", "key2", 2)]
        self.began: tuple[int, ...] = ()
        self.error = ""

    async def waiting(self) -> Sequence[QueueWaiting]:
        rows = () if self.error else tuple(self.rows)
        return (QueueWaiting(node="n1", waiting=rows, began=self.began, error=self.error),)

    async def queue(self, node: str = "") -> QueueAnswer:
        return QueueAnswer(nodes=(QueueNode(node="n1"),))


async def test_a_caller_is_told_of_its_own_requests_an_operator_of_all() -> None:
    queues: Any = TwoTeams()
    world = World(*channels_of(queues, None, None, wall=lambda: WALL).values())
    mine, yours = (world.records[kind].id for kind in ("mine", "yours"))
    queues.rows = [_waiting(1, "a", mine), _waiting(2, "b", yours, 2)]
    for kind, seen in (("mine", {"r1"}), ("yours", {"r2"}), ("viewer", set()), ("operator", {"r1", "r2"})):
        async with world.open(kind) as socket:
            socket.subscribe("queue")
            await socket.until("subscribed")
            told = [one["data"]["request_id"] for one in socket.told if one["type"] == "queue"]
            assert set(told) == seen, kind


async def test_people_of_one_role_have_turns_of_their_own_and_are_told_of_their_own_requests() -> None:
    people = [Identity("user", None, "a", name) for name in ("ann", "bob")]
    asks = [Ask(key=key_of(one), team=one.team, user=one.user) for one in people]
    assert len({one.key for one in asks}) == 2
    queues: Any = TwoTeams()
    queues.rows = [
        msgspec.structs.replace(_waiting(number, one.team, one.key), user=one.user)
        for number, one in enumerate(asks, 1)
    ]
    rows = list(await QueuedRequests(queues).ask())
    assert [[sees(one, row) for row in rows] for one in people] == [[True, False], [False, True]]


async def test_a_request_that_had_its_turn_and_one_that_gave_up() -> None:
    queues: Any = TwoTeams()
    source = QueuedRequests(queues)
    assert [row.over for row in await source.ask()] == [False, False]
    queues.rows, queues.began = [], (1,)
    over = [json.loads(row.data) for row in await source.ask() if row.over]
    assert [(one["request_id"], one["state"], one["position"]) for one in over] == [
        ("r1", "started", 0),
        ("r2", "ended", 0),
    ]
    assert list(await source.ask()) == []


async def test_a_node_that_does_not_answer_once_keeps_its_requests() -> None:
    queues: Any = TwoTeams()
    source = QueuedRequests(queues)
    assert len(list(await source.ask())) == 2
    queues.error = "it does not answer"
    assert [len(list(await source.ask())) for _ in range(4)] == [2, 2, 0, 0]
    queues.error = ""
    assert len(list(await source.ask())) == 2


# ── who may ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "headers", "status"),
    [
        ("nobody", {}, 401),
        ("viewer", {}, 101),
        ("viewer", {"origin": "https://evil.example"}, 403),
        ("viewer", {"origin": "http://127.0.0.1:8080"}, 101),
        ("viewer", {"host": "evil.example"}, 403),
        ("viewer", {"host": "gpu.example"}, 101),
    ],
)
async def test_the_handshake_passes_what_every_request_passes(
    kind: str, headers: dict[str, str], status: int
) -> None:
    world = World(Shown().channel)
    async with world.open(kind, **headers) as socket:
        assert socket.status == status
        if status != 101:
            assert socket.body["error"]["request_id"]
    assert world.summaries[-1].status == status


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"origin": "http://127.0.0.1:8080"}, True),
        ({"origin": "http://127.0.0.1:3000"}, False),  # the same site to a browser, another server
        ({"origin": "http://localhost:8080"}, False),
        ({"origin": "null"}, False),
        ({}, False),
        ({"authorization": "Bearer odk_x", "origin": "http://127.0.0.1:3000"}, True),
    ],
)
def test_a_sessions_cookie_counts_from_our_own_pages_only(headers: dict[str, str], may: bool) -> None:
    fields = {"host": "127.0.0.1:8080", "cookie": "od_session=ods_x", **headers}
    head = Head("GET", "/api/v1/ws", fields, 1, "127.0.0.1")
    if may:
        check_page(head)
    else:
        with pytest.raises(Forbidden, match="page"):
            check_page(head)


async def test_a_channel_asks_for_the_right_of_its_rest_route() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    world.records["mine"] = msgspec.structs.replace(world.records["mine"], policy="some")
    world.share(some=Policy(name="some", models=("llama*",)))
    async with world.open("mine") as socket:
        socket.subscribe("queues")
        assert (await socket.until("error"))["data"]["code"] == "forbidden"
        socket.subscribe("*")
        told = await socket.until("error", channel="*")
        assert told["data"]["code"] == "not_found"
        assert "queues" in told["data"]["message"]


async def test_a_key_that_is_revoked_ends_the_connection() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    async with world.open("operator") as socket:
        socket.subscribe("queues")
        await socket.until("subscribed")
        del world.records["operator"]
        world.share()
        shown.set("a", "two")
        await socket.until("queues", event="changed")  # it is asked again every two seconds
        world.clock.now += connections.RECHECK_S
        shown.set("a", "three")
        await until(lambda: socket.code is not None, "the end")
        assert socket.code == connections.POLICY
        assert not [one for one in socket.told if one["data"] == "three"]


async def test_a_right_that_is_lost_ends_the_subscription() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    async with world.open("mine") as socket:
        socket.subscribe("queues")
        await socket.until("subscribed")
        world.share(all=Policy(name="all", models=("llama*",), teams=("a",)))
        world.clock.now += connections.RECHECK_S
        shown.set("a", "two")
        told = await socket.until("unsubscribed")
        assert told["data"]["code"] == "forbidden"
        assert not [one for one in socket.told if one["data"] == "two"]
        assert socket.code is None


# ── bounds ──────────────────────────────────────────────────────────────────────────


async def test_too_many_messages() -> None:
    world = World(Shown().channel)
    async with world.open("admin") as socket:
        for _ in range(connections.MOST_MESSAGES_S):
            socket.say("{}")
        world.clock.now += 1.0
        await until(lambda: len(socket.told) == connections.MOST_MESSAGES_S, "as many as may")
        for _ in range(connections.MOST_MESSAGES_S + 1):
            socket.say("{}")
        await until(lambda: socket.code is not None, "the end")
        assert socket.code == connections.POLICY


async def test_too_many_subscriptions() -> None:
    world = World(Shown().channel)
    async with world.open("admin") as socket:
        for number in range(connections.MOST_SUBSCRIPTIONS):
            socket.subscribe("queues", f"n{number}")
        await socket.until("subscribed", id=f"n{connections.MOST_SUBSCRIPTIONS - 1}")
        socket.subscribe("queues", "one more")
        assert (await socket.until("error"))["data"]["code"] == "conflict"


@pytest.mark.parametrize(
    "message",
    ["", "[]", "{", '{"type": "shutdown", "channel": "queue"}', '{"type": 1}', "[" * 60_000, '"\\ud800"'],
)
async def test_what_is_no_command_is_told_so(message: str) -> None:
    world = World(Shown().channel)
    async with world.open("admin") as socket:
        socket.say(message)
        assert (await socket.until("error"))["data"]["code"] in ("malformed_body", "invalid_request")


async def test_a_message_that_is_too_big() -> None:
    world = World(Shown().channel)
    async with world.open("admin") as socket:
        socket.say(" " * (connections.MOST_MESSAGE_BYTES + 1))
        await until(lambda: socket.code is not None, "the end")
        assert socket.code == connections.TOO_BIG


async def test_an_hour() -> None:
    shown = Shown(a="one")
    world = World(shown.channel)
    async with world.open("admin") as socket:
        socket.subscribe("queues")
        await socket.until("subscribed")
        world.clock.now += connections.LONGEST_S
        shown.set("a", "two")
        await until(lambda: socket.code is not None, "the end")
        assert socket.code == connections.AGAIN


async def test_so_many_connections_of_one_caller_and_of_all() -> None:
    world = World(Shown().channel, limits=Limits(sockets=3, sockets_per_caller=2))
    async with world.open("mine") as one, world.open("mine") as two:
        assert (one.status, two.status) == (101, 101)
        async with world.open("mine") as third:
            assert (third.status, third.body["error"]["code"]) == (429, "queue_full")
        async with world.open("yours") as other, world.open("admin") as full:
            assert (other.status, full.status) == (101, 429)
    async with world.open("mine") as again:
        assert again.status == 101


async def test_a_reader_that_stops_holds_up_nobody_and_is_told_of_the_gap() -> None:
    shown = Shown()
    world = World(shown.channel)
    async with world.open("admin") as slow, world.open("operator") as quick:
        for socket in (slow, quick):
            socket.subscribe("queues")
            await socket.until("subscribed")
        slow.reads.clear()
        for number in range(MOST + 50):
            shown.set(f"n{number}", "new")
        await quick.until("queues", id=f"n{MOST + 49}")
        slow.reads.set()
        gap = await slow.until("gap")
        heard = [one for one in slow.told if one["type"] == "queues"]
        await until(lambda: len([o for o in slow.told if o["type"] == "queues"]) >= MOST, "the rest")
        assert 0 < gap["data"]["dropped"] <= 50
        assert len(heard) <= MOST + 1


def test_of_each_thing_the_newest_is_kept() -> None:
    out, channel = Outbox(most=2), Shown().channel
    for text in ("one", "two"):
        out.add(channel, "changed", Row("a", text.encode()))
    out.add(channel, "gone", Row("b", b"x"))
    assert out.dropped == 0
    out.add(channel, "changed", Row("c", b"y"))
    assert out.dropped == 1
    assert [found[2].id for found in iter(out.next_event, None)] == ["b", "c"]
    out.add(channel, "changed", Row("d", b"z"))
    out.forget(channel)
    assert out.next_event() is None


def test_answers_that_nobody_reads_have_a_bound() -> None:
    out = Outbox()
    for _ in range(MOST_REPLIES):
        out.reply(["x", "y"])
    with pytest.raises(Unread):
        out.reply(["x"])
    assert sum(1 for _ in iter(out.next_reply, None)) == 2 * MOST_REPLIES


async def test_a_listener_that_goes_while_it_waits_for_a_first_answer() -> None:
    never = asyncio.Event()

    async def ask() -> Iterable[Row]:
        await never.wait()
        return ()

    tasks = Tasks()
    hub = Hub({"x": Channel("x", "", READ_QUEUE, "/", ask)}, tasks)
    joining = asyncio.create_task(hub.join(hub.channel("x"), Any))  # type: ignore[arg-type]  # never told
    await asyncio.sleep(0)
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    await tasks.close()
    assert hub._feeds == {}
