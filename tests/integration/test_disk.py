"""Disks that are full, old and wrong: real stores, catalogues and mutual TLS, nodes of one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.hop_nodes import text_request, until
from tests.swarm_nodes import SwarmNode, SwarmNodes, swarm

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import BlobNotFound, Conflict, DiskFull, ModelNotFound
from ollama_distributed.distribution.disk import STRAY_S, NodeDisk
from ollama_distributed.distribution.disks import ClusterDisks
from ollama_distributed.distribution.evicting import RECENT_S
from ollama_distributed.distribution.shelves import FORGET_S
from ollama_distributed.distribution.uses import Uses
from ollama_distributed.models.names import BlobId
from ollama_distributed.node.disk import disk_care, read_uses
from ollama_distributed.node.settings import Settings
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.records import Assigned, AssignedModel, Desired

pytestmark = pytest.mark.integration

MIB = 1 << 20
LATER_S = 2 * max(RECENT_S, FORGET_S)
DEADLINE_S = 60.0


class Clock(SystemClock):
    """Goes on by itself, and further when told."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:  # type: ignore[override]
        return SystemClock.time() + self.ahead_s


class DiskNode:
    """A node and its disk."""

    def __init__(self, node: SwarmNode, uses: Uses) -> None:
        self.node = node
        self.uses = uses
        self.own: NodeDisk
        self.everywhere: ClusterDisks
        self.models = node.hop.catalog

    def names(self) -> set[str]:
        return {spec.display.removesuffix(":latest") for spec in self.models.list()}

    def size(self) -> int:
        folder = self.node.folder
        return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())

    def weights(self, name: str) -> Path:
        spec = next(spec for spec in self.models.list() if spec.display.startswith(name))
        assert spec.weights is not None
        return Path(spec.weights)


class Disks:
    def __init__(self, nodes: SwarmNodes, stack: AsyncExitStack, clock: Clock) -> None:
        self.nodes = nodes
        self.clock = clock
        self._stack = stack
        self._limits: dict[str, Settings] = {}

    async def add(self, name: str, **settings: Any) -> DiskNode:
        node = await self.nodes.add(name)
        folder = node.folder.parent
        disk = DiskNode(node, read_uses(folder, self.clock))
        care = await self._stack.enter_async_context(
            disk_care(
                Settings(data_dir=folder, scrub_every=0.0, scrub_rate_mib=0.0, **settings),
                node.id,
                store=node.hop.store,
                catalog=node.hop.catalog,
                serving=node.hop.serving,
                uses=disk.uses,
                shelves=node.shelves,
                copies=node.manager.moves,
                pool=node.hop.pool,
                door=node.hop.door,
                state=node.hop.state,
                clock=self.clock,
            )
        )
        disk.own, disk.everywhere = care.own, care.everywhere
        node.hop.serving._used = disk.uses.served
        return disk

    async def copy(self, name: str, to: DiskNode) -> str:
        """How it ended, or why not."""
        (begun,) = await to.node.manager.distribute(name, [to.node.id])
        ended = await self.nodes.ended(begun)
        to.node.tell()
        return ended.code or ended.state

    def later(self) -> None:
        """What was used is not recent any more, and what was given on is not on its way."""
        self.clock.ahead_s += LATER_S
        for node in self.nodes.all:
            for shelf in node.shelves._shelves.values():
                shelf._asked_at = float("-inf")


@asynccontextmanager
async def disks(folder: Path) -> AsyncIterator[Disks]:
    clock = Clock()
    async with swarm(folder) as nodes, AsyncExitStack() as stack:
        yield Disks(nodes, stack, clock)


