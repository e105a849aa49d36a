"""What placement keeps in memory, and how fast answers are: on the echo engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import ModelNotFound, NoCapacity
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.base.tokens import Done, EngineFailed
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import LoadPlan
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.serving.speeds import MOST, Speeds
from ollama_distributed.testing.echo import EchoEngine, echo_model

MIB = 1 << 20


class Machine:
    def cores(self) -> int:
        return 2

    def memory_available_bytes(self) -> int:
        return 1000 * MIB


class Names:
    """A catalogue: `same` names the same files as `a`."""

    async def resolve(self, name: str) -> ModelSpec:
        if name_key(name) == name_key("nobody"):
            raise ModelNotFound("model 'nobody' not found")
        return echo_model("a" if name_key(name) == name_key("same") else name.split("/")[-1].split(":")[0])

    def known(self, name: str) -> ModelSpec | None:
        return None


def hundred_mib(_spec: ModelSpec, _plan: LoadPlan) -> int:
    return 100 * MIB


@asynccontextmanager
async def serving(**settings: object) -> AsyncIterator[Serving]:
    engine = EchoEngine()
    room: dict[str, object] = {"memory_limit_bytes": 250 * MIB, **settings}
    made = Serving(
        Names(),
        [engine],
        Machine(),
        SystemClock(),
        ServingSettings(**room),  # type: ignore[arg-type]
        estimate=hundred_mib,
    )
    try:
        yield made
    finally:
        await made.close(0.0)


async def soon(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def answer(there: Serving, model: str, keep_alive_s: float | None = None) -> None:
    request = InferenceRequest(
        request_id=RequestId("r"),
        identity=Identity("admin", KeyId("k"), "team"),
        model=model,
        prompt=TextPrompt(text="one two three four five six seven eight nine ten", raw=True),
        keep_alive_s=keep_alive_s,
    )
    ended = asyncio.Event()

    def hear(event: object) -> None:
        assert not isinstance(event, EngineFailed), event
        if isinstance(event, Done):
            ended.set()

    there.start(request, hear)
    async with asyncio.timeout(30):
        await ended.wait()


def names(there: Serving) -> list[str]:
    return sorted(row.name for row in there.loaded())


async def test_what_is_kept_outlives_every_keep_alive_until_it_is_let_go() -> None:
    async with serving(keep_alive_s=0.0) as there:
        await there.hold("a")
        await there.hold("a")
        await answer(there, "a", keep_alive_s=0.0)
        await answer(there, "b")
        await soon(lambda: names(there) == ["a"])
        (row,) = there.loaded()
        assert row.expires_at is None
        assert row.held == (name_key("a"),)
        await there.let_go("a")
        assert names(there) == []
        await there.let_go("a")


async def test_a_stop_ends_it_at_once() -> None:
    async with serving() as there:
        await there.hold("a")
        await there.unload("a")
        assert names(there) == []
        await answer(there, "a")
        assert there.loaded()[0].held == ()


async def test_nothing_goes_for_it_and_it_goes_last() -> None:
    async with serving() as there:
        await there.hold("a")
        await answer(there, "b")
        with pytest.raises(NoCapacity, match="no room beside"):
            await there.hold("c")
        assert names(there) == ["a", "b"]
        await answer(there, "a")
        await answer(there, "c")  # b was used before a, but a is kept
        assert names(there) == ["a", "c"]


async def test_a_hold_that_only_counts_again_is_given_back() -> None:
    async with serving(keep_alive_s=0.0) as there:
        await there.hold("a")
        there.release("a")
        await soon(lambda: not there.loaded())
        with pytest.raises(ModelNotFound):
            await there.hold("nobody")


async def test_the_speed_is_of_answers_that_were_alone() -> None:
    async with serving() as there:
        await answer(there, "a")
        (speed,) = there.speeds.rows() or [None]
        (row,) = there.loaded()
        if speed is not None:  # the echo model says the size of its weights
            assert speed.tokens_per_s == row.tokens_per_s > 0


def test_speeds_follow_slowly_and_are_few() -> None:
    speeds = Speeds()
    speeds.add("cpu", 100, 20, 1.0)
    speeds.add("cpu", 100, 30, 1.0)
    assert speeds.of("cpu", 100) == 23.0
    speeds.add("cpu", 100, 3, 0.001)
    assert speeds.of("cpu", 100) == 23.0, "too short to tell"
    for size in range(1000, 1000 + MOST):
        speeds.add("gpu", size, 10, 1.0)
    assert speeds.of("cpu", 100) == 0.0
    assert len(speeds.rows()) == MOST


def test_the_speed_of_reading_is_of_prompts_that_were_read_alone() -> None:
    speeds = Speeds()
    speeds.add_read("cpu", 100, 20, 0.1, alone=True)
    assert speeds.reads("cpu", 100) == 0.0, "too short to tell"
    speeds.add_read("cpu", 100, 1000, 10.0, alone=False)
    assert speeds.reads("cpu", 100) == 100.0, "better than nothing"
    speeds.add_read("cpu", 100, 1000, 100.0, alone=False)
    assert speeds.reads("cpu", 100) == 100.0
    speeds.add_read("cpu", 100, 2000, 10.0, alone=True)
    assert speeds.reads("cpu", 100) == 130.0
    assert speeds.of("cpu", 100) == 0.0


async def test_what_a_model_has_to_do_here_and_another_life_after_each_load() -> None:
    async with serving() as there:
        assert there.work("a") is None
        lives = []
        for _ in range(2):
            await answer(there, "a")
            (row,) = there.loaded()
            work = there.work(row.spec.name.lower())
            assert work is not None
            assert (work.busy, work.queued) == (0, 0)
            assert work.slots == row.slots
            assert work.life == row.life
            lives.append(work.life)
            await there.unload("a")
            await soon(lambda: not there.loaded())
        assert lives[0] < lives[1]
