"""What must hold while parts of a cluster die, hang or are cut off (issue 3, "Must be seen" 2 and 4).

In all of it: no acknowledged write is lost, the history of the config is linearizable, no epoch
has two leaders, watchers see versions in order, and a prompt fails only where every node that
holds the model is out of reach, or where the answer had begun at a node that was hit.
"""

from __future__ import annotations

from itertools import product

import anyio
import psutil
import pytest

from tests.chaos.conftest import LONG, Scenario, Scenarios, note
from tests.chaos.world import HOLDERS, WELL_S, World, alive, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.untraced,
    pytest.mark.timeout(1200 if LONG else 600),
]

WRITES_BACK_S = 9.5
HEALED_S = 15.0
"""The goal is 10. A server that was cut off comes back with a later term and makes the others
elect anew, which takes nats-server 4 to 9 s, after up to 2 s until it is connected again: on a
machine that is shared the worst of that is a little over the goal. The table has the figures."""
HELD_S = 12.0 if LONG else 3.0
"""How long a cut or a pause lasts at least."""
KEPT = ("cluster", "voters", "nodes", "models", "config_version")


def rounds(*, long: int, short: int = 1) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("turn", range(long if LONG else short))


async def healed(world: World, run: Scenario) -> None:
    """One leader, and every node says that all are well."""
    run.took_s["healed"] = await until(world.well, WELL_S, "all well after the cut")
    run.load.harm_is_over()
    assert run.took_s["healed"] <= world.limit_s(HEALED_S), world.unwell


async def pause(run: Scenario) -> None:
    """Let the load run into the harm."""
    assert run.load.harm
    await anyio.sleep(HELD_S)


# ── what dies ───────────────────────────────────────────────────────────────────────


@rounds(long=20)
async def test_the_leading_nats_server_is_killed(world: World, scenario: Scenarios, turn: int) -> None:
    async with scenario("kill -9 leading nats-server") as run:
        world[world.stream_leader()].child("nats-server").kill()
        run.load.harm_begins()
        run.took_s["writes"] = await run.load.more_writes(1)
        run.took_s["all well"] = await until(world.well, WELL_S, "all well")
    assert run.load.write_outage_s() <= world.limit_s(WRITES_BACK_S)
    assert run.load.excused() == 0


@rounds(long=5)
async def test_the_leading_node_is_killed(world: World, scenario: Scenarios, turn: int) -> None:
    async with scenario("kill -9 leading node") as run:
        leader = await world.leader()
        world.kill(leader)
        run.load.harm_begins(gone=[leader])
        run.took_s["writes"] = await run.load.more_writes(1)
        await world.start(leader)
        run.took_s["all well"] = await until(world.well, WELL_S, "all well")
        run.load.harm_is_over()
    assert run.load.write_outage_s() <= world.limit_s(WRITES_BACK_S)


@pytest.mark.skipif(not LONG, reason="in short it is of tests/e2e/test_cluster.py")
async def test_all_nodes_are_killed_at_once(world: World) -> None:
    writes = {"values": {"max_queue": 777, "keep_alive": "1h"}, "comment": "before the power cut"}
    version = (await world.call("n2", "PUT", "/api/v1/config", json=writes))["version"]
    await world.call("n3", "PATCH", f"/api/v1/nodes/{world['n3'].id}", json={"labels": {"zone": "c"}})
    made = await world.call("n1", "POST", "/api/v1/cluster/tokens", json={"role": "node", "uses": 7})
    before = await world.status("n1")
    history = await world.call("n1", "GET", "/api/v1/config/history")
    children = [world[name].child("nats-server").pid for name in world.names]
    names = world.names

    world.kill(*names)
    await until(lambda: gone(children), WELL_S, "the nats-servers died with their nodes")
    began_at = anyio.current_time()
    async with anyio.create_task_group() as starting:
        for name in names:
            starting.start_soon(world.start, name)
    started_s = anyio.current_time() - began_at
    well_s = await until(world.well, WELL_S, "all well after the restart")
    note("kill -9 all nodes", f"all started {started_s:.1f}, all well {well_s:.1f} later")

    for name in names:
        after = await world.status(name)
        assert {field: after[field] for field in KEPT} == {field: before[field] for field in KEPT}
        assert (await world.call(name, "GET", "/api/v1/config"))["version"] == version
        assert await world.call(name, "GET", "/api/v1/config/history") == history
        rows = (await world.call(name, "GET", "/api/v1/nodes"))["nodes"]
        assert {row["name"]: tuple(row["models"]) for row in rows.values()} == {
            name: tuple(f"{model}:latest" for model, holders in HOLDERS.items() if name in holders)
            for name in names
        }
        assert rows[world["n3"].id]["labels"] == {"zone": "c"}
        tokens = (await world.call(name, "GET", "/api/v1/cluster/tokens"))["tokens"]
        assert [(one["uses"], one["state"]) for one in tokens if one["id"] == made["id"]] == [(7, "open")]


