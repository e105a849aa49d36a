"""Serving and answers on the real engine, with models whose answers are known."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from tests.answering import Node, ask, chat, node
from tests.integration.llamacpp_programs import program_named
from tests.models import CONCLUSION, EMOJI, HELLO, THOUGHT, WEATHER_CALL, Models, model_spec

from ollama_distributed.adapters.engines.call import Call
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.slots import LEAVING_S
from ollama_distributed.base.errors import LoadFailed, RunnerDied, Unsupported
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import (
    Delta,
    EmbedRequest,
    Failed,
    InferenceRequest,
    JsonSchema,
    LoadOptions,
    Sampling,
    TextPrompt,
    Tool,
)
from ollama_distributed.base.policies import Policy
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.ports import CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

CAPABLE = frozenset({"completion", "tools", "thinking"})


@asynccontextmanager
async def wheel(run: Path, cache_ram_mib: int | None = None) -> AsyncIterator[LlamaCppEngine]:
    """Closed whatever happens: a runner that a failed test left would fail another one."""
    copies = {} if cache_ram_mib is None else {"cache_ram_mib": cache_ram_mib}
    engine = LlamaCppEngine(await program_named("wheel"), runtime_dir=run, **copies)
    try:
        yield engine
    finally:
        await engine.close()
    await asyncio.to_thread(run.rmdir)  # nothing is left there


@pytest.fixture
async def there(models: Models, tmp_path: Path) -> AsyncIterator[Node]:
    specs = [
        model_spec(models.scripted(), display="hello"),
        model_spec(models.emoji(), display="emoji"),
        model_spec(models.endless(), display="endless"),
        model_spec(models.tools(), display="tools", capabilities=CAPABLE),
        model_spec(
            models.thinking(),
            display="thinking",
            capabilities=CAPABLE,
            thinking_tags=("<think>", "</think>"),
        ),
        model_spec(models.minilm(), display="minilm", pooling="mean", capabilities=frozenset({"embedding"})),
        model_spec(models.corrupt("header-cut"), display="broken"),
    ]
    rules = Rules(slots=1, context_tokens=512)
    async with (
        wheel(tmp_path / "run") as engine,
        node(engine, *specs, rules=rules, max_loaded_models=8) as there,
    ):
        yield there


async def test_a_chat(there: Node) -> None:
    listener, end = await there.finished(chat("Hi", model="hello"))
    assert listener.text == HELLO
    assert end.reason == "stop"
    assert end.usage.completion_tokens > 3
    assert end.usage.prompt_tokens > 3
    # The same again finds the prompt in the cache.
    _, again = await there.finished(chat("Hi", model="hello"))
    assert again.usage.cached_tokens > 0
    assert again.usage.load_s < end.usage.load_s


async def test_a_prompt_finds_the_slot_that_read_its_beginning(models: Models, tmp_path: Path) -> None:
    """Whichever slot that is, and also once another prompt has taken the slot."""
    spec = model_spec(models.scripted(), display="hello")
    letters = random.Random(1)
    texts = ["".join(letters.choice("abcdefgh ") for _ in range(300)) for _ in range(4)]
    rules = Rules(slots=2, context_tokens=512)
    async with wheel(tmp_path / "run") as engine, node(engine, spec, rules=rules) as there:
        for turn in range(2):
            for text in texts:
                _, end = await there.finished(
                    ask(
                        TextPrompt(text=f"{text} {turn}", raw=True),
                        model="hello",
                        sampling=Sampling(num_predict=1),
                    )
                )
                share = end.usage.cached_tokens / end.usage.prompt_tokens
                assert share < 0.1 if turn == 0 else share > 0.9, (turn, end.usage)
                assert end.usage.wait_s <= end.usage.load_s


@pytest.mark.parametrize("copies_mib", [0, 512])
async def test_no_tenant_finds_what_another_s_prompt_left(
    models: Models, tmp_path: Path, copies_mib: int
) -> None:
    """S-16: `cached_tokens` is 0 across teams, whatever was asked before; inside a team, or a group
    that policies name, it is not, unless the runner keeps copies that all share."""
    spec = model_spec(models.scripted(), display="hello")
    letters = random.Random(1)
    texts = ["".join(letters.choice("abcdefgh ") for _ in range(300)) for _ in range(3)]
    rules = Rules(slots=2, context_tokens=512)
    async with wheel(tmp_path / "run", copies_mib) as engine, node(engine, spec, rules=rules) as there:

        def asks(team: str, text: str, group: str) -> InferenceRequest:
            prompt = ask(TextPrompt(text=text, raw=True), model="hello", sampling=Sampling(num_predict=1))
            identity = Identity("user", KeyId(team), team, policy=Policy(name="p", cache_group=group))
            return msgspec.structs.replace(prompt, identity=identity)

        async def cached(team: str, text: str, group: str = "") -> int:
            _, end = await there.finished(asks(team, text, group))
            return end.usage.cached_tokens

        for text in texts:
            await cached("red", text)
        own = {"red"}
        for team, number in (("blue", 0), ("blue", 1), ("red", 0), ("red", 1), ("green", 1), ("blue", 2)):
            count = await cached(team, texts[number])
            # A text of one's own begins as every text does.
            assert count == 0 if team not in own else count < 10 or team == "red", (team, number)
            own.add(team)
        await cached("green", texts[2])
        again = await cached("green", texts[2])
        assert again == 0 if copies_mib else again > 200
        assert await cached("red", texts[1], "shop") == 0, "a group finds nothing of its teams' own"
        shared = await cached("blue", texts[1], "shop")
        assert shared == 0 if copies_mib else shared > 200


async def test_who_gives_up_at_once_does_not_read_what_the_slot_keeps(models: Models, tmp_path: Path) -> None:
    plan = LoadPlan(slots=1, context_tokens=512, threads=1)
    async with wheel(tmp_path / "run", 0) as engine:
        runner = await engine.load(model_spec(models.scripted()), plan)

        def ask_as(tenant: str) -> tuple[Recording, Call]:
            request = CompletionRequest(prompt="abc " * 80, sampling=Sampling(num_predict=1), tenant=tenant)
            return (heard := Recording()), runner.generate(request, heard)

        assert (await ask_as("red")[0].done()).cached_tokens == 0
        for _ in range(3):
            ask_as("blue")[1].cancel()
        assert (await ask_as("blue")[0].done()).cached_tokens == 0
        # Those that gave up may come late; once that is over, its own prompt it finds.
        await asyncio.sleep(LEAVING_S)
        counts = [(await ask_as("blue")[0].done()).cached_tokens for _ in range(2)]
        assert counts[0] == 0
        assert counts[1] > 200


async def test_characters_in_parts_and_a_stop_across_tokens(there: Node) -> None:
    listener, _ = await there.finished(chat(model="emoji"))
    assert listener.text == EMOJI
    stop = EMOJI[9:12]
    listener, end = await there.finished(chat(model="emoji", sampling=Sampling(stop=(stop,))))
    assert (listener.text, end.stop_sequence) == (EMOJI.partition(stop)[0], stop)


async def test_context_goes_out_and_comes_back(there: Node) -> None:
    _, first = await there.finished(ask(TextPrompt(text="a"), model="hello", want_context=True))
    # llama.cpp counts the end of the answer, but does not send it.
    assert len(first.context) == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    more = TextPrompt(text="b", context=first.context)
    _, second = await there.finished(ask(more, model="hello", want_context=True))
    assert second.context[: len(first.context)] == first.context


async def test_reasoning_and_tools(there: Node) -> None:
    listener, _ = await there.finished(chat(model="thinking"))
    assert (listener.thinking.strip(), listener.text) == (THOUGHT, CONCLUSION)
    tool = Tool(
        name="get_weather",
        parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    )
    listener, end = await there.finished(
        chat(model="tools", tools=(tool,), options=LoadOptions(num_ctx=4096))
    )
    names = {c.name for e in listener.events if isinstance(e, Delta) for c in e.tool_calls if c.name}
    assert names == {WEATHER_CALL["name"]}
    assert end.reason == "tool_calls"


async def test_a_grammar_holds_after_the_reasoning(there: Node) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"const": 42}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    asked = chat(model="thinking", format=JsonSchema(schema), options=LoadOptions(num_ctx=4096))
    for _ in range(2):
        listener, end = await there.finished(asked)
        assert listener.thinking.strip() == THOUGHT
        assert json.loads(listener.text) == {"answer": 42}
        assert end.reason == "stop"
        assert 0 < end.usage.reasoning_tokens < end.usage.completion_tokens
    # Told not to reason, the grammar holds from the first token.
    listener, _ = await there.finished(msgspec.structs.replace(asked, think=False))
    assert (listener.thinking, json.loads(listener.text)) == ("", {"answer": 42})
    assert [row.slots_busy for row in there.serving.loaded()] == [0]


async def test_a_prompt_longer_than_the_context_is_cut(there: Node) -> None:
    raw = TextPrompt(text="and so on " * 400, raw=True)
    _, end = await there.finished(ask(raw, model="hello", sampling=Sampling(num_predict=4)))
    assert 128 < end.usage.prompt_tokens < 512


async def test_a_client_that_goes_away_frees_the_slot(there: Node) -> None:
    listener, generation = there.ask(chat(model="endless"))
    await listener.until(lambda: len(listener.text) > 100)
    generation.cancel()
    # There is one slot, and what was cancelled would never end.
    limit = Sampling(num_predict=1)
    _, end = await there.finished(chat(model="endless", sampling=limit))
    assert end.reason == "length"


async def test_a_killed_runner_is_an_error_and_the_next_request_loads_again(there: Node) -> None:
    listener, _ = there.ask(chat(model="endless"))
    await listener.until(lambda: len(listener.text) > 100)
    lease = await there.serving.acquire(*await _load_of(there, "endless"), None, slot=False)
    runner = lease.runner
    assert isinstance(runner, LlamaCppRunner)
    os.kill(runner.process.pid, signal.SIGKILL)
    end = await listener.end()
    lease.release()
    assert isinstance(end, Failed)
    assert isinstance(end.error, RunnerDied)
    _, again = await there.finished(chat(model="endless", sampling=Sampling(num_predict=3)))
    assert again.usage.completion_tokens == 3


async def test_a_runner_that_hangs_is_an_error_and_the_next_request_loads_again(there: Node) -> None:
    listener, _ = there.ask(chat(model="endless"))
    await listener.until(lambda: len(listener.text) > 100)
    lease = await there.serving.acquire(*await _load_of(there, "endless"), None, slot=False)
    runner = lease.runner
    assert isinstance(runner, LlamaCppRunner)
    os.kill(runner.process.pid, signal.SIGSTOP)
    end = await listener.end()
    lease.release()
    assert isinstance(end, Failed)
    assert isinstance(end.error, RunnerDied)
    assert end.error.retryable
    _, again = await there.finished(chat(model="endless", sampling=Sampling(num_predict=3)))
    assert again.usage.completion_tokens == 3
    assert runner.process.exited.done()


async def _load_of(there: Node, name: str) -> tuple[object, object]:
    spec, _, shape = await there.serving.requests.find(chat(model=name))
    return spec, shape


async def test_a_broken_file_is_refused_with_a_reason(there: Node) -> None:
    error = await there.refused(chat(model="broken"))
    assert isinstance(error, LoadFailed)
    assert "broken" in str(error)


async def test_embeddings(there: Node) -> None:
    asked = EmbedRequest(
        request_id=RequestId("r"),
        identity=Identity("local"),
        model="minilm",
        inputs=("the cat sat on the mat", "a kitten rests on a rug", "stock markets fell", "word " * 900),
        options=LoadOptions(num_ctx=256),
    )
    result = await there.answers.embed(asked)
    cat, kitten, stocks, long = result.vectors

    def likeness(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert likeness(cat, cat) == pytest.approx(1.0)
    assert likeness(long, long) == pytest.approx(1.0)
    assert likeness(cat, kitten) > likeness(cat, stocks)
    assert 256 < result.usage.prompt_tokens < 300


async def test_a_model_that_does_not_embed_is_refused_without_a_name(there: Node) -> None:
    """Its runner may have been loaded under another name, which is nobody else's business."""
    asked = EmbedRequest(request_id=RequestId("r"), identity=Identity("local"), model="hello", inputs=("a",))
    with pytest.raises(Unsupported, match=r"^this model does not support embeddings$"):
        await there.answers.embed(asked)
