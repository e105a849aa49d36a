"""Membership on the engine in memory, in virtual time: real consensus, real mirror."""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack

import anyio
import msgspec
import pytest
from tests.unit.membership.world import World

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import SUBJECT, Beat, Ears, encode_beat
from ollama_distributed.cluster.membership.plan import BACK, MISSED, RESTARTED, SILENT, SPACING_S, STOPPED
from ollama_distributed.cluster.membership.usage import answer
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.testing.virtual_time import VirtualLoop

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def _enter(stack: AsyncExitStack, world: World, *names: str) -> None:
    """Servers a, b, c and nodes n…, all online."""
    for name in names:
        await stack.enter_async_context(world.node(name, "node" if name.startswith("n") else "server"))
    await stack.enter_async_context(world.watched())
    everyone = list(world.nodes.values())
    await world.until(lambda: all(world.status(n, at) == "online" for n in names for at in everyone))


async def test_a_fresh_cluster_is_online_everywhere_within_ten_seconds() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1", "n2")
        assert world.clock.monotonic() < 10.0


async def test_a_crash_is_suspect_then_offline_and_seen_by_all() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1", "n2")
        start = world.clock.monotonic()
        for other in ("engine", "a", "b", "c"):
            world.cut("n1", other)
        assert (
            2.0 < await world.until(lambda: world.status("n1", world.nodes[NodeId("n2")]) == "suspect") < 3.5
        )
        await world.until(lambda: world.status("n1", world.nodes[NodeId("n2")]) == "offline")
        assert 7.0 < world.clock.monotonic() - start < 8.6
        assert world.of("n1", start) == [("suspect", MISSED), ("offline", SILENT)]
        healed = world.clock.monotonic()
        world.heal()
        await world.until(lambda: world.status("n1", world.nodes[NodeId("n1")]) == "online")
        assert world.clock.monotonic() - healed < 10.0
        assert {who for at, who, *_ in world.story if at >= start} == {"n1"}


async def test_a_clean_stop_is_known_at_once_and_the_return_soon() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c")
        watcher = world.nodes[NodeId("a")]
        async with world.node("n1"):
            await world.until(lambda: world.status("n1", watcher) == "online")
            start = world.clock.monotonic()
        assert await world.until(lambda: world.status("n1", watcher) == "offline") <= 0.1
        async with world.node("n1", boot="two"):
            assert await world.until(lambda: world.status("n1", watcher) == "online") < 3.0
        await world.until(lambda: world.of("n1", start)[-1] == ("offline", STOPPED))
        assert world.of("n1", start) == [
            ("offline", STOPPED),
            ("online", RESTARTED),
            ("offline", STOPPED),
        ]


async def test_the_goodbye_of_the_leader_is_recorded_by_the_next() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        await first.enter_async_context(world.node("a", "server"))
        assert (await world.leader()).id == "a"
        await _enter(stack, world, "b", "c", "n1")
        start = world.clock.monotonic()
        await first.aclose()
        del world.nodes[NodeId("a")]
        await world.until(lambda: world.status("a", world.nodes[NodeId("n1")]) == "offline", 10.0)
        assert world.of("a", start) == [("offline", STOPPED)]
        assert {who for at, who, *_ in world.story if at >= start} == {"a"}


async def test_a_new_leader_accuses_nobody_who_lives() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1", "n2")
        leader = await world.leader()
        start = world.clock.monotonic()
        for other in ("engine", *(n for n in world.nodes if n != leader.id)):
            world.cut(leader.id, other)
            world.cut(other, leader.id)
        others = [n for n in world.nodes.values() if n.id != leader.id]
        await world.until(lambda: any(n.consensus.is_leader() for n in others))
        await world.until(lambda: world.status(leader.id, others[0]) == "offline")
        world.heal()
        await world.until(lambda: world.status(leader.id, others[0]) == "online", 10.0)
        await anyio.sleep(15.0)
        assert {who for at, who, *_ in world.story if at >= start} == {leader.id}


async def test_cut_one_way_it_is_down_once_and_up_once() -> None:
    """The leader no longer hears it; it hears everyone, and what is said of it."""
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        leader = await world.leader()
        start = world.clock.monotonic()
        world.cut("n1", leader.id)
        await anyio.sleep(60.0)
        assert world.of("n1", start) == [("suspect", MISSED), ("offline", SILENT)]
        assert world.status("n1", world.nodes[NodeId("n1")]) == "offline"
        assert leader.consensus.is_leader()
        healed = world.clock.monotonic()
        world.heal()
        await world.until(lambda: world.status("n1", leader) == "online", 10.0)
        assert world.of("n1", healed) == [("online", BACK)]


async def test_a_leader_that_hears_nobody_not_even_itself_accuses_nobody() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        leader = await world.leader()
        start = world.clock.monotonic()
        for other in world.nodes:
            world.cut(other, leader.id)
        await anyio.sleep(60.0)
        assert leader.consensus.is_leader()
        assert world.of("n1", start) == []
        world.heal()
        await anyio.sleep(20.0)
        assert [one for one in world.story if one[0] >= start] == []


async def test_a_flapping_link_changes_its_node_at_most_once_in_ten_seconds() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1", "n2")
        leader = await world.leader()
        start = world.clock.monotonic()
        for _ in range(40):
            world.cut("n1", leader.id)
            await anyio.sleep(4.5)
            world.heal()
            await anyio.sleep(12.5)
        changes = [(at, status) for at, who, status, _ in world.story if who == "n1" and at >= start]
        first_return = [status for _, status in changes].index("online")
        times = [at for at, _ in changes[first_return:]]
        assert all(b - a >= SPACING_S - 0.1 for a, b in itertools.pairwise(times))
        assert len(times) < 20  # of 80 that an undamped record would have
        assert {who for at, who, *_ in world.story if at >= start} == {"n1"}


