"""Serving and answers together, on the echo engine: what a dialect sees."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest
from tests.answering import Node, ask, chat
from tests.answering import node as node_on
from tests.limits import SOON_S

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import (
    ContextExceeded,
    Internal,
    Invalid,
    ModelNotFound,
    RunnerDied,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    Delta,
    EmbedRequest,
    Failed,
    JsonObject,
    LoadOptions,
    Message,
    Opened,
    RerankRequest,
    Sampling,
    TextPrompt,
    TokensPrompt,
    Tool,
)
from ollama_distributed.base.tokens import MOST_TOKENS, Resume, Tokens
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving import embeddings
from ollama_distributed.serving.jobs import Job
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.service import Serving
from ollama_distributed.testing import echo_text
from ollama_distributed.testing.echo import EchoEngine, EchoRunner, EchoSettings, echo_model


@asynccontextmanager
async def node(
    *models: ModelSpec, engine: EchoEngine | None = None, **settings: object
) -> AsyncIterator[EchoNode]:
    engine = engine or EchoEngine()
    async with node_on(engine, *(models or (echo_model("m"), echo_model("n"))), **settings) as there:
        yield EchoNode(engine, there.serving)
    assert engine.runners == []


class EchoNode(Node):
    engine: EchoEngine


async def test_a_chat_is_answered_and_counted() -> None:
    async with node() as n:
        listener, end = await n.finished(chat("hello world"))
        assert listener.text == "hello world"
        assert isinstance(listener.events[0], Opened)
        assert listener.events[0].prompt_tokens > 0
        assert end.reason == "stop"
        assert end.usage.completion_tokens == 4
        assert end.usage.prompt_tokens == listener.events[0].prompt_tokens
        assert end.usage.total_s >= end.usage.load_s > 0
        rows = n.serving.loaded()
        assert [(r.name, r.slots_busy, r.context_tokens) for r in rows] == [("m", 0, 4096)]
        left = rows[0].expires_at
        assert left is not None
        assert 290 < left - SystemClock.time() <= 300
        _, again = await n.finished(chat("hello world"))
        assert again.usage.load_s > 0  # Ollama, too, tells how long it took to find it loaded


async def test_a_stop_ends_it_early_and_the_slot_is_free() -> None:
    async with node(rules=Rules(slots=1)) as n:
        asked = chat("one STOP two", sampling=Sampling(stop=("STOP",)))
        for _ in range(3):
            listener, end = await n.finished(asked)
            assert (listener.text, end.stop_sequence) == ("one ", "STOP")
        assert n.engine.loads == 1


async def soon(condition: Callable[[], object]) -> None:
    with anyio.fail_after(SOON_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_runner_that_hangs_is_killed_and_its_request_begins_again_once() -> None:
    engine = EchoEngine({"tokens_per_s": 0.01})
    async with node(engine=engine, quiet_s=0.01) as n:
        listener, _ = n.ask(chat("hello"))
        for load in (1, 2):
            await soon(lambda load=load: engine.loads == load and n.serving.loaded())
            engine.runners[0].hangs = True
        end = await listener.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, RunnerDied)
        assert "did not answer" in end.error.message
        assert n.serving.loaded() == []


async def test_a_slow_runner_that_is_healthy_is_left_alone() -> None:
    engine = EchoEngine({"tokens_per_s": 0.01})
    async with node(engine=engine, quiet_s=0.001) as n:
        listener, generation = n.ask(chat("hello"))
        asked = 0

        async def healthy() -> bool:
            nonlocal asked
            asked += 1
            listener.changed.set()
            return True

        await soon(lambda: engine.runners)
        engine.runners[0].healthy = healthy  # type: ignore[method-assign]
        await listener.until(lambda: asked > 5)
        assert listener.text == ""
        assert engine.loads == 1
        generation.cancel()


async def test_tokens_are_a_sign_of_life() -> None:
    engine = EchoEngine({"tokens_per_s": 100, "hash_tokens": 30})
    async with node(engine=engine, quiet_s=0.05) as n:
        await n.finished(chat("load it", load_only=True))
        engine.runners[0].hangs = True
        listener, _ = await n.finished(chat("hello"))
        assert listener.text


async def test_large_batches_of_vectors_leave_the_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[bool] = set()
    finished = embeddings.finished_vector

    def noting(vector: Sequence[float], *, normalize: bool, dimensions: int | None) -> tuple[float, ...]:
        threads.add(threading.current_thread() is threading.main_thread())
        return finished(vector, normalize=normalize, dimensions=dimensions)

    monkeypatch.setattr(embeddings, "finished_vector", noting)
    for inputs, on_the_loop in ((1, True), (600, False)):
        threads.clear()
        async with node() as n:
            asked = EmbedRequest(
                request_id=RequestId("r"), identity=Identity("local"), model="m", inputs=("a",) * inputs
            )
            assert len((await n.answers.embed(asked)).vectors) == inputs
        assert threads == {on_the_loop}


async def test_reasoning_is_taken_apart_unless_asked_not_to() -> None:
    spec = msgspec.structs.replace(
        echo_model("m"),
        capabilities=frozenset({"completion", "thinking"}),
        thinking_tags=("<think>", "</think>"),
    )
    said = "<think>\nhm\n</think>\n\nyes"
    async with node(spec) as n:
        listener, end = await n.finished(chat(said))
        assert (listener.thinking, listener.text) == ("hm\n", "yes")
        assert 0 < end.usage.reasoning_tokens < end.usage.completion_tokens
        listener, _ = await n.finished(chat(said, think=False))
        assert (listener.thinking, listener.text) == ("", said)


def thinker() -> ModelSpec:
    return msgspec.structs.replace(
        echo_model("m"),
        capabilities=frozenset({"completion", "thinking"}),
        thinking_tags=("<think>", "</think>"),
    )


async def test_a_grammar_holds_after_the_reasoning() -> None:
    async with node(thinker(), rules=Rules(slots=1)) as n:
        said = "<think>\nhm, well\n</think>\n\nnot JSON"
        listener, end = await n.finished(chat(said, format=JsonObject()))
        assert listener.thinking == "hm, well\n"
        assert json.loads(listener.text) == {"echo": said}
        assert end.usage.reasoning_tokens > 0
        assert end.usage.completion_tokens > end.usage.reasoning_tokens
        assert end.usage.prompt_tokens == listener.events[0].prompt_tokens  # type: ignore[union-attr]
        _, end = await n.finished(chat(said, format=JsonObject(), sampling=Sampling(num_predict=3)))
        assert (end.reason, end.usage.completion_tokens) == ("length", 3)


async def test_a_grammar_holds_from_the_start_where_there_is_no_reasoning() -> None:
    async with node(thinker()) as n:
        for think in (None, False):
            listener, _ = await n.finished(chat("not JSON", format=JsonObject(), think=think))
            assert (listener.thinking, listener.text) == ("", '{"echo": "not JSON"}')


async def test_limits_of_length() -> None:
    async with node() as n:
        listener, end = await n.finished(chat("hello world", sampling=Sampling(num_predict=2)))
        assert (listener.text, end.reason) == ("hello ", "length")


async def test_a_chat_too_long_loses_its_oldest_messages() -> None:
    messages = (
        Message(role="system", content="S" * 30),
        Message(role="user", content="A" * 90),
        Message(role="assistant", content="B" * 90),
        Message(role="user", content="last"),
    )
    async with node() as n:
        options = LoadOptions(num_ctx=64)
        listener, end = await n.finished(chat(messages=messages, options=options))
        assert listener.text == "last"
        assert end.usage.prompt_tokens < 64
        error = await n.refused(chat(messages=messages, options=options, truncate=False))
        assert isinstance(error, ContextExceeded)
        listener, end = await n.finished(chat("C" * 300 + "end", options=options))
        assert listener.text.endswith("CCend")
        assert end.usage.prompt_tokens < 64
        error = await n.refused(chat("C" * 300, tools=(Tool(name="look"),), options=options))
        assert isinstance(error, ContextExceeded)
        assert "the last message" in str(error)


async def test_a_text_too_long_is_cut_in_the_middle() -> None:
    async with node() as n:
        raw = TextPrompt(text="a" * 30 + "b" * 600 + "c" * 30, raw=True)
        sampling = Sampling(num_keep=10)
        asked = ask(raw, options=LoadOptions(num_ctx=64), sampling=sampling)
        listener, end = await n.finished(asked)
        assert end.usage.prompt_tokens == 37
        assert listener.text.startswith("a" * 30 + "b")
        assert listener.text.endswith("c" * 30)
        error = await n.refused(msgspec.structs.replace(asked, truncate=False))
        assert isinstance(error, ContextExceeded)
        error = await n.refused(msgspec.structs.replace(asked, shift=False))
        assert isinstance(error, ContextExceeded)


async def test_context_carries_prompt_and_answer_and_comes_back() -> None:
    async with node() as n:
        _, first = await n.finished(ask(TextPrompt(text="hello"), want_context=True))
        said = echo_text.detokenize(first.context).decode()
        assert said == echo_text.render((Message(role="user", content="hello"),)) + "hello"
        again = TextPrompt(text="more", context=first.context)
        listener, second = await n.finished(ask(again, want_context=True))
        assert listener.text == "more"
        assert second.context[: len(first.context)] == first.context


async def test_token_prompts_and_raw_texts_go_as_they_are() -> None:
    async with node() as n:
        listener, _ = await n.finished(ask(TokensPrompt(ids=tuple(echo_text.tokenize("abc def")))))
        assert listener.text == "abc def"
        listener, _ = await n.finished(ask(TextPrompt(text="<|user|>", raw=True)))
        assert listener.text == "<|user|>"


async def test_tools_are_parsed_by_the_engine() -> None:
    async with node() as n:
        asked = chat('call look {"at": "sky"}', tools=(Tool(name="look"),))
        listener, end = await n.finished(asked)
        calls = [c for e in listener.events if isinstance(e, Delta) for c in e.tool_calls]
        assert calls
        assert calls[0].name == "look"
        assert end.reason == "tool_calls"
        none = msgspec.structs.replace(
            asked, prompt=msgspec.structs.replace(asked.prompt, tool_choice="none")
        )
        listener, end = await n.finished(none)
        assert listener.text == 'call look {"at": "sky"}'
        assert end.reason == "stop"


async def test_formats_and_logprobs_pass() -> None:
    async with node() as n:
        listener, _ = await n.finished(chat("x", format=JsonObject(), logprobs=True, top_logprobs=2))
        assert listener.text == '{"echo": "x"}'
        logprobs = [lp for e in listener.events if isinstance(e, Delta) for lp in e.logprobs]
        assert "".join(lp.token for lp in logprobs) == listener.text
        assert len(logprobs[0].top) == 2


async def test_load_render_and_unload() -> None:
    async with node() as n:
        _, end = await n.finished(chat(messages=(), load_only=True, keep_alive_s=-1.0))
        assert end.reason == "load"
        assert n.serving.loaded()[0].expires_at is None
        _, end = await n.finished(chat("hi", render_only=True))
        assert end.rendered == echo_text.render((Message(role="user", content="hi"),))
        assert await n.answers.count_tokens(chat("hi")) == len(echo_text.tokenize(end.rendered))
        _, end = await n.finished(chat(messages=(), load_only=True, keep_alive_s=0.0))
        assert end.reason == "unload"
        assert n.serving.loaded() == []
        assert n.engine.loads == 1


async def test_keep_alive_zero_unloads_after_the_request() -> None:
    async with node() as n:
        await n.finished(chat("hi", keep_alive_s=0.0))
        await n.serving.unload("m")
        assert n.engine.runners == []
        with pytest.raises(ModelNotFound):
            await n.serving.unload("nobody")


async def test_a_cancelled_answer_frees_its_slot_whenever_it_comes() -> None:
    async with node(engine=EchoEngine({"load_s": 0.02, "tokens_per_s": 50}), rules=Rules(slots=1)) as n:
        loading, generation = n.ask(chat("a" * 300))
        generation.cancel()
        listener, generation = n.ask(chat("b" * 300))
        queued, waiting = n.ask(chat("c" * 300))
        await listener.until(lambda: listener.text != "")
        assert n.serving.waiting == 1
        waiting.cancel()
        generation.cancel()
        seen = len(listener.events)
        other, _ = n.ask(chat("d", sampling=Sampling(num_predict=1)))
        await other.end()
        assert (loading.events, queued.events, len(listener.events)) == ([], [], seen)
        assert n.serving.loaded()[0].slots_busy == 0
        assert n.serving.waiting == 0


async def test_a_slow_reader_pauses_the_engine_even_before_it_began() -> None:
    async with node(engine=EchoEngine({"load_s": 0.005})) as n:
        listener, generation = n.ask(chat("hello world"))
        generation.pause()
        await n.finished(chat("other"))
        assert listener.text == ""
        generation.resume()
        await listener.end()
        assert listener.text == "hello world"


async def test_a_runner_that_dies_before_a_token_is_replaced_once() -> None:
    engine = EchoEngine(EchoSettings(fail_after_tokens=0, crashes=1))
    async with node(engine=engine) as n:
        listener, _ = await n.finished(chat("hello"))
        assert (listener.text, engine.loads) == ("hello", 2)


async def test_a_request_that_kills_each_runner_takes_two_at_most() -> None:
    engine = EchoEngine(EchoSettings(fail_after_tokens=0))
    async with node(engine=engine) as n:
        listener, _ = n.ask(chat("hello"))
        end = await listener.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, RunnerDied)
        assert engine.loads == 2


async def test_on_a_node_alone_an_answer_ends_with_its_runner() -> None:
    engine = EchoEngine(EchoSettings(fail_after_tokens=2, crashes=1))
    async with node(engine=engine) as n:
        listener, _ = n.ask(chat("hello world"))
        end = await listener.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, RunnerDied)
        assert (listener.text, engine.loads) == ("hello ", 1)
        again, _ = await n.finished(chat("hello world"))
        assert (again.text, engine.loads) == ("hello world", 2)


@pytest.fixture
def _a_peer_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Serving, "elsewhere", lambda *_: True)


@pytest.mark.usefixtures("_a_peer_has_the_model")
async def test_an_answer_lives_through_the_death_of_its_runner() -> None:
    engine = EchoEngine(EchoSettings(fail_after_tokens=2, crashes=1))
    async with node(engine=engine) as n:
        listener, end = await n.finished(chat("hello world"))
        assert (listener.text, engine.loads) == ("hello world", 2)
        assert (end.moves, end.usage.completion_tokens) == (1, 4)
        opened = listener.events[0]
        assert isinstance(opened, Opened)
        assert end.usage.prompt_tokens == opened.prompt_tokens


@pytest.mark.usefixtures("_a_peer_has_the_model")
async def test_an_answer_that_kills_two_runners_gets_no_third() -> None:
    engine = EchoEngine(EchoSettings(fail_after_tokens=1))
    async with node(engine=engine) as n:
        listener, _ = n.ask(chat("hello world"))
        end = await listener.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, RunnerDied)
        assert (listener.text, engine.loads) == ("hello ", 2)


async def test_an_answer_goes_on_from_another_runners_tokens() -> None:
    async with node() as n:
        heard: list[object] = []
        done = asyncio.Event()

        def hear(event: object) -> None:
            heard.append(event)
            if type(event).__name__ in ("Done", "EngineFailed"):
                done.set()

        asked = chat("hello world", sampling=Sampling(num_predict=3))
        resume = Resume(
            ids=tuple(echo_text.tokenize("hello ")),
            prompt_text=echo_text.render([Message(role="user", content="hello world")]),
            model_digest=echo_model("m").digest,
        )
        n.serving.start(asked, hear, resume)
        with anyio.fail_after(SOON_S):
            await done.wait()
        # Two tokens were emitted elsewhere, so one of three is left.
        assert "".join(e.text for e in heard if isinstance(e, Tokens)) == "wor"


async def test_a_model_without_a_usable_template_loads_and_answers_raw_prompts_only() -> None:
    spec = msgspec.structs.replace(echo_model("m"), template_problem="TEMPLATE is unknown")
    async with node(spec) as n:
        _, end = await n.finished(chat(messages=(), load_only=True))
        assert end.reason == "load"
        assert str(await n.refused(chat())) == "TEMPLATE is unknown"
        listener, _ = await n.finished(ask(TextPrompt(text="hi", raw=True)))
        assert listener.text == "hi"


async def test_refusals() -> None:
    async with node() as n:
        assert isinstance(await n.refused(chat(model="nobody")), ModelNotFound)
        assert isinstance(await n.refused(chat(think=True)), Unsupported)
        error = await n.refused(ask(TextPrompt(text="a", template="[INST]{{ .Prompt }}")))
        assert isinstance(error, Unsupported)
        assert n.engine.loads == 0


async def test_embeddings_are_normalised_and_cut() -> None:
    async with node() as n:
        asked = EmbedRequest(
            request_id=RequestId("r"), identity=Identity("local"), model="m", inputs=("a", "b" * 300)
        )
        result = await n.answers.embed(asked)
        assert [round(sum(x * x for x in v), 6) for v in result.vectors] == [1.0, 1.0]
        assert result.usage.prompt_tokens == 101
        short = await n.answers.embed(msgspec.structs.replace(asked, dimensions=8))
        assert [len(v) for v in short.vectors] == [8, 8]
        tight = msgspec.structs.replace(asked, options=LoadOptions(num_ctx=64), truncate=False)
        with pytest.raises(ContextExceeded, match=r"^the input length exceeds the context length$"):
            await n.answers.embed(tight)
        none = msgspec.structs.replace(asked, options=LoadOptions(num_ctx=0))
        with pytest.raises(Invalid, match=r"^input after truncation exceeds maximum context length$"):
            await n.answers.embed(none)
        empty = await n.answers.embed(msgspec.structs.replace(asked, inputs=()))
        assert empty.vectors == ()


@pytest.mark.parametrize(("said", "counted"), [(10**30, MOST_TOKENS), (-5, 0)])
async def test_tokens_that_an_engine_says_it_read_are_counted_within_reason(
    said: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def embed(*_: object) -> tuple[list[list[float]], int]:
        return [[1.0]], said

    monkeypatch.setattr(EchoRunner, "embed", embed)
    async with node() as n:
        asked = EmbedRequest(request_id=RequestId("r"), identity=Identity("local"), model="m", inputs=("a",))
        assert (await n.answers.embed(asked)).usage.prompt_tokens == counted


async def test_embeddings_survive_one_death_of_the_runner() -> None:
    async with node() as n:
        asked = EmbedRequest(
            request_id=RequestId("r"), identity=Identity("local"), model="m", inputs=("a", (16777313,))
        )
        await n.answers.embed(asked)
        deaths = 1

        async def die_once(*_: object) -> tuple[list[list[float]], int]:
            nonlocal deaths
            if deaths:
                deaths -= 1
                raise RunnerDied("gone")
            return [[3.0, 4.0]], 1

        for _ in range(2):
            n.engine.runners[0].embed = die_once  # type: ignore[method-assign]
            result = await n.answers.embed(asked)
        assert result.vectors == ((0.6, 0.8),)
        assert n.engine.loads == 2


async def test_rerank_orders() -> None:
    async with node() as n:
        asked = RerankRequest(
            request_id=RequestId("r"),
            identity=Identity("local"),
            model="m",
            query="red apple",
            documents=("blue sea", "red apple"),
        )
        result = await n.answers.rerank(asked)
        assert result.scores[1] > result.scores[0]


async def test_closing_drains_then_stops() -> None:
    async with node(engine=EchoEngine({"tokens_per_s": 20})) as n:
        listener, _ = n.ask(chat("a" * 3000))
        await listener.until(lambda: listener.text != "")
        await n.serving.close(drain_s=0.01)
        end = await listener.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, Unavailable)
        assert isinstance(await n.refused(chat()), Unavailable)


async def test_what_answered_leaves_nothing_to_the_collector() -> None:
    """It looks at what is old so seldom that a busy node would grow by what waits for it."""

    def jobs() -> int:
        return sum(isinstance(one, Job) for one in gc.get_objects())

    async with node(engine=EchoEngine({"tokens_per_s": 1000.0})) as n:
        await n.finished(chat("first"))
        gc.collect()
        gc.disable()
        try:
            of_others = jobs()  # that tests before this one still hold
            for _ in range(5):
                await n.finished(chat("hello there", sampling=Sampling(num_predict=2)))
            left = jobs()
        finally:
            gc.enable()
        assert left <= of_others


async def test_a_defect_before_anybody_waits_ends_the_answer_and_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("choices")

    async with node() as n:
        await n.finished(chat())
        asked = chat("hello", tools=(Tool(name="look"),))
        with monkeypatch.context() as patched:
            patched.setattr(EchoRunner, "chat", broken)
            assert isinstance(await n.refused(asked), Internal)
        assert [row.slots_busy for row in n.serving.loaded()] == [0]
        await n.finished(asked)
