"""Remote engines against small servers: what they are, when they go, vLLM's own routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.limits import SOON_S
from tests.ollama_double import OllamaDouble

from ollama_distributed.adapters.engines.remote import OllamaEngine, OpenAIEngine, openai
from ollama_distributed.base.errors import (
    EngineError,
    Internal,
    LoadFailed,
    RunnerDied,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import Message, Tool
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = pytest.mark.anyio
PLAN = LoadPlan(slots=2, context_tokens=2048, threads=1)
Answers = dict[str, Any]


@asynccontextmanager
async def server(answers: Callable[[str, Any], Any]) -> AsyncIterator[str]:
    """A server whose JSON (or text) answers come from (path, body); None: 404."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next((int(h[15:]) for h in head if h.lower().startswith("content-length:")), 0)
        body = json.loads(await reader.readexactly(length) or b"null")
        answer = answers(head[0].split(" ")[1], body)
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        status = "404 Not Found" if answer is None else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        await listening.wait_closed()


def vllm(path: str, body: Any) -> Any:
    match path:
        case "/v1/models":
            return {"data": [{"id": "org/Model-7B", "owned_by": "vllm", "created": 7, "max_model_len": 4096}]}
        case "/tokenize" if "messages" in body:
            return {"tokens": [1, 5, 6], "count": 3, "max_model_len": 4096}
        case "/tokenize":
            return {"tokens": [1] * body["add_special_tokens"] + [ord(c) for c in body["prompt"]]}
        case "/detokenize":
            return {"prompt": " ".join(map(str, body["tokens"]))}
        case "/health":
            return ""
        case "/metrics":
            return (
                "vllm:num_requests_running 3.0\nvllm:num_requests_waiting 2.0\nvllm:kv_cache_usage_perc 0.5\n"
            )
        case "/v1/completions":
            chunk = {"choices": [{"text": "Hi", "token_ids": [9], "finish_reason": "stop"}]}
            usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}
            return f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"
        case "/v1/rerank":
            rows = [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
            return {"results": rows, "usage": {"total_tokens": 8}}
    return None


async def test_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "METRICS_S", SOON_S)
    async with server(vllm) as url:
        engine = OpenAIEngine({"name": "vllm", "url": f"{url}/v1"})
        (model,) = await engine.models()
        assert (model.display, model.architecture.context_tokens) == ("org/Model-7B:latest", 4096)
        assert engine.info.version == "vllm"
        runner = await engine.load(model, PLAN)
        assert await runner.healthy()
        recording = Recording()
        runner.generate(CompletionRequest(prompt="x"), recording)
        assert (await recording.done()).prompt_tokens == 2
        assert (recording.text, recording.ids) == ("Hi", [9])
        # The token that begins every text is left out: it is added again to the prompt.
        assert await runner.apply_template([Message(role="user", content="x")]) == "5 6"
        assert await runner.template_ids([Message(role="user", content="x")]) == (1, 5, 6)
        assert await runner.tokenize("ab", add_special=False) == [97, 98]
        assert await runner.rerank("q", ["a", "b"]) == ([0.1, 0.9], 8)
        metrics = await runner.metrics()
        assert (metrics.slots_busy, metrics.queued, metrics.kv_used) == (3, 2, 0.5)
        await engine.close()


async def test_a_plain_server_refuses_what_it_lacks() -> None:
    def plain(path: str, _: Any) -> Any:
        return {"data": [{"id": "text-embed", "owned_by": "someone"}]} if path == "/v1/models" else None

    async with server(plain) as url:
        engine = OpenAIEngine({"name": "x", "url": url})
        (model,) = await engine.models()
        assert model.capabilities == {"embedding"}
        runner = await engine.load(model, PLAN)
        assert await runner.healthy()
        for question in (
            runner.tokenize("x"),
            runner.detokenize([1]),
            runner.rerank("q", ["d"]),
            runner.apply_template([]),
        ):
            with pytest.raises(Unsupported):
                await question
        await engine.close()


async def test_a_server_that_is_away() -> None:
    engine = OpenAIEngine({"name": "x", "url": "http://127.0.0.1:9"})
    with pytest.raises(Unavailable):
        await engine.models()
    ollama = OllamaEngine({"name": "x", "url": "http://127.0.0.1:9"})
    with pytest.raises(Unavailable):
        await ollama.models()


