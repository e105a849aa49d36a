"""The same pull asked of several nodes is one download: joins, take-overs, refusals, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from tests.simulation.pulling import MB, FakeRegistry, Model, World

from ollama_distributed.base.errors import DiskFull, ModelNotFound, Unauthenticated, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.turns import LEASE_S, Turns, rank
from ollama_distributed.testing import virtual_time

M = Model("m", 1, 100, 3)
OTHER = Model("other", 100, 7)
"""Its largest blob is that of `M` too."""
TOTAL = 104 * MB


def whole(world: World, *names: str) -> None:
    for name in names:
        assert world[name].blobs == M.sizes, name
        assert not world[name].halves


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def entry() -> None:
        await main()

    virtual_time.run(entry)


@pytest.mark.parametrize("gap_s", [0.0, 0.003, 0.05, 2.0])
def test_the_same_pull_at_once_is_one_download(gap_s: float) -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b", "c", "d", "e")
        asked = []
        for node in world.nodes.values():
            asked.append(asyncio.create_task(node.pull(M)))
            await asyncio.sleep(gap_s)
        lines = await asyncio.gather(*asked)
        assert world.registry.served == M.sizes
        assert len(world.registry.manifests) == 1
        whole(world, "a", "b", "c", "d", "e")
        for told in lines:
            assert told[0] == "pulling manifest 0"
            assert told[-3:] == ["verifying sha256 digest 0", "writing manifest 0", "success 0"]
        for node in world.nodes.values():
            while_it_came = [here for at, here in node.seen if at < 11 and 20 < here < 104]
            assert len(while_it_came) > 3, "the bytes of whoever downloads are shown"

    run(main)


def test_a_later_pull_asks_the_registry_for_the_manifest_only() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M, OTHER), "a", "b", "c")
        await world["a"].pull(M)
        await world["b"].pull(M)
        assert world.registry.served == M.sizes
        assert world.registry.manifests == ["a", "b"]
        assert dict(world["b"].together.origins(M.name).peers) == {"a": TOTAL}
        await world["c"].pull(OTHER)  # a blob that others have under another name
        assert world.registry.served == {**M.sizes, **OTHER.sizes}
        assert sum(world.registry.by.values()) == TOTAL + 7 * MB

    run(main)


def test_two_names_that_share_a_blob_fetch_it_once() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M, OTHER), "a", "b", "c")
        await asyncio.gather(world["a"].pull(M), world["b"].pull(OTHER))
        assert world.registry.served == {**M.sizes, **OTHER.sizes}

    run(main)


@pytest.mark.parametrize("when_s", [0.05, 0.15, 0.4, 3.0, 10.5])
def test_one_of_those_who_wait_takes_over(when_s: float) -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b", "c", "d")
        first = asyncio.create_task(world["a"].pull(M))
        await asyncio.sleep(0.035)
        others = [asyncio.create_task(world[name].pull(M)) for name in "bcd"]
        await asyncio.sleep(when_s)
        await world["a"].die()
        lost = world["a"].halves.copy()
        with pytest.raises(Unavailable):
            await first
        await asyncio.gather(*others)
        whole(world, "b", "c", "d")
        # What only the dead one had comes a second time; nothing comes a third time.
        again = sum(world.registry.served.values()) - TOTAL
        assert again <= sum(lost.values()) + sum(world["a"].blobs.values())
        assert len(world.registry.by) <= 2

    run(main)


def test_one_that_returns_goes_on_with_what_it_has() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b")
        first = asyncio.create_task(world["a"].pull(M))
        await asyncio.sleep(5)
        await world["a"].die()
        with pytest.raises(Unavailable):
            await first
        world["a"].restart()
        await world["a"].pull(M)
        assert sum(world.registry.served.values()) == TOTAL
        await world["b"].pull(M)
        assert sum(world.registry.served.values()) == TOTAL

    run(main)


def test_a_full_disk_is_one_nodes_trouble_only() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b", "c")
        asked = [asyncio.create_task(world[name].pull(M)) for name in "abc"]
        await asyncio.sleep(3)
        puller = next(world.nodes[node] for node in world.registry.by)
        puller.full = True
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        failed = [one for one in outcomes if isinstance(one, BaseException)]
        assert [type(one) for one in failed] == [DiskFull]
        whole(world, *(name for name in "abc" if world[name] is not puller))

    run(main)


def test_what_the_registry_refuses_is_refused_for_all() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b", "c")
        asked = (world[name].pull(Model("none", 1)) for name in "abc")
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in outcomes] == [ModelNotFound] * 3
        assert len(world.registry.manifests) == 1
        # Credentials are a node's own: who has them pulls.
        world.registry.closed_to = {world[name].id: Unauthenticated("no") for name in "ab"}
        outcomes = await asyncio.gather(*(world[name].pull(M) for name in "abc"), return_exceptions=True)
        assert [type(one) for one in outcomes[:2]] in ([Unauthenticated] * 2, [list] * 2)
        whole(world, "c")

    run(main)


def test_a_registry_that_no_node_reaches_is_given_up() -> None:
    async def main() -> None:
        names = [f"n{i}" for i in range(12)]
        world = World(FakeRegistry(M), *names)
        asked = [asyncio.create_task(world[name].pull(M)) for name in names]
        await asyncio.sleep(3)
        world.registry.closed_to = {node: Unavailable("no way there") for node in world.nodes}
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(one) for one in outcomes} == {Unavailable}

    run(main)


def test_who_goes_away_leaves_the_work_to_those_who_wait() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b")
        first = asyncio.create_task(world["a"].pull(M))
        await asyncio.sleep(1)
        second = asyncio.create_task(world["b"].pull(M))
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.wait({first})
        await second
        whole(world, "b")
        assert world.registry.served == M.sizes
        assert not world["a"].models

    run(main)


def test_a_node_that_does_not_get_on_is_not_waited_for() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b", "c")
        first = asyncio.create_task(world["a"].pull(M))
        await asyncio.sleep(2)
        others = [asyncio.create_task(world[name].pull(M)) for name in "bc"]
        await asyncio.sleep(2)
        world.registry.hangs = {world["a"].id}
        await asyncio.gather(*others)
        whole(world, "b", "c")
        assert set(world.registry.by) in ({"a", "b"}, {"a", "c"})
        first.cancel()
        await asyncio.wait({first})

    run(main)


def test_a_keeper_that_dies_or_joins_makes_no_second_download() -> None:
    async def main() -> None:
        for change in ("dies", "joins"):
            world = World(FakeRegistry(M), *"abcdef")
            key = f"blob/{list(M.sizes)[1].hex}"
            keeper = rank(key, world.servers())[0]
            first, second, *_ = (node for node in world.nodes.values() if node.id != keeper)
            pulling = asyncio.create_task(first.pull(M))
            await asyncio.sleep(4)
            if change == "dies":
                await world.nodes[keeper].die()
            else:
                newer = (NodeId(f"x{i}") for i in range(1000))
                world.add(next(node for node in newer if rank(key, [*world.servers(), node])[0] == node))
            await asyncio.gather(pulling, second.pull(M))
            assert world.registry.served == M.sizes

    run(main)


def test_nodes_that_cannot_reach_each_other_pull_as_if_alone() -> None:
    async def main() -> None:
        world = World(FakeRegistry(M), "a", "b")
        world.cut = {frozenset(world.nodes)}
        await asyncio.gather(world["a"].pull(M), world["b"].pull(M))
        whole(world, "a", "b")
        assert sum(world.registry.served.values()) == 2 * TOTAL

    run(main)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_dies_all_who_live_have_it_in_the_end(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        names = [f"n{i}" for i in range(6)]
        world = World(FakeRegistry(M), *names)

        async def pulls(name: str) -> None:
            await asyncio.sleep(chance.uniform(0, 3))
            while not world[name].models:
                if not world[name].alive:
                    await asyncio.sleep(1)
                    continue
                try:
                    await world[name].pull(M)
                except Unavailable:
                    await asyncio.sleep(1)

        asked = [asyncio.create_task(pulls(name)) for name in names]
        deaths = 0
        for _ in range(5):
            await asyncio.sleep(chance.uniform(0, 6))
            victim = world[chance.choice(names)]
            if victim.alive:
                deaths += 1
                await victim.die()
                if chance.random() < 0.5:
                    await asyncio.sleep(chance.uniform(0, 10))
                    world.known_dead.add(victim.id)
                    await asyncio.sleep(chance.uniform(0, 10))
                    world.known_dead.discard(victim.id)
                victim.restart()
        await asyncio.gather(*asked)
        whole(world, *names)
        # A death costs what only the dead node had, and what two fetched while turns were unknown.
        assert sum(world.registry.served.values()) <= (1 + deaths) * TOTAL

    run(main)


def test_turns() -> None:
    turns = Turns()
    a, b, c = (world for world in World(FakeRegistry(), "a", "b", "c").nodes)
    assert turns.take("k", a, 0.0) == a
    assert turns.take("k", b, 1.0) == a
    assert turns.take("k", a, 5.0) == a
    assert turns.holder("k", 5.0 + LEASE_S - 0.1) == a
    assert turns.take("k", b, 5.0 + LEASE_S) == b
    assert turns.take("k", c, 12.0, instead_of=a) == b
    assert turns.take("k", c, 12.0, instead_of=b) == c
    turns.end("k", b)
    assert turns.holder("k", 12.0) == c
    turns.end("k", c)
    assert turns.holder("k", 12.0) is None


def test_keys_are_spread_and_stay_where_they_are() -> None:
    nodes = list(World(FakeRegistry(), *(f"n{i}" for i in range(10))).nodes)
    keys = [f"name/{i}" for i in range(1000)]
    first = {key: rank(key, nodes)[0] for key in keys}
    counts = [list(first.values()).count(node) for node in nodes]
    assert min(counts) > 60
    assert all(rank(key, nodes[:-1])[0] == first[key] for key in keys if first[key] != nodes[-1])
