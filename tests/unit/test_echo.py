"""The echo engine's failures and speeds are what its settings say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ollama_distributed.base.errors import ContextExceeded, Invalid, LoadFailed, RunnerDied
from ollama_distributed.base.inference import Message, Sampling
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan
from ollama_distributed.testing.echo import EchoEngine, EchoRunner, echo_model
from ollama_distributed.testing.recording import Recording

pytestmark = pytest.mark.anyio
PLAN = LoadPlan(slots=1, context_tokens=2048, threads=1)


async def loaded(**settings: Any) -> EchoRunner:
    return await EchoEngine(settings).load(echo_model(), PLAN)


async def ask(runner: EchoRunner, prompt: str = "x" * 90, **sampling: Any) -> Recording:
    recording = Recording()
    runner.generate(CompletionRequest(prompt=prompt, sampling=Sampling(**sampling)), recording)
    await recording.end()
    return recording


async def test_load_takes_its_time() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await loaded(load_s=0.05)
    assert loop.time() - began >= 0.05


async def test_speed() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert len((await ask(await loaded(tokens_per_s=200))).ids) == 30
    assert loop.time() - began >= 0.15


async def test_it_dies_after_so_many_tokens() -> None:
    runner = await loaded(fail_after_tokens=5)
    deaths: list[object] = []
    runner.on_exit(deaths.append)
    recording = await ask(runner)
    assert isinstance((await recording.failed()).error, RunnerDied)
    assert len(recording.ids) == 5
    assert len(deaths) == 1
    assert len((await ask(await loaded(fail_after_tokens=5), num_predict=5)).ids) == 5


async def test_it_fails_to_load() -> None:
    with pytest.raises(LoadFailed):
        await loaded(crash_on_load=True)


async def test_it_crashes_so_often_and_then_works() -> None:
    engine = EchoEngine({"crash_on_load": True, "crashes": 2})
    for _ in range(2):
        with pytest.raises(LoadFailed):
            await engine.load(echo_model(), PLAN)
    await (await ask(await engine.load(echo_model(), PLAN))).done()
    assert engine.loads == 3
    dying = EchoEngine({"fail_after_tokens": 1, "crashes": 1})
    await (await ask(await dying.load(echo_model(), PLAN))).failed()
    assert dying.runners == []
    await (await ask(await dying.load(echo_model(), PLAN))).done()
    assert len(dying.runners) == 1


async def test_a_death_ends_those_that_wait_too() -> None:
    runner = await loaded(tokens_per_s=10)
    recordings = [Recording() for _ in range(3)]
    for recording in recordings:
        runner.generate(CompletionRequest(prompt="x" * 90), recording)
    assert (await runner.metrics()).queued == 2
    runner.kill()
    for recording in recordings:
        assert isinstance((await recording.failed()).error, RunnerDied)
    assert isinstance((await (await ask(runner)).failed()).error, RunnerDied)


async def test_the_context_ends_an_answer_that_may_not_shift() -> None:
    runner = await EchoEngine({"hash_tokens": 100}).load(
        echo_model(), LoadPlan(slots=1, context_tokens=40, threads=1)
    )
    recording = Recording()
    runner.generate(CompletionRequest(prompt="x" * 30, shift=False), recording)
    assert (await recording.done()).reason == "length"
    assert len(recording.ids) == 30
    error = (await (await ask(runner, "x" * 120)).failed()).error
    assert isinstance(error, ContextExceeded)
    assert (error.prompt_tokens, error.context_tokens) == (40, 40)


async def test_fixed_answers() -> None:
    assert (await ask(await loaded(answer="Always this."))).text == "Always this."
    recording = Recording()
    (await loaded(answer="Always this.")).chat(
        ChatRequest(messages=(Message(role="user", content="?"),), tools=()), recording
    )
    assert (await recording.done()).reason == "stop"
    assert recording.text == "Always this."


async def test_num_predict_zero_answers_nothing() -> None:
    recording = await ask(await loaded(), num_predict=0)
    assert (await recording.done()).reason == "length"
    assert recording.ids == []


async def test_foreign_ids_are_refused() -> None:
    recording = Recording()
    (await loaded()).generate(CompletionRequest(prompt=(1, 2, 3)), recording)
    assert isinstance((await recording.failed()).error, Invalid)


@pytest.mark.parametrize("settings", [{"tokens": 1}, {"load_s": "soon"}])
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="echo"):
        EchoEngine(settings)