async def test_a_model_that_is_served_no_more() -> None:
    listed = ["a"]

    def changing(path: str, _: Any) -> Any:
        return {"data": [{"id": name} for name in listed]} if path == "/v1/models" else None

    async with server(changing) as url:
        engine = OpenAIEngine({"name": "x", "url": url})
        (model,) = await engine.models()
        listed[:] = ["b"]
        with pytest.raises(LoadFailed, match="any more"):
            await engine.load(model, PLAN)


@pytest.mark.parametrize(
    "tags", [{"models": [1]}, {"models": {"a": 1}}, {"models": [{"size": 1}]}, {"models": 7}, [], "models"]
)
async def test_what_is_no_list_of_models_is_an_error_of_the_engine(tags: Any) -> None:
    async with server(lambda path, _: tags if path == "/api/tags" else {}) as url:
        with pytest.raises(EngineError):
            await OllamaEngine({"name": "x", "url": url}).models()


async def test_an_ollama_without_models_has_none() -> None:
    async with server(lambda *_: {"models": None}) as url:  # as some versions say it
        assert await OllamaEngine({"name": "x", "url": url}).models() == []


async def test_a_model_that_ollama_cannot_show_hides_no_other() -> None:
    tags = {"models": [{"name": name, "digest": name, "size": 1} for name in ("broken", "good")]}
    asked: list[str] = []

    def answers(path: str, body: Any) -> Any:
        if path == "/api/tags":
            return tags
        asked.append(body["model"])
        return {"capabilities": ["completion"]} if body["model"] == "good" else []

    async with server(answers) as url:
        engine = OllamaEngine({"name": "x", "url": url})
        for _ in range(2):
            assert [model.display for model in await engine.models()] == ["good:latest"]
    assert asked.count("good") == 1, "what it said once it says until the digest is another"


async def test_ollama_that_dies_ends_its_runners() -> None:
    async with OllamaDouble("x", "{}", {}) as double:
        engine = OllamaEngine({"name": "ollama", "url": double.url})
        endless = next(m for m in await engine.models() if m.display.startswith("endless"))
        runner = await engine.load(endless, PLAN)
        assert runner.info.version == "0.12.3"
        deaths: list[object] = []
        runner.on_exit(deaths.append)
        recordings = [Recording(), Recording()]
        for recording in recordings:
            runner.generate(CompletionRequest(prompt="go"), recording)
        for recording in recordings:
            await recording.pieces(2)
        await double.die()
        for recording in recordings:
            assert isinstance((await recording.failed()).error, RunnerDied)
        assert len(deaths) == 1
        assert isinstance(deaths[0], RunnerDied)
        with pytest.raises(LoadFailed):
            await engine.load(endless, PLAN)


@pytest.mark.parametrize("unload", [True, False])
async def test_ollama_is_told_to_load_and_to_unload(unload: bool) -> None:
    async with OllamaDouble("x", "{}", {}) as double:
        engine = OllamaEngine({"name": "ollama", "url": double.url, "unload": unload})
        listed = await engine.models()
        assert len([path for path, _ in double.bodies if path == "/api/show"]) == len(listed)
        await engine.models()  # shown once: the digests are the same
        assert len([path for path, _ in double.bodies if path == "/api/show"]) == len(listed)
        writer = next(m for m in listed if m.display.startswith("writer"))
        assert (writer.architecture.layers, writer.architecture.key_length) == (32, 128)
        assert writer.modified_at == pytest.approx(1_777_941_464.7, abs=1)
        runner = await engine.load(writer, PLAN)
        assert double.bodies[-1] == (
            "/api/generate",
            {"model": "writer:latest", "stream": False, "options": {"num_ctx": 2048}},
        )
        await runner.unload()
        asked = [body.get("keep_alive") for path, body in double.bodies if path == "/api/generate"]
        assert (0 in asked) is unload


async def test_an_answer_that_is_not_the_protocol_ends_the_call() -> None:
    def odd(path: str, _: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m", "owned_by": "llamacpp"}]}
        return {"something": "else"}

    async with server(odd) as url:
        engine = OpenAIEngine({"name": "x", "url": url})
        (model,) = await engine.models()
        runner = await engine.load(model, PLAN)
        recording = Recording()
        asked = ChatRequest(
            messages=(Message(role="user", content="x"),),
            tools=(Tool(name="f", parameters={"type": "object", "properties": {}}),),
            tool_choice="required",
        )
        runner.chat(asked, recording)
        assert isinstance((await recording.failed()).error, Internal)
        await engine.close()
