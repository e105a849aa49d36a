"""Load reports: said when they change, heard by who asked, forgotten when nobody asks."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import msgspec
import pytest

from ollama_distributed.adapters.coordination.memory import MemoryCoordination, MemoryEngine
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import (
    IDLE_S,
    MAX_INTEREST,
    MAX_REPORT_BYTES,
    QUIET_S,
    SUBJECT,
    SWEEP_S,
    Load,
    LoadReports,
    ModelLoad,
    decode_load,
)
from ollama_distributed.cluster.ports import Message
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

pytestmark = pytest.mark.anyio

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
Load4 = Load(boot="one", slots=4, busy=1, models=(ModelLoad(name="m:1", slots=4, busy=1),))


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class World:
    def __init__(self) -> None:
        self.engine = MemoryEngine()
        self.clock = VirtualClock()
        self.loads: dict[NodeId, Load] = {A: Load4, B: Load4, C: Load4}
        self.subscribed: list[str] = []
        """Subjects that anyone is subscribed to."""

    @asynccontextmanager
    async def node(self, node: NodeId, own: Callable[[], Load] | None = None) -> AsyncIterator[LoadReports]:
        async with (
            self.engine.client(node) as coordination,
            LoadReports(
                self._noting(coordination),
                node=node,
                clock=self.clock,
                chance=random.Random(node),
                own=own or (lambda: self.loads[node]),
            ) as reports,
        ):
            yield reports

    def _noting(self, coordination: MemoryCoordination) -> MemoryCoordination:
        subscribe = coordination.subscribe

        @asynccontextmanager
        async def noting(subject: str) -> AsyncIterator[AsyncIterator[Message]]:
            async with subscribe(subject) as messages:
                self.subscribed.append(subject)
                try:
                    yield messages
                finally:
                    self.subscribed.remove(subject)

        coordination.subscribe = noting  # type: ignore[method-assign]
        return coordination

    @asynccontextmanager
    async def counting(self, node: NodeId) -> AsyncIterator[list[float]]:
        """When `node` reported."""
        times: list[float] = []

        async def count() -> None:
            async with self.engine.client("counter") as other, other.subscribe(SUBJECT + node) as messages:
                async for _ in messages:
                    times.append(self.clock.monotonic())  # noqa: PERF401  # it never ends

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            yield times
            tasks.cancel_scope.cancel()


async def test_nothing_is_known_of_a_node_that_nobody_asked_about() -> None:
    world = World()
    async with world.node(A) as reports, world.node(B):
        await anyio.sleep(10.0)
        assert reports.report(B) is None
        assert reports.listening == ()


async def test_interest_gives_figures_at_once_and_keeps_them_fresh() -> None:
    world = World()
    async with world.node(A) as reports, world.node(B):
        await anyio.sleep(2.5)  # B reported, and will be quiet for a while
        reports.interest([B])
        await anyio.sleep(0.01)
        first = reports.report(B)
        assert first is not None
        assert msgspec.structs.replace(first, age_s=None) == Load4
        world.loads[B] = Load(boot="one", slots=4, busy=4, queued=7)
        await anyio.sleep(1.1)
        report = reports.report(B)
        assert report is not None
        assert (report.busy, report.queued) == (4, 7)
        assert report.age_s is not None
        assert report.age_s <= 1.0


async def test_an_unchanged_load_is_said_every_few_seconds_a_changing_one_each_second() -> None:
    world = World()
    async with world.node(B), world.counting(B) as times:
        await anyio.sleep(60.0)
        assert 60 / QUIET_S <= len(times) <= 60 / (QUIET_S - 2.0)
        assert max(b - a for a, b in itertools.pairwise(times)) <= QUIET_S
        quiet = len(times)
        for busy in range(240):
            world.loads[B] = Load(busy=busy)
            await anyio.sleep(0.25)
        assert 60 <= len(times) - quiet <= 70


async def test_a_silent_node_shows_its_age() -> None:
    world = World()
    async with world.node(A) as reports:
        async with world.node(B):
            reports.interest([B])
            await anyio.sleep(1.0)
        await anyio.sleep(20.0)
        report = reports.report(B)
        assert report is not None
        assert report.age_s is not None
        assert report.age_s > 19.0


async def test_a_node_nobody_asks_about_is_forgotten_one_asked_about_is_not() -> None:
    world = World()
    async with world.node(A) as reports, world.node(B), world.node(C):
        reports.interest([B, C])
        for _ in range(round((IDLE_S + 2 * SWEEP_S) / 5)):
            await anyio.sleep(5.0)
            assert reports.report(C) is not None
        assert reports.listening == (C,)
        assert reports.report(B) is None
        assert world.subscribed == [SUBJECT + C]


async def test_interest_is_bounded_the_oldest_gives_way() -> None:
    world = World()
    async with world.node(A) as reports:
        reports.interest([B])
        await anyio.sleep(1.0)
        reports.interest(NodeId(f"n{i}") for i in range(MAX_INTEREST))
        await anyio.sleep(0.1)
        assert len(reports.listening) == MAX_INTEREST
        assert B not in reports.listening
        assert sorted(world.subscribed) == sorted(SUBJECT + node for node in reports.listening)


async def test_its_own_load_needs_no_message() -> None:
    world = World()
    async with world.node(A) as reports:
        reports.interest([A])
        assert reports.listening == ()
        assert reports.report(A) == msgspec.structs.replace(Load4, age_s=0.0)


async def test_bad_reports_are_dropped() -> None:
    world = World()
    async with world.node(A) as reports, world.engine.client(B) as liar:
        reports.interest([B])
        await anyio.sleep(0.1)
        for data in (b"", b"\xc1", b"x" * (MAX_REPORT_BYTES + 1), msgspec.msgpack.encode({"slots": "many"})):
            await liar.publish(SUBJECT + B, data)
        await anyio.sleep(0.1)
        assert reports.report(B) is None
        await liar.publish(SUBJECT + B, msgspec.msgpack.encode({"slots": 3, "news": True}))
        await anyio.sleep(0.1)
        report = reports.report(B)
        assert report is not None
        assert report.slots == 3


async def test_a_load_that_cannot_be_read_now_is_said_later() -> None:
    world, broken = World(), [True]

    def own() -> Load:
        if broken:
            raise Invalid("not now")
        return Load4

    async with AsyncExitStack() as stack:
        reports = await stack.enter_async_context(world.node(A))
        await stack.enter_async_context(world.node(B, own))
        reports.interest([B])
        await anyio.sleep(10.0)
        assert reports.report(B) is None
        broken.clear()
        await anyio.sleep(2.0)
        assert reports.report(B) is not None


def test_a_report_of_another_version_is_read() -> None:
    assert decode_load(msgspec.msgpack.encode({"busy": 2, "more": 1})) == Load(busy=2)
