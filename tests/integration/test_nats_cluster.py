"""Three servers, killed and paused under writes: one history, nothing acknowledged lost, writes
back in time. `make accept-coordination` makes twenty kills of what are three in CI."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from tests.limits import SOON_S, limit_s
from tests.suspended import suspended
from tests.voters import Voters, filled, ready, voters, written
from tests.writers import writing

from ollama_distributed.adapters.coordination.nats.config import ClusterBlock
from ollama_distributed.adapters.coordination.nats.damage import damaged
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.base.errors import DeadlineExceeded, Unavailable
from ollama_distributed.cluster.ports import REFUSAL_S, Write

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

KILLS = int(os.environ.get("COORDINATION_KILLS", "3"))
BACK_S = limit_s(9.5)
NAMES = ("n1", "n2", "n3")


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Voters]:
    async with voters(tmp_path, size=3) as made:
        yield made


async def _settled(three: Voters) -> None:
    """All three vote and hold the state: the next fault finds them whole."""
    with anyio.fail_after(SOON_S):
        while True:
            try:
                meta = await three.system.meta()
                found = await three.stream().info()
            except Unavailable:
                found = None
            else:
                whole = len(meta.replicas) == 2 and not any(peer.offline for peer in meta.replicas)
                if whole and found is not None and found.complete:
                    return
            await anyio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(240 + 60 * KILLS)
async def test_kills_of_the_leading_server_under_writes(three: Voters) -> None:
    gaps: list[float] = []
    async with writing(three, seed=KILLS) as writers:
        for _ in range(KILLS):
            await _settled(three)
            await writers.more(50)
            writers.forget_gap()
            restarts = three.server(leader := await three.leader()).restarts
            three.kill(leader)
            with anyio.fail_after(SOON_S):
                while three.server(leader).restarts == restarts:
                    await anyio.sleep(0.01)
            await writers.more(50)
            gaps.append(writers.longest_gap_s)
    print(f"gaps of writes: median {statistics.median(gaps):.1f} s, longest {max(gaps):.1f} s; {gaps}")
    print(f"writes: {writers.history.counts()}")
    assert max(gaps) < BACK_S
    await three.agree(NAMES)


async def test_all_three_killed_at_once(three: Voters) -> None:
    async with writing(three) as writers:
        await writers.more(100)
        writers.forget_gap()
        for name in NAMES:
            three.kill(name)
        await writers.more(50)
        print(f"writes back after {writers.longest_gap_s:.1f} s")
    await three.agree(NAMES)


async def test_a_voter_that_starts_last_keeps_its_place(three: Voters) -> None:
    """The others have not heard of it since they started: they know it by its place only."""
    for name in NAMES:
        await three[name].stop()
    await three["n1"].start()
    await three["n2"].start()
    await three.leader()
    voters = await three.voting()
    assert len(voters) == 3
    assert "n3" not in voters, "they do not know its name"
    await three["n3"].start()
    assert three["n3"].seat.formation is not None
    assert three.server("n3").running
    await three.agree(NAMES)


async def test_a_paused_leader_does_not_split_the_history(three: Voters) -> None:
    async with writing(three) as writers:
        await writers.more(50)
        writers.forget_gap()
        paused = three.server(await three.leader()).pid
        with suspended(paused):
            await writers.more(50)
        assert writers.longest_gap_s < limit_s(9.5 + 3)  # the client's own pings have to miss first
        await writers.more(100)
    await three.agree(NAMES)


async def test_a_minority_refuses_writes_and_mirrors_answer(three: Voters) -> None:
    leader = await three.leader()
    survivor = next(name for name in NAMES if name != leader)
    address = three.address("one")
    async with three.client("one") as one:
        one.update_servers([three.server(survivor).url])
        await ready(one)
        revision = await written(one, "k", b"1")
        await one.scan()
        for name in NAMES:
            if name != survivor:
                await three[name].stop()
        started = anyio.current_time()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await one.put("k", b"2", revision=revision)
        waited_s = anyio.current_time() - started
        assert waited_s < limit_s(REFUSAL_S + 1)
        at_once = False
        with anyio.fail_after(SOON_S):
            while not at_once:  # once it is known to be away; not while the client connects anew
                started = anyio.current_time()
                with pytest.raises((Unavailable, DeadlineExceeded)):
                    await one.put("k", b"3", revision=revision)
                at_once = anyio.current_time() - started < REFUSAL_S / 2
        assert [entry.key for entry in (await one.scan()).entries] == ["k"]
        for name in NAMES:
            if name != survivor:
                await three[name].start()
        with anyio.fail_after(SOON_S):
            while not one.writable:
                await anyio.sleep(0.01)
    assert address.urls == three.urls


async def test_only_servers_may_be_routes(three: Voters) -> None:
    """A node's certificate is of the same CA; what it lacks is the password."""
    host, _, port = three.formation.places[0].route.rpartition(":")
    three.trust.issue("evil", "node")
    context = three.trust.tls("evil").client()
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="any")
    try:
        writer.write(
            b'CONNECT {"verbose":false,"pedantic":false,"tls_required":true,"name":"evil",'
            b'"cluster":"c1","user":"route","pass":"guess","headers":true,"lnoc":true}\r\nPING\r\n'
        )
        with anyio.fail_after(SOON_S):
            answer = await reader.read()
        assert b"Authorization Violation" in answer
        assert b"PONG" not in answer
    finally:
        writer.transport.abort()
    assert await three.voting() == set(NAMES)


async def test_a_server_of_another_cluster_does_not_get_in(three: Voters, tmp_path: Path) -> None:
    block = ClusterBlock(name="c1", host="127.0.0.1", port=-1, routes=three.formation.routes)
    stranger = Voters(tmp_path / "stranger")
    server = NatsServer(tmp_path / "s", stranger.trust.access("n9"), name="n9", cluster=block)
    async with server:
        with anyio.fail_after(SOON_S):
            while "TLS" not in (text := (tmp_path / "s" / "nats-server.log").read_text()):
                await anyio.sleep(0.05)
        assert "Route connection created" not in text or "handshake error" in text
    assert await three.voting() == set(NAMES)


async def test_a_damaged_replica_is_found(three: Voters) -> None:
    async with three.client("one") as one:
        await ready(one)
        for part in range(20):  # 16 MB: more than one block
            await filled(one, [Write(f"k{part}.{i}", os.urandom(4000)) for i in range(200)])
    await three.agree(NAMES)
    assert await damaged(three.system, three.formation, "KV_cfg") == ()
    leader = await three.leader()
    victim = three[next(name for name in NAMES if name != leader)]
    await victim.stop()
    _lose_a_block(victim.server.store)
    await victim.start()
    await _settled(three)
    with anyio.fail_after(SOON_S):
        while (found := await damaged(three.system, three.formation, "KV_cfg")) == ():
            await anyio.sleep(0.1)
    assert found == (victim.node,)


def _lose_a_block(store: Path) -> None:
    """Cut the stream's first block in half, and drop the index that would tell."""
    folder = next(store.glob("jetstream/*/streams/KV_cfg/msgs"))
    blocks = sorted(folder.glob("*.blk"), key=lambda path: int(path.stem))
    assert len(blocks) > 1, "what is lost of the last block comes back from the log"
    block = blocks[0]
    with block.open("rb+") as file:
        file.truncate(block.stat().st_size // 2)
    for index in folder.glob("index.db"):
        index.unlink()