async def gone(processes: list[int]) -> bool:
    return not any(map(alive, processes))


# ── what hangs ──────────────────────────────────────────────────────────────────────


@rounds(long=3)
async def test_the_leading_nats_server_hangs(world: World, scenario: Scenarios, turn: int) -> None:
    async with scenario("SIGSTOP leading nats-server") as run:
        world.suspend(world[world.stream_leader()].child("nats-server"))
        run.load.harm_begins()
        run.took_s["writes"] = await run.load.more_writes(1)
        await pause(run)
        world.resume()
        await healed(world, run)
    assert run.load.excused() == 0


@rounds(long=3)
async def test_the_leading_node_hangs(world: World, scenario: Scenarios, turn: int) -> None:
    """Its nats-server runs on. What it wrote under its old fence when it wakes is refused."""
    async with scenario("SIGSTOP leading node") as run:
        leader = await world.leader()
        world.suspend(psutil.Process(world[leader].pid))
        run.load.harm_begins(gone=[leader])
        run.took_s["writes"] = await run.load.more_writes(1)
        await pause(run)
        world.resume()
        await healed(world, run)


# ── what is cut off ─────────────────────────────────────────────────────────────────


@rounds(long=3)
async def test_the_leader_is_cut_off(world: World, scenario: Scenarios, turn: int) -> None:
    async with scenario("leader cut off") as run:
        leader = await world.leader()
        others = [name for name in world.names if name != leader]
        world.network.split([world.machine(leader)], world.machines(others))
        run.load.harm_begins(cut=product([leader], others))
        run.took_s["writes"] = await run.load.more_writes(1)
        run.took_s["new leader"] = await until(lambda: leads_another(world, others[0], leader), WELL_S, "one")
        run.took_s["it knows"] = await until(lambda: has_no_leader(world, leader), WELL_S, "no leader there")
        await pause(run)
        world.network.heal()
        await healed(world, run)


@rounds(long=3)
async def test_a_minority_is_cut_off(world: World, scenario: Scenarios, turn: int) -> None:
    async with scenario("follower cut off") as run:
        leader = await world.leader()
        alone = next(name for name in reversed(world.names) if name != leader)
        others = [name for name in world.names if name != alone]
        world.network.split([world.machine(alone)], world.machines(others))
        run.load.harm_begins(cut=product([alone], others))
        run.took_s["it knows"] = await until(lambda: has_no_leader(world, alone), WELL_S, "no leader there")
        run.took_s["offline"] = await until(lambda: is_offline(world, alone, leader), WELL_S, "seen offline")
        world.network.heal()
        await healed(world, run)


@rounds(long=3)
@pytest.mark.parametrize(
    "deaf", [False, True] if LONG else [False], ids=lambda deaf: "deaf" if deaf else "unheard"
)
async def test_the_leader_is_cut_off_one_way(
    world: World, scenario: Scenarios, deaf: bool, turn: int
) -> None:
    """It hears the others and they do not hear it, or the other way round."""
    async with scenario(f"leader {'deaf' if deaf else 'unheard'}") as run:
        leader = await world.leader()
        others = [name for name in world.names if name != leader]
        for other in world.machines(others):
            there = (other, world.machine(leader)) if deaf else (world.machine(leader), other)
            world.network.cut_one_way(*there)
        run.load.harm_begins(cut=product([leader], others))
        run.took_s["writes"] = await run.load.more_writes(1)
        await pause(run)
        world.network.heal()
        await healed(world, run)


async def leads_another(world: World, ask: str, than: str) -> bool:
    leader = (await world.status(ask))["leader"]["leader"]
    return leader is not None and leader != world[than].id


async def has_no_leader(world: World, name: str) -> bool:
    status = await world.status(name)
    return status["leader"]["leader"] is None and status["status"] == "no_quorum"


async def is_offline(world: World, name: str, ask: str) -> bool:
    rows = (await world.call(ask, "GET", "/api/v1/nodes"))["nodes"]
    return bool(rows[world[name].id]["status"] == "offline")


# ── five ────────────────────────────────────────────────────────────────────────────


async def test_five_voters_lose_two(world: World, scenario: Scenarios) -> None:
    """The cluster grows under load; then the leader and another one are cut off together."""
    async with scenario("growth to five, two cut off") as run:
        await world.join(["n4", "n5"])
        run.took_s["five voters"] = await world.grown(5)
        leader = await world.leader()
        away = [leader, next(name for name in reversed(world.names) if name != leader)]
        others = [name for name in world.names if name not in away]
        world.network.split(world.machines(away), world.machines(others))
        run.load.harm_begins(cut=product(away, others))
        run.took_s["writes"] = await run.load.more_writes(1)
        await pause(run)
        world.network.heal()
        await healed(world, run)
