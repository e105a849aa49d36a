"""Nodes that are neither well nor dead: one that drains under its answers, one that has become slow,
one whose vectors are late. In virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.failing_replicas import Heard
from tests.simulation.test_failover import BOUND, once, replicas, whole

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import EmbedRequest, EmbedResult, Finished, Opened
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.hedging import LEAST
from ollama_distributed.testing.virtual_time import VirtualLoop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


pytestmark = pytest.mark.anyio


async def test_a_node_that_drains_lets_its_own_clients_answers_go_on_elsewhere() -> None:
    async with replicas(2) as made:
        moved: list[int] = []

        def drain() -> None:
            made.drain("a")
            moved.append(made.answers["a"].move(("", "a")))

        heard = made.ask("a", on_word=once(30, drain))
        end = whole(heard, await heard.end())
        assert (moved, end.moves, heard.moved) == ([1], 1, ["B"])
        assert not made["a"].serving.loaded()[0].slots_busy


async def test_one_that_waits_for_its_first_word_goes_too() -> None:
    async with replicas(2, slots=1) as made:
        first, second = made.ask("a"), made.ask("a", text="number 2")
        await asyncio.sleep(0.1)
        made.drain("a")
        assert made.answers["a"].move(("", "a")) >= 1
        for heard in (first, second):
            whole(heard, await heard.end())


async def test_with_nowhere_to_go_it_ends_where_it_is() -> None:
    async with replicas(2) as made:
        made.drain("a")
        made.drain("b")
        heard = made.ask("a")
        await asyncio.sleep(0.5)
        assert made.answers["a"].move(("", "a")) == 0
        assert whole(heard, await heard.end()).moves == 0


@pytest.mark.parametrize("bound", BOUND)
async def test_what_cannot_be_continued_ends_where_it_is(bound: str) -> None:
    async with replicas(2) as made:
        heard = made.ask("a", **BOUND[bound])
        await asyncio.sleep(0.5)
        made.drain("a")
        assert made.answers["a"].move(("", "a")) == 0
        assert isinstance(await heard.end(), Finished)


# ── slow ────────────────────────────────────────────────────────────────────────────


async def asked(made: Any, times: int) -> dict[str, int]:
    """Who answered how many of so many questions, eight at a time."""
    by = dict.fromkeys("ab", 0)
    for turn in range(0, times, 8):
        batch = [made.ask(text=f"{turn} {number}") for number in range(8)]
        for heard in batch:
            assert isinstance(await heard.end(), Finished)
            by[_node(heard)] += 1
    return by


def _node(heard: Heard) -> str:
    opened = next(event for event in heard.events if isinstance(event, Opened))
    return opened.node.lower()


async def test_a_replica_that_became_ten_times_slower_gets_hardly_anything_and_comes_back() -> None:
    async with replicas(2, slots=8) as made:
        before = await asked(made, 96)
        assert min(before.values()) >= 20
        made["a"].speed(5.0)
        await asked(made, 24)
        slow = await asked(made, 96)
        assert slow["a"] <= 96 // 4, "but for tries whether it is well again"
        made["a"].speed(50.0)
        await asyncio.sleep(60.0)
        await asked(made, 24)
        assert min((await asked(made, 96)).values()) >= 20


async def test_an_answer_that_says_a_word_in_ten_seconds_is_left_at_once() -> None:
    async with replicas(2) as made:
        for turn in range(8):
            heard = made.ask(text=f"number {turn}")
            whole(heard, await heard.end())
        slow: list[Any] = []

        def grey() -> None:
            slow.append(made.speaking())
            slow[0].speed(0.1)

        heard = made.ask(on_word=once(20, grey))
        assert whole(heard, await heard.end()).moves == 1
        assert heard.gap_s <= 3.0
        assert (await served_by(made, 20)).count(slow[0].id) <= 5, "a probe of one word passes at times"


async def served_by(made: Any, times: int) -> list[str]:
    found = []
    for turn in range(times):
        heard = made.ask(text=f"number {turn}")
        assert isinstance(await heard.end(), Finished)
        found.append(_node(heard))
    return found


# ── vectors ─────────────────────────────────────────────────────────────────────────


async def test_late_vectors_are_asked_for_twice_and_rarely() -> None:
    async with replicas(2) as made:
        takes = {"a": 0.05, "b": 0.05}
        counts = {"a": 0, "b": 0}
        cancelled: list[str] = []
        plain = made.embed

        async def embed(node: NodeId, request: EmbedRequest) -> EmbedResult:
            counts[node] += 1
            try:
                await asyncio.sleep(takes[node])
            except asyncio.CancelledError:
                cancelled.append(node)
                raise
            return await plain(node, request)

        made.embed = embed  # type: ignore[method-assign]
        warm = Load(models=(ModelLoad(name=name_key(made.model.name), slots=4),))
        made.loads = {NodeId(name): warm for name in "ab"}

        async def ask() -> float:
            request = EmbedRequest(
                request_id=RequestId("e"), identity=Identity("local"), model="m", inputs=("some words",)
            )
            began = asyncio.get_running_loop().time()
            await made.routers["g"].embed(request)
            return asyncio.get_running_loop().time() - began

        for _ in range(5 * LEAST):
            assert await ask() < 0.06
        assert sum(counts.values()) == 5 * LEAST
        takes["a"] = 60.0
        late = [await ask() for _ in range(4)]
        assert max(late) < 0.2
        assert set(cancelled) == {"a"}
        assert len(cancelled) == 2, "then it is left alone"
