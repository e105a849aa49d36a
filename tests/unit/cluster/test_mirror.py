"""The mirror: follows, survives, never holds the loop for long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import structlog
from tests.consensus_nodes import cluster, until

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster import mirror as module
from ollama_distributed.cluster.mirror import FRESH_S, Mirror
from ollama_distributed.cluster.ports import Coordination, Entry, Resync, WatchEvent
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Intent, Member
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def member(node: str) -> bytes:
    return encode(Member(node=NodeId(node), status="online", since=1.0))


async def test_it_is_empty_then_ready_then_follows() -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination:
        await coordination.create(keys.member("n1"), member("n1"))
        mirror = Mirror(coordination, clock=VirtualClock())
        assert not mirror.ready
        assert not mirror.synced
        assert mirror.state == ClusterState()
        async with mirror:
            state = await mirror.wait_ready()
            assert list(state.nodes) == ["n1"]
            revision = await coordination.create(keys.member("n2"), member("n2"))
            assert list((await mirror.reach(revision)).nodes) == ["n1", "n2"]
            gone = await coordination.delete(keys.member("n1"), revision=1)
            assert list((await mirror.reach(gone)).nodes) == ["n2"]
            assert list(state.nodes) == ["n1"], "a state that somebody holds stays as it was"


async def test_keys_of_others_move_the_revision_only() -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        before = await mirror.wait_ready()
        revision = await coordination.create("admission.tokens.t1", b"secret")
        after = await mirror.reach(revision)
        assert after.raw is before.raw


async def test_a_listener_sees_each_change_in_order_and_one_that_fails_stops_nobody(logs: list[Any]) -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        await mirror.wait_ready()
        seen: list[tuple[int, list[NodeId]]] = []

        def broken(before: ClusterState, after: ClusterState) -> None:
            raise RuntimeError("a defect")

        def listen(before: ClusterState, after: ClusterState) -> None:
            assert after.revision == before.revision + 1
            seen.append((after.revision, after.nodes.differences(before.nodes)))

        mirror.on_change(broken)
        forget = mirror.on_change(listen)
        for node in ("n1", "n2"):
            await coordination.create(keys.member(node), member(node))
        await mirror.reach(2)
        assert seen == [(1, ["n1"]), (2, ["n2"])]
        forget()
        forget()
        await coordination.create(keys.member("n3"), member("n3"))
        await mirror.reach(3)
        assert len(seen) == 2
        assert [line["event"] for line in logs].count(module.LISTENER_FAILED) == 3


async def test_what_cannot_be_read_is_logged_once(logs: list[Any]) -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        await coordination.create(keys.member("n1"), b"{}")
        await coordination.create(keys.member("n2"), member("n2"))
        await mirror.reach(2)
        told = [line for line in logs if line["event"] == module.UNREADABLE]
        assert [line["key"] for line in told] == [keys.member("n1")]
        assert list(mirror.state.nodes) == ["n2"]


async def test_its_age_shows_when_it_is_cut_off_and_news_come_after() -> None:
    async with cluster("a", "b") as two:
        await two.leader()
        node = two.others(await two.leader())[0]
        assert node.mirror.stale_s < 1.5
        two.wires.cut(node.id)
        await anyio.sleep(60)
        assert node.mirror.stale_s > 58
        assert not node.mirror.synced
        assert node.mirror.state.lease is not None, "what it knew stays"
        await two.write(keys.intent("x"), encode(Intent(node=NodeId("x"), drain=True)))
        two.wires.heal()
        await until(lambda: "x" in node.mirror.state.nodes, 10.0)
        await anyio.sleep(FRESH_S)
        assert node.mirror.synced


async def test_a_resync_forgets_what_is_gone_and_tells_of_it_at_once() -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        for node in ("n1", "n2"):
            await coordination.create(keys.member(node), member(node))
        kept = (await mirror.reach(2)).nodes[NodeId("n2")]
        changes: list[list[NodeId]] = []
        mirror.on_change(lambda before, after: changes.append(after.nodes.differences(before.nodes)))
        coordination._fanout.resync(
            Resync((Entry(keys.member("n2"), member("n2"), 2), Entry(keys.member("n3"), member("n3"), 7)), 9)
        )
        state = await mirror.reach(9)
        assert list(state.nodes) == ["n2", "n3"]
        assert changes == [["n1", "n3"]], "one change, whole"
        assert state.nodes[NodeId("n2")] is kept


class Failing:
    """A watch that raises at first, then ends, then works."""

    def __init__(self, coordination: Coordination) -> None:
        self._coordination = coordination
        self.tries = 0

    @asynccontextmanager
    async def watch(self, prefix: str = "") -> AsyncIterator[AsyncIterator[WatchEvent]]:
        self.tries += 1
        if self.tries <= 3:
            raise RuntimeError("the adapter's defect")
        if self.tries == 4:
            yield _nothing()
            return
        async with self._coordination.watch(prefix) as events:
            yield events


async def _nothing() -> AsyncIterator[WatchEvent]:
    for event in ():
        yield event


async def test_a_watch_that_fails_is_begun_again_with_pauses(logs: list[Any]) -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination:
        failing = Failing(coordination)
        begun = anyio.current_time()
        async with Mirror(failing, clock=VirtualClock()) as mirror:  # type: ignore[arg-type]
            await mirror.wait_ready()
            assert failing.tries == 5
            assert anyio.current_time() - begun == pytest.approx(0.2 + 0.4 + 0.8 + 1.6, abs=0.2)
        assert [line["event"] for line in logs].count(module.WATCH_FAILED) == 4


async def test_a_large_state_is_loaded_in_slices_and_shown_whole() -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination:
        entries = tuple(Entry(keys.member(f"n{i:05d}"), member(f"n{i:05d}"), i + 1) for i in range(10_000))
        async with Mirror(coordination, clock=VirtualClock()) as mirror:
            await mirror.wait_ready()
            coordination._fanout.resync(Resync(entries, 10_000))
            turns, sizes = 0, set()
            with anyio.fail_after(10):
                while mirror.state.revision < 10_000:
                    await anyio.lowlevel.checkpoint()
                    turns += 1
                    sizes.add(len(mirror.state.nodes))
            assert turns >= len(entries) // module.SLICE, "others had the loop in between"
            assert sizes <= {0, 10_000}


async def test_a_burst_of_events_leaves_the_loop_to_others() -> None:
    engine = MemoryEngine()
    async with engine.client("n") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        await mirror.wait_ready()
        for i in range(2_000):
            coordination._fanout.apply(Entry(keys.member(f"n{i}"), member(f"n{i}"), i + 1))
        turns = 0
        with anyio.fail_after(10):
            while mirror.state.revision < 2_000:
                await anyio.lowlevel.checkpoint()
                turns += 1
        assert turns >= 2_000 // module.SLICE
