"""The leader's writes alone: fenced, with a full grace, repeated until they are there, bounded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from ollama_distributed.adapters.coordination.memory import MemoryCoordination, MemoryEngine
from ollama_distributed.base.errors import DeadlineExceeded
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.membership.beats import Beat, Ears
from ollama_distributed.cluster.membership.registrar import MAX_TRANSITIONS, Registrar
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Fence
from ollama_distributed.cluster.tasks import end
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import Member, Term
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

pytestmark = pytest.mark.anyio

ME, B = NodeId("me"), NodeId("b")


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Desk:
    """A registrar whose leadership and hearing the test decides."""

    def __init__(self, coordination: MemoryCoordination, mirror: Mirror) -> None:
        self.coordination = coordination
        self.clock = VirtualClock()
        self.ears = Ears(ME)
        self.held: Fence | None = None
        self.speakers: list[NodeId] = [ME]
        self._mirror = mirror
        self.frozen: ClusterState | None = None
        """What the mirror shows instead of the state: it lags."""
        self.registrar = Registrar(
            coordination, self, self, self.ears, clock=self.clock, removed=lambda _: False
        )
        self._seq = 0

    @property
    def state(self) -> ClusterState:
        return self.frozen or self._mirror.state

    def fence(self) -> Fence | None:
        return self.held

    def get_leader(self) -> NodeId | None:
        return ME if self.held else None

    async def take_over(self) -> None:
        """Another epoch of this node."""
        entry = await self.coordination.get(keys.FENCE)
        revision = 0 if entry is None else entry.revision
        term = encode(Term(node=ME, epoch=revision + 1))
        self.held = Fence(keys.FENCE, await self.coordination.put(keys.FENCE, term, revision=revision))

    async def speak(self) -> None:
        self._seq += 1
        for node in self.speakers:
            self.ears.hear(node, Beat(boot="one", seq=self._seq), self.clock.monotonic())
        await anyio.sleep(0.9)

    async def member(self, node: NodeId = B) -> Member | None:
        entry = await self.coordination.get(keys.member(node))
        return None if entry is None else decode(entry.value, Member)

    async def status(self, node: NodeId = B) -> str | None:
        member = await self.member(node)
        return None if member is None else member.status


@asynccontextmanager
async def _desk(engine: MemoryEngine) -> AsyncIterator[Desk]:
    chance = random.Random(1)
    async with engine.client("me") as coordination, Mirror(coordination, clock=VirtualClock()) as mirror:
        await mirror.wait_ready()
        desk = Desk(coordination, mirror)
        tasks = [
            asyncio.create_task(keep_going("speak", desk.speak, chance)),
            asyncio.create_task(keep_going("members", desk.registrar.step, chance, max_wait_s=1.0)),
        ]
        try:
            yield desk
        finally:
            await end(tasks)


async def _online(desk: Desk) -> None:
    """B is recorded as online, by this node."""
    member = encode(Member(node=B, status="online", since=0.0, boot="one"))
    await desk.coordination.create(keys.member(B), member)
    desk.speakers.append(B)
    await desk.take_over()
    await anyio.sleep(5.0)
    assert await desk.status() == "online"


async def test_without_the_fence_nothing_is_written() -> None:
    async with _desk(MemoryEngine()) as desk:
        desk.speakers.append(B)
        await anyio.sleep(20.0)
        assert await desk.member() is None


async def test_a_fence_that_moved_on_refuses_what_an_old_leader_writes() -> None:
    async with _desk(MemoryEngine()) as desk:
        await _online(desk)
        old = desk.held
        await desk.take_over()
        desk.held = old
        desk.speakers.remove(B)
        await anyio.sleep(30.0)
        assert await desk.status() == "online"


async def test_silence_before_taking_over_is_not_held_against_a_node() -> None:
    async with _desk(MemoryEngine()) as desk:
        await _online(desk)
        desk.held = None
        desk.speakers.remove(B)
        await anyio.sleep(60.0)
        await desk.take_over()
        await anyio.sleep(2.9)
        assert await desk.status() == "online"
        await anyio.sleep(0.5)
        assert await desk.status() == "suspect"
        await anyio.sleep(5.0)
        assert await desk.status() == "offline"


async def test_what_could_not_be_written_is_written_when_the_quorum_is_back() -> None:
    engine = MemoryEngine()
    async with _desk(engine) as desk:
        await _online(desk)
        engine.available = False
        desk.speakers.remove(B)
        await anyio.sleep(20.0)
        engine.available = True
        await anyio.sleep(1.5)
        assert await desk.status() == "offline"


async def test_a_thousand_newcomers_are_recorded_in_bounded_batches() -> None:
    engine = MemoryEngine()
    sizes: list[int] = []
    async with _desk(engine) as desk:
        write = desk.coordination.batch

        async def counting(writes, *, fence=None):  # type: ignore[no-untyped-def]
            sizes.append(len(writes))
            return await write(writes, fence=fence)

        desk.coordination.batch = counting  # type: ignore[method-assign]
        newcomers = [NodeId(f"n{i:04}") for i in range(1000)]
        desk.speakers += newcomers
        await desk.take_over()
        sizes.clear()
        await anyio.sleep(15.0)
        assert all([await desk.status(node) == "joining" for node in newcomers[::100]])
    assert max(sizes) == MAX_TRANSITIONS
    assert sum(sizes) == 1001  # each once, and this node


async def test_a_mirror_that_lags_makes_no_write_twice() -> None:
    engine = MemoryEngine()
    async with _desk(engine) as desk:
        await _online(desk)
        desk.speakers.remove(B)
        desk.frozen = desk.state
        before = engine.revision
        await anyio.sleep(20.0)
        assert await desk.status() == "offline"
        assert engine.revision == before + 2  # suspect, offline


async def test_a_process_that_stood_still_accuses_nobody() -> None:
    async with _desk(MemoryEngine()) as desk:
        await _online(desk)
        # Its timers and messages all wait for 60 s; then the ticks come before the beats.
        desk.clock.monotonic = lambda: asyncio.get_running_loop().time() + 60.0  # type: ignore[method-assign]
        await anyio.sleep(10.0)
        assert await desk.status() == "online"


async def test_a_return_whose_write_was_not_answered_counts_as_one() -> None:
    """Simulation, seed 151: the node changed again three seconds after it was back."""
    engine = MemoryEngine()
    async with _desk(engine) as desk:
        await _online(desk)
        desk.speakers.remove(B)
        await anyio.sleep(10.0)
        assert await desk.status() == "offline"
        write = desk.coordination.batch

        async def unanswered(writes, *, fence=None):  # type: ignore[no-untyped-def]
            await write(writes, fence=fence)
            raise DeadlineExceeded("no answer in time")

        desk.coordination.batch = unanswered  # type: ignore[method-assign]
        desk.speakers.append(B)
        while await desk.status() != "online":
            await anyio.sleep(0.1)
        desk.coordination.batch = write  # type: ignore[method-assign]
        desk.speakers.remove(B)
        await anyio.sleep(9.0)
        assert await desk.status() == "online"
        await anyio.sleep(2.0)
        assert await desk.status() in ("suspect", "offline")
