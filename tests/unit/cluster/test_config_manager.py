"""The cluster's config: versions, validation, races, and every node applying it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from tests.consensus_nodes import cluster, until, validate

from ollama_distributed.base.errors import Conflict, DeadlineExceeded, Invalid, NotFound, Unavailable
from ollama_distributed.state import keys
from ollama_distributed.state.changes import KEPT_VERSIONS
from ollama_distributed.state.records import Config
from ollama_distributed.testing.virtual_time import VirtualLoop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def test_values_are_merged_taken_out_and_versioned() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        a, b = three.nodes["a"].config, three.nodes["b"].config
        assert a.current == Config()
        assert a.history() == []
        first = await a.put({"x": 1, "y": [2]}, actor="k1", comment="why")
        assert (first.version, first.values, first.by, first.comment) == (1, {"x": 1, "y": [2]}, "k1", "why")
        assert first.at > 0
        assert a.current == first
        second = await b.put({"x": None, "z": {"deep": None}}, version=1)
        assert (second.version, second.values) == (2, {"y": [2], "z": {"deep": None}})
        assert b.history() == [second, first]


async def test_what_is_not_valid_changes_nothing() -> None:
    async with cluster("a") as one:
        await one.leader()
        config = one.nodes["a"].config
        with pytest.raises(Invalid):
            await config.put({"bad": 1, "good": 1})
        assert config.current == Config()
        assert keys.CONFIG not in one.engine.entries


async def test_a_version_that_passed_is_a_conflict_that_says_where_it_stands() -> None:
    async with cluster(*"ab") as two:
        await two.leader()
        a, b = two.nodes["a"].config, two.nodes["b"].config
        await a.put({"x": 1}, version=0)
        await a.put({"x": 2}, version=1)
        for config in (a, b):
            with pytest.raises(Conflict) as caught:
                await config.put({"x": 3}, version=1)
            assert caught.value.revision == 2
        assert a.current.values == {"x": 2}


async def test_a_version_seen_elsewhere_is_waited_for() -> None:
    async with cluster(*"ab") as two:
        leader = await two.leader()
        other = two.others(leader)[0]
        two.wires.cut(other.id, sends=False)
        await leader.config.put({"x": 1})
        two.wires.heal()
        assert other.config.current.version == 0, "it has not heard yet"
        async with anyio.create_task_group() as group:
            # Its next event shows the gap, and it fetches what it missed.
            group.start_soon(leader.config.put, {"y": 1})
            with pytest.raises(Conflict) as caught:
                await other.config.put({"x": 2}, version=1)
        assert caught.value.revision == 2


async def test_a_version_that_nobody_made_is_not_called_passed() -> None:
    async with cluster("a") as one:
        await one.leader()
        with pytest.raises(Conflict, match="no version 7"):
            await one.nodes["a"].config.put({"x": 1}, version=7)


async def test_of_those_who_name_the_same_version_one_wins() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        won: list[str] = []
        lost: list[int | None] = []

        async def put(name: str) -> None:
            try:
                await three.nodes[name].config.put({"by": name}, version=0)
                won.append(name)
            except Conflict as exc:
                lost.append(exc.revision)

        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(put, name)
        assert len(won) == 1
        assert lost == [1, 1]
        await three.agree()
        assert {node.config.current.values["by"] for node in three.nodes.values()} == set(won)


async def test_those_who_name_no_version_all_have_their_way() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        made: list[int] = []

        async def put(name: str, i: int) -> None:
            made.append((await three.nodes[name].config.put({f"{name}{i}": i})).version)

        async with anyio.create_task_group() as group:
            for name in "abc":
                for i in range(4):
                    group.start_soon(put, name, i)
        assert sorted(made) == list(range(1, 13))
        await three.agree()
        for node in three.nodes.values():
            assert sorted(node.config.current.values) == sorted(f"{n}{i}" for n in "abc" for i in range(4))


async def test_a_rollback_is_a_new_version_of_old_values() -> None:
    async with cluster(*"ab") as two:
        await two.leader()
        a, b = two.nodes["a"].config, two.nodes["b"].config
        await a.put({"x": 1})
        await a.put({"x": 2})
        back = await b.rollback(1, actor="k2")
        assert (back.version, back.values, back.by) == (3, {"x": 1}, "k2")
        assert back.comment == "rollback to version 1"
        assert (await b.rollback(0)).values == {}
        with pytest.raises(NotFound):
            await b.rollback(9)


async def test_a_rollback_to_values_that_are_not_valid_any_more_is_refused() -> None:
    async with cluster("a") as one:
        await one.leader()
        config = one.nodes["a"].config
        config._validate = lambda values: None
        await config.put({"bad": 1})
        await config.put({"bad": None})
        config._validate = validate
        with pytest.raises(Invalid):
            await config.rollback(1)


async def test_the_last_hundred_versions_are_kept() -> None:
    async with cluster("a") as one:
        await one.leader()
        config = one.nodes["a"].config
        for i in range(KEPT_VERSIONS + 5):
            await config.put({"i": i})
        assert [c.version for c in config.history()] == list(range(KEPT_VERSIONS + 5, 5, -1))


async def test_every_node_applies_a_version_within_a_second() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        applied: dict[str, list[int]] = {name: [] for name in three.nodes}
        for name, node in three.nodes.items():
            node.config.on_applied(lambda config, to=applied[name]: to.append(config.version))  # type: ignore[misc]
        await three.nodes["a"].config.put({"x": 1})
        await until(lambda: all(versions == [0, 1] for versions in applied.values()), 1.0)


async def test_a_part_that_fails_to_apply_does_not_stop_the_others() -> None:
    async with cluster("a") as one:
        await one.leader()
        config = one.nodes["a"].config
        applied: list[int] = []

        def broken(config: Config) -> None:
            raise RuntimeError("a defect")

        config.on_applied(broken)
        forget = config.on_applied(lambda config: applied.append(config.version))
        await config.put({"x": 1})
        forget()
        await config.put({"x": 2})
        assert applied == [0, 1]


async def test_a_watcher_sees_every_version_once_and_in_order_however_slow() -> None:
    async with cluster(*"ab") as two:
        await two.leader()
        a, b = two.nodes["a"].config, two.nodes["b"].config
        await a.put({"x": 1})
        await two.agree()
        watch = b.watch()
        assert isinstance(watch, AsyncIterator)
        with anyio.fail_after(5):
            assert (await anext(watch)).version == 1
            for i in range(2, 7):
                await a.put({"x": i})
            await two.agree()
            assert [(await anext(watch)).values["x"] for _ in range(2, 7)] == [2, 3, 4, 5, 6]
        with anyio.move_on_after(2) as waited:
            await anext(watch)
        assert waited.cancelled_caught


async def test_a_version_in_words_of_a_newer_program_leaves_the_last_one_in_force() -> None:
    async with cluster("a") as one:
        await one.leader()
        config = one.nodes["a"].config
        await config.put({"x": 1})
        applied: list[int] = []
        config.on_applied(lambda config: applied.append(config.version))
        await one.write(keys.CONFIG, b'{"version":"two"}')
        await until(lambda: bool(one.nodes["a"].mirror.state.rejected))
        await anyio.sleep(5)
        assert config.current.values == {"x": 1}
        assert applied == [1]
        with pytest.raises(Conflict, match="upgrade"):
            await config.put({"x": 2})
        await one.write(keys.CONFIG, b'{"version":2,"values":{"x":9}}')
        await until(lambda: config.current.values == {"x": 9})
        assert applied == [1, 2]


async def test_without_a_quorum_it_is_refused_in_time_and_still_reads() -> None:
    async with cluster(*"ab") as two:
        await two.leader()
        await two.nodes["a"].config.put({"x": 1})
        await two.agree()
        two.engine.available = False
        for node in two.nodes.values():
            begun = anyio.current_time()
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await node.config.put({"x": 2})
            assert anyio.current_time() - begun <= 2.0
            assert node.config.current.values == {"x": 1}
