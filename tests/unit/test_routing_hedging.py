"""A question that is asked twice because the first answer is late."""

from __future__ import annotations

import asyncio
import random

import pytest

from ollama_distributed.base.errors import Invalid, OllamaDistributedError, QueueFull, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.hedging import LEAST, SHARE, SHORTEST_S, Hedges, first_answer, kind_of
from ollama_distributed.testing.virtual_time import VirtualLoop

A, B, C = map(NodeId, "abc")


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


def test_it_is_the_95th_percentile_of_what_such_questions_took() -> None:
    hedges = Hedges()
    for number in range(LEAST - 1):
        hedges.ended("k", 1.0 + number)
    assert hedges.begin("k") is None, "of so few a percentile says little"
    hedges.ended("k", float(LEAST))
    assert hedges.begin("k") == LEAST, "1.5 times the median is less"
    assert hedges.begin("other") is None
    for _ in range(500):
        hedges.ended("k", 0.0)
    assert hedges.begin("k") == SHORTEST_S
    for _ in range(500):
        hedges.ended("k", 2.0)
    assert hedges.begin("k") == 3.0, "where all take alike nothing is late"


def test_questions_of_about_the_same_size_are_compared() -> None:
    assert kind_of("m", 1000) == kind_of("m", 600) != kind_of("m", 60)


@pytest.mark.parametrize("seed", range(5))
def test_no_more_than_a_twentieth_is_asked_twice(seed: int) -> None:
    hedges, chance = Hedges(), random.Random(seed)
    for asked in range(1, 3000):
        hedges.begin("k")
        if chance.random() < 0.5:
            hedges.take()
        assert hedges.asked <= SHARE * asked
    assert hedges.asked > SHARE * 2800


def test_who_loses_again_and_again_is_told() -> None:
    hedges = Hedges()
    assert not hedges.lost(A, "m")
    hedges.answered(A, "m")
    assert not hedges.lost(A, "m")
    assert not hedges.lost(B, "m")
    assert hedges.lost(A, "m")
    assert not hedges.lost(A, "m"), "counted anew"


class Nodes:
    """`takes`: seconds, or an error."""

    def __init__(self, **takes: float | OllamaDistributedError) -> None:
        self.takes = takes
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.noted: list[tuple[str, bool]] = []
        self.lost: list[str] = []

    async def ask(self, node: NodeId) -> str:
        self.asked.append(node)
        takes = self.takes[node]
        if isinstance(takes, OllamaDistributedError):
            raise takes
        try:
            await asyncio.sleep(takes)
        except asyncio.CancelledError:
            self.cancelled.append(node)
            raise
        return f"of {node}"

    def note(self, node: NodeId, error: OllamaDistributedError | None) -> None:
        self.noted.append((node, error is None))

    async def first(self, *order: NodeId, second: NodeId | None = B, may: bool = True) -> tuple[NodeId, str]:
        return await first_answer(
            order, self.ask, self.note, after_s=1.0, second=second, may=lambda: may, lost=self.lost.append
        )


@pytest.mark.anyio
async def test_who_is_quick_is_asked_alone() -> None:
    nodes = Nodes(a=0.9, b=0.0)
    assert await nodes.first(A, B) == (A, "of a")
    assert nodes.asked == ["a"]


@pytest.mark.anyio
async def test_the_second_one_wins_and_the_first_is_cancelled() -> None:
    nodes = Nodes(a=60.0, b=0.5)
    began = asyncio.get_running_loop().time()
    assert await nodes.first(A, B) == (B, "of b")
    assert asyncio.get_running_loop().time() - began == pytest.approx(1.5, abs=0.01)
    assert nodes.cancelled == ["a"]
    assert (nodes.noted, nodes.lost) == ([("b", True)], ["a"])


@pytest.mark.anyio
async def test_the_first_one_may_still_win() -> None:
    nodes = Nodes(a=1.2, b=60.0)
    assert await nodes.first(A, B) == (A, "of a")
    assert (nodes.asked, nodes.cancelled, nodes.lost) == (["a", "b"], ["b"], [])


@pytest.mark.anyio
async def test_nobody_is_asked_twice_beyond_the_budget_or_where_no_second_one_is_well() -> None:
    for may, second in ((False, B), (True, None)):
        nodes = Nodes(a=5.0, b=0.0)
        assert (await nodes.first(A, B, may=may, second=second))[0] == A
        assert nodes.asked == ["a"]


@pytest.mark.anyio
async def test_a_second_one_that_fails_leaves_the_first_and_a_third_is_asked_when_both_failed() -> None:
    nodes = Nodes(a=3.0, b=Unavailable("away"), c=0.0)
    assert (await nodes.first(A, B, C))[0] == A
    assert nodes.noted == [("b", False), ("a", True)]
    nodes = Nodes(a=QueueFull("full", retry_after_s=1.0), b=Unavailable("away"), c=0.0)
    assert (await nodes.first(A, B, C))[0] == C
    assert nodes.asked == ["a", "b", "c"]


@pytest.mark.anyio
async def test_all_refuse_or_the_question_is_wrong() -> None:
    with pytest.raises(QueueFull):
        await Nodes(a=Unavailable("away"), b=QueueFull("full", retry_after_s=1.0)).first(A, B)
    nodes = Nodes(a=Invalid("no"), b=0.0)
    with pytest.raises(Invalid):
        await nodes.first(A, B)
    assert nodes.asked == ["a"]


@pytest.mark.anyio
async def test_who_goes_away_cancels_both() -> None:
    nodes = Nodes(a=60.0, b=60.0)
    asking = asyncio.create_task(nodes.first(A, B))
    await asyncio.sleep(2.0)
    asking.cancel()
    await asyncio.wait([asking])
    assert sorted(nodes.cancelled) == ["a", "b"]