async def test_a_replaced_leader_writes_nothing() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        leader = await world.leader()
        # Its writes and beats still arrive, but it hears nothing: it cannot know that it was replaced.
        world.cut("engine", leader.id)
        others = [n for n in world.nodes.values() if n.id != leader.id]
        await world.until(lambda: any(n.consensus.is_leader() for n in others))
        world.cut("n1", leader.id)
        start = world.clock.monotonic()
        await anyio.sleep(30.0)
        assert world.of("n1", start) == []


async def test_a_removed_node_stays_without_record() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        world.removed.add(NodeId("n1"))
        await world.until(lambda: world.status("n1", world.nodes[NodeId("a")]) is None)
        await anyio.sleep(10.0)
        assert world.of("n1")[-1] == ("none", "")


async def test_bad_beats_do_no_harm() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "n1")
        start = world.clock.monotonic()
        sender = world.nodes[NodeId("n1")].coordination
        for data in (b"", b"\xc1" * 50, b"x" * 100_000, msgspec.msgpack.encode({"boot": 1})):
            await sender.publish(SUBJECT + "n1", data)
        await anyio.sleep(10.0)
        assert world.of("n1", start) == []
        assert world.status("n1", world.nodes[NodeId("a")]) == "online"


async def test_usage_is_asked_of_the_leader_and_kept_with_its_age() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1", "n2")
        world.nodes[NodeId("n2")].usage = Utilization(cpu=0.75, requests=3)
        await anyio.sleep(1.5)
        asker = world.nodes[NodeId("n1")]
        usages = await asker.membership.usages()
        assert sorted(usages) == ["a", "b", "c", "n1", "n2"]
        usage = usages[NodeId("n2")]
        assert (usage.cpu, usage.requests) == (0.75, 3)
        assert usage.age_s is not None
        assert usage.age_s < 1.5
        leader = await world.leader()
        world.cut(leader.id, "n1")
        await anyio.sleep(5.0)
        began = world.clock.monotonic()
        older = (await asker.membership.usages())[NodeId("n2")]
        assert world.clock.monotonic() - began <= 0.51
        assert older.cpu == 0.75
        assert older.age_s is not None
        assert 5.0 < older.age_s < 8.0
        assert asker.membership.usage(NodeId("n2")).age_s == pytest.approx(older.age_s)
        assert asker.membership.usage(NodeId("nobody")) == Utilization()


async def test_many_who_ask_at_once_are_one_question() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "n1")
        asker = world.nodes[NodeId("n1")]
        await anyio.sleep(2.0)
        asked = 0
        request = asker.coordination.request

        async def counting(subject: str, data: bytes, *, timeout_s: float = 2.0) -> bytes:
            nonlocal asked
            asked += 1
            return await request(subject, data, timeout_s=timeout_s)

        asker.coordination.request = counting  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(asker.membership.usages)
        assert asked == 1


async def test_the_usage_of_thousands_comes_in_pages() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "n1")
        sender = world.nodes[NodeId("n1")].coordination
        names = [f"x{i:05}" for i in range(4500)]
        for start in range(0, len(names), 500):  # a reader's inbox holds 1,024
            for name in names[start : start + 500]:
                await sender.publish(SUBJECT + name, encode_beat(Beat(boot="b", seq=1)))
            await anyio.sleep(0.01)
        usages = await world.nodes[NodeId("n1")].membership.usages()
        assert set(names) <= set(usages)


async def test_what_a_server_heard_it_tells_itself() -> None:
    world = World()
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        server = world.nodes[NodeId("b")].membership
        heard = server.heard(NodeId("n1"))
        assert heard is not None
        assert heard.loaded == ("m:1",)
        assert world.nodes[NodeId("n1")].membership.heard(NodeId("a")) is None
        assert (await server.usages())[NodeId("n1")].cpu == 0.5


async def test_what_is_wrong_with_a_node_is_known_everywhere_while_it_is_heard() -> None:
    world = World()
    full = Alert(level="warning", code="disk_full", message="it is full")
    async with AsyncExitStack() as stack:
        await _enter(stack, world, "a", "b", "c", "n1")
        async with world.node("n2") as ill:
            ill.alerts.append(full)
            await anyio.sleep(2.0)
            for name in ("b", "n1"):
                assert await world.nodes[NodeId(name)].membership.alerts() == {NodeId("n2"): (full,)}
            ill.alerts.clear()
            await anyio.sleep(2.0)
            assert await world.nodes[NodeId("n1")].membership.alerts() == {}
            ill.alerts.append(full)
            await anyio.sleep(2.0)
        await anyio.sleep(2.0)
        for name in ("b", "n1"):
            assert await world.nodes[NodeId(name)].membership.alerts() == {}, "it said goodbye"


def test_one_answer_holds_so_many_alerts() -> None:
    """The bus carries 1 MB at most; who says too much is left out, and its figures are not."""
    ears = Ears(NodeId("a"))
    for number in range(200):
        ears.hear(NodeId(f"x{number:03}"), Beat(boot="b", seq=1, alerts=b"x" * 10_000), 0.0)
    data = answer(ears, msgspec.msgpack.encode({}), 0.0)
    assert len(data) < 1_000_000
    page = msgspec.msgpack.decode(data)
    assert (len(page["nodes"]), len(page["alerts"])) == (200, 50)
