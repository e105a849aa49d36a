"""What is said to, and understood from, remote engines. Chunks as the servers' docs show them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ollama_distributed.adapters.engines.http import TcpAddress, UnixAddress
from ollama_distributed.adapters.engines.remote import ollama_wire, openai_stream, openai_wire
from ollama_distributed.adapters.engines.remote.settings import local_name, read_settings, remote_of
from ollama_distributed.base import errors
from ollama_distributed.base.inference import (
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Sampling,
    Tool,
    ToolCall,
)
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Tokens
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan

PLAN = LoadPlan(slots=1, context_tokens=4096, threads=1)
CLOCK = Tool(name="clock", parameters={"type": "object"})
USER = Message(role="user", content="hi")


def events(*chunks: Any) -> list[EngineEvent]:
    stream = openai_stream.OpenAIStream()
    data = [chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() for chunk in chunks]
    return [event for chunk in data for event in stream.feed(chunk)]


# ── OpenAI ──────────────────────────────────────────────────────────────────────────


def test_vllm_completion_with_ids() -> None:
    assert events(
        {"choices": [{"index": 0, "text": "Hi", "token_ids": [5], "finish_reason": None}], "usage": None},
        {"choices": [{"index": 0, "text": "", "token_ids": [6], "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "\u00fc!", "token_ids": [7, 8], "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
                                  "prompt_tokens_details": {"cached_tokens": 3}}},
        b"[DONE]",
    ) == [
        Tokens((5,), "Hi"),
        Tokens((6,), ""),
        Tokens((7, 8), "\u00fc!"),
        Done(reason="length", prompt_tokens=9, cached_tokens=3, completion_tokens=4),
    ]  # fmt: skip


def piece(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "logprobs": None, "finish_reason": None, **choice}], "usage": None}


TEXT = piece(text="ü\n", token_ids=[5, 6], stop_reason=None)
CHAT = piece(delta={"content": "\n\ndata: a", "tool_calls": []})


def at_once(*chunks: dict[str, Any], joins: bool = True) -> Sequence[EngineEvent] | None:
    data = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return openai_stream.OpenAIStream().tokens(data, joins)


def test_the_short_way_reads_as_the_long_one_does() -> None:
    without = piece(text="without ids")
    for chunks in ((TEXT,), (CHAT,), (without,), (TEXT, TEXT), (CHAT, CHAT), (TEXT, CHAT, without)):
        assert at_once(*chunks, joins=False) == events(*chunks)
    assert at_once(TEXT, TEXT, TEXT) == [Tokens((5, 6) * 3, "ü\n" * 3)]
    assert at_once(CHAT, CHAT) == [ChatDelta(text="\n\ndata: a" * 2, pieces=2)]


@pytest.mark.parametrize(
    "other",
    [
        piece(text=""),
        piece(text="x", token_ids=[1], finish_reason="stop"),
        piece(text="x", token_ids=[1], logprobs={"tokens": ["x"]}),
        piece(delta={"content": ""}),
        piece(delta={"content": "x", "reasoning": "y"}),
        piece(delta={"content": "x", "tool_calls": [{"index": 0}]}),
        piece(delta={"role": "assistant"}),
        {"choices": [], "usage": None},
        {"choices": [*TEXT["choices"], *TEXT["choices"]]},
        TEXT | {"usage": {"prompt_tokens": 1}},
        CHAT | {"error": {"message": "boom"}},
    ],
)
def test_what_says_more_than_text_goes_the_long_way(other: dict[str, Any]) -> None:
    for joins in (False, True):
        assert at_once(other, joins=joins) is None
        for plain in (TEXT, CHAT):
            assert at_once(plain, other, joins=joins) is None
            assert at_once(other, plain, joins=joins) is None


def test_what_cannot_be_joined_is_told_one_by_one() -> None:
    for chunks in ((piece(text="a"), piece(text="b")), (TEXT, piece(text="b")), (TEXT, CHAT), (CHAT, TEXT)):
        assert at_once(*chunks) == events(*chunks)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_chat_with_reasoning_and_tools(field: str) -> None:
    def delta(**values: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": values, "finish_reason": None}]}

    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "clock", "arguments": ""}}
    part = {"index": 0, "function": {"arguments": "{}"}}
    assert events(
        delta(role="assistant", content=""),
        delta(**{field: "Hm."}),
        delta(content="Ok"),
        delta(tool_calls=[call]),
        delta(tool_calls=[part]),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
        b"[DONE]",
    ) == [
        ChatDelta(thinking="Hm."),
        ChatDelta(text="Ok"),
        ChatDelta(tool_calls=(ToolCall(id="c1", name="clock", arguments=""),)),
        ChatDelta(tool_calls=(ToolCall(id="", name="", arguments="{}"),)),
        Done(reason="tool_calls", prompt_tokens=1, cached_tokens=0, completion_tokens=2),
    ]


def test_logprobs_of_completion_and_chat() -> None:
    old = {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": [{" a": -0.5, " b": -1.0}]}
    new = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
        {"token": "b", "logprob": -1.0, "bytes": None}]}]}  # fmt: skip
    first, second = events(
        {"choices": [{"text": " a", "logprobs": old}]},
        {"choices": [{"delta": {"content": "a"}, "logprobs": new}]},
    )
    assert isinstance(first, Tokens)
    assert isinstance(second, ChatDelta)
    assert [(t.token, t.logprob) for t in first.logprobs[0].top] == [(" a", -0.5), (" b", -1.0)]
    assert (first.logprobs[0].bytes, second.logprobs[0].bytes) == (b" a", b"a")
    assert second.logprobs[0].top[0].bytes == b"b"


def test_an_error_in_the_stream_and_a_cut_stream() -> None:
    (failed,) = events(
        {"error": {"message": "CUDA out of memory", "type": "InternalServerError", "code": 500}}
    )
    assert isinstance(failed, EngineFailed)
    assert "CUDA" in failed.error.message
    assert events(b"[DONE]") == []
    for other in (b"<html>", b'{"choices":[{"text":"\xff"}]}'):
        with pytest.raises(errors.EngineError):
            events(other)


def test_bodies_say_only_what_a_server_knows() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=40, min_p=0.1, repeat_penalty=1.1, num_predict=9, seed=-1, ignore_eos=True
    )
    request = CompletionRequest(prompt="hi", sampling=sampling, format=JsonObject(), top_logprobs=2)
    plain = openai_wire.completion_body("m", request, "openai")
    assert {"top_k", "min_p", "repetition_penalty", "return_token_ids", "seed", "ignore_eos"}.isdisjoint(
        plain
    )
    assert (plain["max_tokens"], plain["logprobs"], plain["stream"]) == (9, 2, True)
    vllm = openai_wire.completion_body("m", request, "vllm")
    assert (vllm["top_k"], vllm["repetition_penalty"], vllm["return_token_ids"]) == (40, 1.1, True)
    assert vllm["ignore_eos"] is True
    off = CompletionRequest(prompt=(1, 2), sampling=Sampling(top_k=0))
    body = openai_wire.completion_body("m", off, "vllm")
    assert body["prompt"] == [1, 2]
    assert "top_k" not in body


@pytest.mark.parametrize(
    "request_", [
        CompletionRequest(prompt="x", images=(b"png",)),
        CompletionRequest(prompt="x", grammar="root ::= x"),
        CompletionRequest(prompt=("x", (1, 2))),
    ],
)  # fmt: skip
def test_what_completions_cannot_say(request_: CompletionRequest) -> None:
    with pytest.raises(errors.Unsupported):
        openai_wire.completion_body("m", request_, "vllm")


def test_a_tenant_s_part_of_vllm_s_cache_is_its_own() -> None:
    def salts(tenant: str, secret: str = "key", kind: openai_wire.ServerKind = "vllm") -> set[object]:
        completion = CompletionRequest(prompt="hi", tenant=tenant)
        chat = ChatRequest(messages=(USER,), tools=(), tenant=tenant)
        bodies = (
            openai_wire.completion_body("m", completion, kind, secret=secret),
            openai_wire.chat_body("m", chat, kind, secret=secret),
        )
        return {body.get("cache_salt") for body in bodies}

    (red,) = salts("red")
    assert isinstance(red, str)
    assert len(red) == 64
    assert salts("red") == {red}
    assert {red} != salts("blue") != salts("blue", secret="other")
    assert salts("") == salts("red", kind="openai") == {None}, "a strict server refuses what it does not know"


def test_tool_choice() -> None:
    request = ChatRequest(messages=(USER,), tools=(CLOCK,), tool_choice=NamedTool("clock"))
    body = openai_wire.chat_body("m", request, "vllm")
    assert body["tool_choice"] == {"type": "function", "function": {"name": "clock"}}
    none = ChatRequest(
        messages=(USER,), tools=(CLOCK,), tool_choice="none", format=JsonSchema({"type": "object"})
    )
    body = openai_wire.chat_body("m", none, "openai")
    assert {"tools", "tool_choice", "add_generation_prompt"}.isdisjoint(body)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "This model's maximum context length is 4096; you asked 5000", errors.ContextExceeded),
        (400, "temperature must be non-negative", errors.Invalid),
        (401, "Unauthorized", errors.Unauthenticated),
        (404, "The model `x` does not exist.", errors.ModelNotFound),
        (429, "slow down", errors.QueueFull),
        (503, "loading", errors.Unavailable),
        (500, "boom", errors.EngineError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["openai", "flat", "text"])
def test_openai_errors(status: int, message: str, error: type[Exception], shape: str) -> None:
    bodies: dict[str, Any] = {
        "openai": {"error": {"message": message, "type": "x"}},
        "flat": {"object": "error", "message": message},
        "text": {"error": message},
    }
    found = openai_wire.read_error(status, json.dumps(bodies[shape]).encode())
    assert type(found) is error
    assert message in found.message
    if isinstance(found, errors.ContextExceeded):
        assert (found.prompt_tokens, found.context_tokens) == (5000, 4096)


def test_an_error_page_is_an_error() -> None:
    assert "502" in openai_wire.read_error(502, b"<html>bad gateway").message


def test_gauges_are_summed_over_labels() -> None:
    text = (
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 1.0\n'
        "vllm:kv_cache_usage_perc 0.25\n"
    )
    assert openai_wire.gauge(text, "vllm:num_requests_running") == 3
    assert openai_wire.gauge(text, "vllm:kv_cache_usage_perc") == 0.25
    assert openai_wire.gauge(text, "vllm:num_requests") is None
    assert openai_wire.gauge(text, "") is None


@pytest.mark.parametrize(
    ("owner", "kind"),
    [
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("llamacpp", "llama-server"),
        ("openai", "openai"),
        ("", "openai"),
    ],
)
def test_kinds(owner: str, kind: str) -> None:
    assert openai_wire.kind_of(owner) == kind


# ── Ollama ──────────────────────────────────────────────────────────────────────────


def test_ollama_options() -> None:
    sampling = Sampling(temperature=0.5, num_predict=-1, seed=7, stop=("x",))
    body = ollama_wire.generate_body("m", CompletionRequest(prompt="hi", sampling=sampling), PLAN)
    assert body["options"] == {"num_ctx": 4096, "temperature": 0.5, "num_predict": -1, "seed": 7}
    assert body["raw"] is True
    infill = ollama_wire.generate_body("m", CompletionRequest(prompt="a", suffix="b"), PLAN)
    assert (infill["raw"], infill["suffix"]) == (False, "b")


def test_ollama_chat_sends_arguments_as_an_object() -> None:
    called = Message(role="assistant", tool_calls=(ToolCall(id="1", name="clock", arguments='{"a": 1}'),))
    result = Message(role="tool", content="noon", tool_name="clock", tool_call_id="1")
    request = ChatRequest(messages=(USER, called, result), tools=(CLOCK,), think="high")
    body = ollama_wire.chat_body("m", request, PLAN)
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert body["messages"][2]["tool_name"] == "clock"
    assert body["think"] == "high"


@pytest.mark.parametrize(
    "request_", [
        CompletionRequest(prompt=(1, 2)),
        CompletionRequest(prompt=("x", (1,))),
        CompletionRequest(prompt="x", grammar="root ::= x"),
        CompletionRequest(prompt="x", sampling=Sampling(logit_bias={"1": 1.0})),
    ],
)  # fmt: skip
def test_what_ollama_cannot_be_told(request_: CompletionRequest) -> None:
    with pytest.raises(errors.Unsupported):
        ollama_wire.generate_body("m", request_, PLAN)


def test_ollama_cannot_be_told_to_call_a_tool() -> None:
    with pytest.raises(errors.Unsupported, match="tool_choice"):
        ollama_wire.chat_body(
            "m", ChatRequest(messages=(USER,), tools=(CLOCK,), tool_choice="required"), PLAN
        )


def test_ollama_lines() -> None:
    stream = ollama_wire.OllamaStream()
    call = {"id": "call_x", "function": {"name": "clock", "arguments": {"a": 1}}}
    lines: list[Any] = [
        {"message": {"role": "assistant", "content": "", "thinking": "Hm"}, "done": False},
        {"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": False},
        {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
         "prompt_eval_count": 3, "prompt_eval_cached_count": 2, "eval_count": 4,
         "eval_duration": 2_000_000_000},
    ]  # fmt: skip
    assert [event for line in lines for event in stream.feed(json.dumps(line).encode())] == [
        ChatDelta(thinking="Hm"),
        ChatDelta(tool_calls=(ToolCall(id="call_x", name="clock", arguments='{"a": 1}'),)),
        Done(reason="tool_calls", prompt_tokens=3, cached_tokens=2, completion_tokens=4, completion_s=2.0),
    ]
    (failed,) = ollama_wire.OllamaStream().feed(b'{"error":"llama runner process has terminated"}')
    assert isinstance(failed, EngineFailed)


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (404, "model 'x' not found", errors.ModelNotFound),
        (400, '"m" does not support tools', errors.Unsupported),
        (400, "the input length exceeds the context length", errors.ContextExceeded),
        (400, "invalid options", errors.Invalid),
        (503, "server busy", errors.Unavailable),
        (500, "boom", errors.EngineError),
    ],
)
def test_ollama_errors(status: int, message: str, error: type[Exception]) -> None:
    found = ollama_wire.read_error(status, json.dumps({"error": message}).encode())
    assert type(found) is error
    assert found.message == message


# ── settings ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "address", "prefix"),
    [
        ("http://127.0.0.1:8000", TcpAddress("127.0.0.1", 8000), ""),
        ("http://127.0.0.1:8000/v1/", TcpAddress("127.0.0.1", 8000), ""),
        ("http://[::1]/llm/v1", TcpAddress("::1", 80), "/llm"),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock"), ""),
    ],
)
def test_urls(url: str, address: object, prefix: str) -> None:
    remote = remote_of(read_settings({"name": "x", "url": url, "api_key": "k"}))
    assert (remote.address, remote.prefix) == (address, prefix)
    assert remote.headers == {"authorization": "Bearer k"}


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://u:p@x", "http://x:99999999"]
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(errors.Invalid):
        read_settings({"name": "x", "url": url})


@pytest.mark.parametrize("extra", [{"kind": "tgi"}, {"capabilities": {"m": ["fly"]}}, {"unknown": 1}])
def test_bad_settings(extra: dict[str, Any]) -> None:
    with pytest.raises(errors.Invalid):
        read_settings({"name": "x", "url": "http://x", **extra})


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        ("llama3.2:3b", "llama3.2:3b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B:latest"),
        ("/models/deep/down/x.gguf", "x.gguf:latest"),
        ("a model (new)!", "a-model--new:latest"),
        ("\u6a21\u578b", "model:latest"),
    ],
)
def test_names(remote: str, local: str) -> None:
    assert local_name(remote).display == local


def test_a_chat_that_nobody_sees_a_part_of_comes_whole() -> None:
    request = ChatRequest(messages=(Message(role="user", content="hi"),), tools=(), whole=True)
    body = openai_wire.chat_body("m", request, "openai")
    assert body["stream"] is False
    assert "stream_options" not in body
    answer = {
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "reasoning_content": "hm",
                    "tool_calls": None,
                },
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
    }
    assert openai_stream.OpenAIAnswer().feed(json.dumps(answer).encode()) == [
        ChatDelta(text="Hello", thinking="hm"),
        Done(reason="length", prompt_tokens=4, cached_tokens=2, completion_tokens=3),
    ]
    with pytest.raises(errors.EngineError):
        openai_stream.OpenAIAnswer().feed(b"<html>")