async def test_the_least_recently_used_goes_where_another_node_keeps_it(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b", disk_quota="8MiB")
        for number, name in enumerate(("one", "two", "three")):
            await a.node.hold(name, 2, seed=number)
        assert await world.copy("one", b) == "done"
        assert await world.copy("two", b) == "done"
        assert [row.model for row in (await b.own.answer()).models] == ["one:latest", "two:latest"]
        world.later()
        b.uses.used("one")
        world.later()
        await b.node.hold("mine", 2, seed=9)
        assert b.names() == {"one", "two", "mine"}
        assert await world.copy("three", b) == "done"
        assert b.names() == {"one", "three", "mine"}, "two was used longest ago; nobody else has mine"
        assert a.names() == {"one", "two", "three"}
        figures = b.own.figures()
        assert (figures.evictions, figures.refused) == (1, 0)
        assert figures.evicted_bytes > 2 * MIB
        assert b.size() <= 8 * MIB
        assert not b.node.staged()
        assert a.uses.last_used("registry.ollama.ai/library/three:latest") >= world.clock.time() - DEADLINE_S


async def test_without_room_nothing_comes_and_nothing_goes(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b", disk_quota="7MiB")
        await a.node.hold("shared", 1, seed=1)
        await a.node.hold("large", 6, seed=2)
        assert await world.copy("shared", b) == "done"
        await b.node.hold("mine", 2, seed=3)
        world.later()
        before = b.node.blobs()
        assert await world.copy("large", b) == "disk_full"
        assert b.names() == {"shared", "mine"}, "even without the shared one it would not fit: it stays"
        assert b.node.blobs() == before
        assert not b.node.staged()
        transfer = (await b.node.manager.transfers())[0]
        assert "1 the last copy" in transfer.error
        assert b.own.figures().refused == 1


async def test_copies_that_come_together_keep_within_the_quota(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b", disk_quota="6MiB")
        names = ["m1", "m2", "m3"]
        for number, name in enumerate(names):
            await a.node.hold(name, 2, seed=number)
        begun = [(await b.node.manager.distribute(name, ["b"]))[0] for name in names]
        ended = await world.nodes.done(begun)
        assert sorted(one.code or one.state for one in ended) == ["disk_full", "done", "done"]
        assert b.size() <= 6 * MIB
        assert not b.node.staged()
        answer = await b.own.answer()
        assert answer.coming_bytes == 0
        assert len(answer.models) == 2


async def test_of_two_that_drop_the_same_model_one_keeps_it(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b, c = [await world.add(name) for name in "abc"]
        await a.node.hold("m", 1)
        for _ in range(3):
            holders = [one for one in (a, b, c) if one.names()]
            for one in (a, b, c):
                if one not in holders:
                    assert await world.copy("m", one) == "done"
            world.later()
            tries = [one.own.evictions.evict("m") for one in (a, b, c)]
            gone = await asyncio.gather(*tries, return_exceptions=True)
            assert any(isinstance(one, Conflict) for one in gone)
            assert any(one.names() == {"m"} for one in (a, b, c))
            for one in (a, b, c):
                one.node.tell()


async def test_a_promise_is_given_for_what_is_there_and_stays(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b")
        await a.node.hold("m", 1)
        assert await world.copy("m", b) == "done"
        world.later()
        file = a.weights("m")
        file.rename(file.with_name("elsewhere"))  # another program took it; the catalogue knows it still
        with pytest.raises(Conflict, match="could promise"):
            await b.own.evictions.evict("m")
        file.with_name("elsewhere").rename(file)
        world.nodes.hops.drain(a.node.hop)
        world.nodes.hops.status(a.node.hop, "online")
        a.node.hop.draining = False
        with pytest.raises(Conflict, match="no other node that is online"):
            await b.own.evictions.evict("m")
        world.nodes.hops.drain(a.node.hop, drain=False)
        assert await b.own.evictions.evict("m") > MIB


async def test_what_stays_and_why(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b")
        await a.node.hold("m", 1)
        key = "registry.ollama.ai/library/m:latest"

        async def why(*, last_copy: bool = False) -> str:
            with pytest.raises(Conflict) as refused:
                await a.everywhere.evict("m", "b-name", last_copy=last_copy)
            row = next(row for row in (await a.everywhere.disk("b")).models if row.model == "m:latest")
            return f"{row.kept}: {refused.value.message}"

        with pytest.raises(ModelNotFound):
            await b.everywhere.evict("m", "", last_copy=False)
        assert await world.copy("m", b) == "done"
        b.node.hop.serving.start(text_request("m"), lambda _: None)
        await until(lambda: b.node.hop.serving.resident or b.own.uses.hits)
        await b.node.hop.serving.unload("m")
        await until(lambda: not b.node.hop.serving.resident)
        assert (await b.own.answer()).models[0].kept == "recent"
        world.later()

        write = world.nodes.hops.write
        write(state_keys.desired(key), Desired(model=key, pins=(b.node.id,)))
        assert (await why()).startswith("pinned: m:latest stays: it is pinned to this node")
        write(state_keys.desired(key), Desired(model=key, replicas=2))
        assert "last: m:latest stays: 2 other nodes are to hold it and 1 do" in await why()
        write(state_keys.desired(key), Desired(model=key, replicas=1))
        assigned = Assigned(node=b.node.id, epoch=1, models=(AssignedModel(model=key),))
        write(state_keys.assigned(b.node.id), assigned)
        assert (await why(last_copy=True)).startswith("placed: ")
        write(state_keys.desired(key), None)
        assert ": m:latest stays: the cluster keeps copies on nodes with room" in await why()
        write(state_keys.assigned(b.node.id), None)
        with b.models.pinned([blob for one in b.models.stored() for blob in one.blobs]):
            assert (await why()).startswith("moving: ")
        world.nodes.hops.status(a.node.hop, "offline")
        assert "last: m:latest stays: no other node that is online" in await why()

        freed = await a.everywhere.evict("m", "b", last_copy=True)
        assert freed.freed_bytes > MIB
        assert freed.name == "b-name"
        assert not b.names()
        assert not b.node.blobs()


async def test_the_plan_lets_a_copy_go_only_if_the_right_version_is_kept(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b")
        await a.node.hold("m", 1, seed=1)
        await b.node.hold("m", 1, seed=2)
        digest = a.models.stored()[0].digest
        with pytest.raises(Conflict, match="no other node"):
            await b.own.evictions.drop("m", b.models.stored()[0].digest)
        await b.own.evictions.drop("m", digest)
        assert not b.names()
        with pytest.raises(Conflict, match="no other node"):
            await a.own.evictions.drop("m", digest)
        await b.own.evictions.drop("m", digest)


async def test_leftovers_go_before_models(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b", disk_quota="12MiB")
        await a.node.hold("one", 3, seed=1)
        await a.node.hold("two", 3, seed=2)
        assert await world.copy("one", b) == "done"
        half, stray = BlobId("1" * 64), BlobId("2" * 64)
        async with b.node.hop.store.partial(half, 4 * MIB) as partial:
            await partial.write(0, bytes(3 * MIB))
        (b.node.folder / "blobs" / stray.filename).write_bytes(bytes(3 * MIB))
        world.later()
        with pytest.raises(DiskFull):
            async with b.own.rooms.room({BlobId("3" * 64): 12 * MIB}):
                raise AssertionError("there was no room")
        assert b.names() == {"one"}
        assert await world.copy("two", b) == "done"
        assert b.names() == {"one", "two"}
        world.clock.ahead_s += 2 * STRAY_S
        async with b.own.rooms.room({BlobId("3" * 64): 5 * MIB}):
            assert stray.filename not in b.node.blobs()
            assert b.names() == {"one", "two"}


async def _scrubbed(disk: DiskNode) -> None:
    disk.own.scrubber.ask()
    async with asyncio.timeout(DEADLINE_S):
        while disk.own.scrubber.row.running:
            await asyncio.sleep(0.01)


def _rot(file: Path) -> None:
    with file.open("r+b") as out:
        out.seek(2 * MIB)
        out.write(b"rotten")


async def test_a_damaged_file_is_taken_away_and_fetched_again(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b")
        content = await a.node.hold("m", 2)
        await a.models.copy("m", "second")
        a.node.tell()
        assert await world.copy("m", b) == "done"
        await b.models.copy("m", "second")
        b.node.tell()
        await _scrubbed(b)
        row = b.own.scrubber.row
        assert (row.corrupt, row.files) == (0, 2)
        assert row.done_bytes == row.total_bytes > 2 * MIB
        file = b.weights("m")
        _rot(file)
        await _scrubbed(b)
        assert b.own.scrubber.row.corrupt == 1
        assert file.read_bytes() == content
        assert b.names() == {"m", "second"}
        assert not b.node.staged(), "the damaged one is not needed any more"
        figures = b.own.figures()
        assert figures.corrupt == 1
        assert figures.repaired >= 1
        assert figures.scrubbed_bytes > 4 * MIB


async def test_a_damaged_model_that_nobody_else_holds_says_so_and_heals_later(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a, b = await world.add("a"), await world.add("b")
        content = await b.node.hold("m", 2)
        file = b.weights("m")
        _rot(file)
        await _scrubbed(b)
        b.node.tell()
        assert not file.exists()
        assert b.names() == set()
        with pytest.raises(BlobNotFound, match="model 'm:latest' is damaged"):
            await b.models.resolve("m")
        row = (await b.own.answer()).models[0]
        assert row.damaged
        assert row.model == "m:latest"
        (left,) = b.node.staged()
        assert left.startswith("damaged-"), "whoever wants may look into it"
        with pytest.raises(Conflict, match="is damaged"):
            await b.everywhere.evict("m", "", last_copy=False)

        await a.node.hold("m", 2)
        await b.own.scrubber.mend()
        assert file.read_bytes() == content
        assert b.names() == {"m"}
        assert not b.node.staged()


async def test_what_was_used_when_outlives_a_restart(tmp_path: Path) -> None:
    async with disks(tmp_path) as world:
        a = await world.add("a")
        await a.node.hold("m", 1)
        world.clock.ahead_s = 1e6
        a.uses.used("m")
        used = a.uses.last_used("registry.ollama.ai/library/m:latest")
    again = read_uses(tmp_path / "a", SystemClock())
    assert again.last_used("registry.ollama.ai/library/m:latest") == used
    (tmp_path / "a" / "uses.json").write_text("{")
    assert read_uses(tmp_path / "a", SystemClock()).last_used("registry.ollama.ai/library/m:latest") < used
