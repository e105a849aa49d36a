"""Leader, proposals and config over the real engine, whose server dies under them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import anyio
import pytest
from tests.consensus_nodes import until, validate
from tests.limits import SOON_S, limit_s
from tests.trust import Trust
from tests.voters import voters, written

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.coordination.nats.session import Address
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import DeadlineExceeded, NotFound, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.config import ConfigManager
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.state import keys
from ollama_distributed.state.changes import SetDrain, SetLabels
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

T = TypeVar("T")


class Member:
    def __init__(self, coordination: NatsCoordination, mirror: Mirror, consensus: ConsensusEngine) -> None:
        self.coordination = coordination
        self.mirror = mirror
        self.consensus = consensus
        self.config = ConfigManager(consensus, mirror, validate=validate)


@asynccontextmanager
async def members(
    address: Callable[[str], Address], *names: str, create: bool = True
) -> AsyncIterator[dict[str, Member]]:
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        made: dict[str, Member] = {}
        for name in names:
            coordination = await stack.enter_async_context(
                NatsCoordination(address(name), name=name, create=create and not made)
            )
            mirror = await stack.enter_async_context(Mirror(coordination, clock=clock))
            consensus = await stack.enter_async_context(
                ConsensusEngine(
                    coordination,
                    mirror,
                    node=NodeId(name),
                    role="server",
                    clock=clock,
                    random=random.Random(name),
                )
            )
            made[name] = Member(coordination, mirror, consensus)
        yield made


async def settled(made: dict[str, Member]) -> Member:
    """The one leader, once all agree."""

    def agreed() -> bool:
        leaders = {member.consensus.get_leader() for member in made.values()}
        return leaders == {name for name, member in made.items() if member.consensus.is_leader()} != set()

    await until(agreed, SOON_S)
    leader = made["a"].consensus.get_leader()
    assert leader is not None
    return made[leader]


def _epoch(member: Member) -> int:
    term = member.mirror.state.term
    return term.epoch if term is not None else 0


async def advertise(member: Member, name: str) -> None:
    advert = Advert(node=NodeId(name), name=name, role="server", version="1", boot="b", started_at=1.0)
    await written(member.coordination, keys.advert(name), encode(advert))


async def through(change: Callable[[], Awaitable[T]]) -> T:
    """Made again when the answer was late, as people do: a busy machine or disk takes its seconds."""
    with anyio.fail_after(SOON_S):
        while True:
            try:
                return await change()
            except (Unavailable, DeadlineExceeded):
                await anyio.sleep(0.05)


async def test_any_member_changes_the_cluster(tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    async with trust.server("n1") as server, members(partial(_address, trust, server), *"abc") as made:
        begun = anyio.current_time()
        await settled(made)
        assert anyio.current_time() - begun < limit_s(5.0)
        for name, member in made.items():
            await advertise(member, name)
        for name, member in made.items():
            change = SetDrain(node=NodeId("a"), drain=name != "c")
            await through(partial(member.consensus.propose_change, change, actor=name))
            version = await through(partial(member.config.put, {name: 1}, actor=name))
            assert version.by == name
            nobody = SetDrain(node=NodeId("nobody"), drain=True)
            with pytest.raises(NotFound):
                await through(partial(member.consensus.propose_change, nobody))
        everything = {"a": 1, "b": 1, "c": 1}
        await until(lambda: all(m.config.current.values == everything for m in made.values()), limit_s(1.0))
        await until(
            lambda: all(m.mirror.state.nodes[NodeId("a")].status == "joining" for m in made.values()), SOON_S
        )


async def test_a_leader_that_stops_hands_over_and_one_that_vanishes_is_replaced(tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    async with trust.server("n1") as server, members(partial(_address, trust, server), *"abc") as made:
        leader = await settled(made)
        first = _epoch(leader)
        await leader.consensus.stop()
        rest = {name: member for name, member in made.items() if member is not leader}

        def led() -> bool:
            return any(member.consensus.is_leader() for member in rest.values())

        assert await until(led, SOON_S) < limit_s(2.0)
        second = next(member for member in rest.values() if member.consensus.is_leader())
        await second.coordination.__aexit__(None, None, None)  # as if it were gone: it renews nothing more
        third = next(member for member in rest.values() if member is not second)
        assert await until(third.consensus.is_leader, SOON_S) < limit_s(5.0)
        await until(lambda: not second.consensus.is_leader(), SOON_S)
        await until(lambda: _epoch(third) >= first + 2, SOON_S)


async def test_the_server_dies_under_changes_and_each_applies_once(tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    async with trust.server("n1") as server, members(partial(_address, trust, server), *"abc") as made:

        async def kill() -> None:
            restarts = server.restarts
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: server.restarts > restarts, SOON_S)

        await changes_under(kill, made, kills=3)


async def test_the_leading_one_of_three_servers_dies_under_changes(tmp_path: Path) -> None:
    async with voters(tmp_path, size=3) as servers, members(servers.address, *"abc", create=False) as made:

        async def kill() -> None:
            servers.kill(await servers.leader())

        gaps = await changes_under(kill, made, kills=2)
        print(f"no change went through for {', '.join(f'{gap:.1f}' for gap in gaps)} s")


async def changes_under(
    kill: Callable[[], Awaitable[None]], made: dict[str, Member], *, kills: int
) -> list[float]:
    """Every member proposes all the time; the gaps in what was acknowledged after each kill."""
    await settled(made)
    for name, member in made.items():
        await advertise(member, name)
    acknowledged: dict[str, int] = {}
    times: list[float] = []
    stop = anyio.Event()

    async def change(name: str, member: Member) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            proposal = f"{name}{count}"
            labels = SetLabels(node=NodeId(name), labels={"count": str(count)})
            while proposal not in acknowledged and not stop.is_set():
                begun = anyio.current_time()
                try:
                    acknowledged[proposal] = await member.consensus.propose_change(labels, proposal=proposal)
                    times.append(anyio.current_time())
                except (Unavailable, DeadlineExceeded):
                    assert anyio.current_time() - begun < limit_s(2.5)
                    await anyio.sleep(0.05)

    async def grown(by: int) -> None:
        wanted = len(acknowledged) + by
        await until(lambda: len(acknowledged) >= wanted, SOON_S)

    gaps: list[float] = []
    async with anyio.create_task_group() as group:
        for name, member in made.items():
            group.start_soon(change, name, member)
        for _ in range(kills):
            await grown(15)
            seen = len(times) - 1
            await kill()
            await grown(15)
            gaps.append(max(later - earlier for earlier, later in pairwise(times[seen:])))
        stop.set()
    assert max(gaps) < limit_s(9.5)
    await settled(made)
    last = max(acknowledged.values())
    for member in made.values():
        with anyio.fail_after(SOON_S):
            state = await member.mirror.reach(last)
        for name in made:
            done = max(int(p.removeprefix(name)) for p in acknowledged if p.startswith(name))
            assert int(state.nodes[NodeId(name)].labels["count"]) >= done, "an acknowledged change was lost"
        applied = {p: state.revision_of(keys.change(p)) for p in acknowledged if p in state.applied}
        assert applied
        assert applied.items() <= acknowledged.items(), "a change applied twice"
    return gaps


def _address(trust: Trust, server: NatsServer, node: str) -> Address:
    return trust.address(server, node=node)
