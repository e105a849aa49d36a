"""OpenAI chat: request JSON -> internal request; events -> bytes that the official client reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat._completions import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ollama_distributed.base.errors import (
    ContextExceeded,
    Invalid,
    Malformed,
    MissingBody,
    ModelNotFound,
    QueueFull,
    RunnerDied,
    Unsupported,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    Event,
    Failed,
    Finished,
    InferenceRequest,
    JsonObject,
    JsonSchema,
    NamedTool,
    Opened,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.openai import ROUTES
from ollama_distributed.gateway.dialects.openai_chat import parse_chat
from ollama_distributed.gateway.dialects.openai_errors import render_error

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.5)
PNG = base64.b64encode(b"\x89PNG").decode()
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5, reasoning_tokens=2)


def parse(**fields: Any) -> Generate:
    return parse_chat(json.dumps({"model": "m", "messages": USER} | fields).encode(), CONTEXT)


def request(**fields: Any) -> InferenceRequest:
    return parse(**fields).requests[0]


def prompt(**fields: Any) -> ChatPrompt:
    asked = request(**fields).prompt
    assert isinstance(asked, ChatPrompt)
    return asked


def body(call: Generate, *events: Event) -> dict[str, Any]:
    whole = b"".join(call.encoder.feed(0, event) for event in events)
    return json.loads(whole)


def sse(stream: bytes) -> Iterator[str]:
    assert stream.endswith(b"\n\n")
    for block in stream.decode().split("\n\n")[:-1]:
        assert block.startswith("data: ")
        assert "\n" not in block
        yield block[6:]


def chunks(stream: bytes) -> list[ChatCompletionChunk]:
    *rows, done = sse(stream)
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(row, strict=True) for row in rows]


# ── requests ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "temperature", 1.0),
        ({}, "top_p", 1.0),
        ({"temperature": 0}, "temperature", 0),
        ({"options": {"temperature": 0.3}}, "temperature", 0.3),
        ({"temperature": 0.5, "options": {"temperature": 0.3}}, "temperature", 0.5),
        ({"max_tokens": 9}, "num_predict", 9),
        ({"max_completion_tokens": 8, "max_tokens": 9}, "num_predict", 8),
        ({"max_tokens": -1}, "num_predict", -1),
        ({"options": {"num_predict": 4}}, "num_predict", 4),
        ({"seed": 2**40 + 5}, "seed", 5),
        ({"seed": -(2**63)}, "seed", -(2**63)),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "", "y"]}, "stop", ("x", "y")),
        ({"options": {"stop": ["z"]}}, "stop", ("z",)),
        ({"presence_penalty": 1, "frequency_penalty": -2}, "frequency_penalty", -2),
        ({"logit_bias": {"12": -100}}, "logit_bias", {"12": -100}),
        ({"options": {"top_k": 3, "invented": {}}}, "top_k", 3),
        ({"top_k": 5, "options": {"top_k": 3}}, "top_k", 5),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.05}, "min_p", 0.05),
        ({"typical_p": 0.9}, "typical_p", 0.9),
        ({"repetition_penalty": 1.1}, "repeat_penalty", 1.1),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.1}, "repeat_penalty", 1.2),
        ({"repeat_last_n": -1}, "repeat_last_n", -1),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", None),
        ({"ignore_eos": True, "tools": [CLOCK]}, "ignore_eos", None),
        ({"ignore_eos": False}, "ignore_eos", None),
    ],
)
def test_sampling(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(request(**fields).sampling, name) == value


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"response_format": {"type": "text"}}, "format", None),
        ({"response_format": {"type": "json_object"}}, "format", JsonObject()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"a": 1}}}},
            "format",
            JsonSchema({"a": 1}),
        ),
        ({"reasoning_effort": "none"}, "think", False),
        ({"reasoning_effort": "minimal"}, "think", "low"),
        ({"reasoning": {"effort": "high"}}, "think", "high"),
        ({"reasoning_effort": "xhigh"}, "think", "max"),
        ({}, "think", None),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs", 5),
        ({"keep_alive": "1h30m"}, "keep_alive_s", 5400.0),
        ({"keep_alive": "-1m"}, "keep_alive_s", -60.0),
        ({"keep_alive": 0}, "keep_alive_s", 0.0),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, "model", "m"),
    ],
)
def test_fields(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(request(**fields), name) == value


def test_num_ctx_as_an_extension() -> None:
    assert request(options={"num_ctx": 2048}).options.num_ctx == 2048


def test_messages_of_every_role() -> None:
    rows = prompt(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                {"type": "text", "text": "this"},
            ]},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "function", "name": "clock", "content": "noon"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "oh "}, {"type": "refusal", "refusal": "no"}]},
        ]
    ).messages  # fmt: skip
    assert [row.role for row in rows] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert rows[1].content == "see\nthis"
    assert rows[1].images == (b"\x89PNG",)
    assert rows[2].thinking == "hm"
    assert rows[2].tool_calls == (ToolCall(id="c1", name="weather", arguments='{"a":1}'),)
    assert (rows[3].tool_name, rows[3].tool_call_id) == ("weather", "c1")
    assert rows[4].tool_name == "clock"
    assert rows[5].content == "oh no"


@pytest.mark.parametrize(
    ("choice", "expected", "left"),
    [
        (None, "auto", 2),
        ("auto", "auto", 2),
        ("none", "none", 2),
        ("required", "required", 2),
        ({"type": "function", "function": {"name": "clock"}}, NamedTool("clock"), 2),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}},
            "required",
            1,
        ),
    ],
)
def test_tool_choice(choice: Any, expected: object, left: int) -> None:
    asked = prompt(tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False)
    assert asked.tool_choice == expected
    assert len(asked.tools) == left
    assert not asked.parallel_tool_calls


def test_older_functions_become_tools_and_answer_in_kind() -> None:
    call = parse(functions=[{"name": "clock"}], function_call={"name": "clock"})
    asked = call.requests[0].prompt
    assert isinstance(asked, ChatPrompt)
    assert asked.tool_choice == NamedTool("clock")
    answer = body(
        call, Delta(tool_calls=(ToolCall(id="c", name="clock", arguments="{}"),)), Finished(reason="stop")
    )
    assert answer["choices"][0]["finish_reason"] == "function_call"
    assert answer["choices"][0]["message"]["function_call"] == {"name": "clock", "arguments": "{}"}


def test_n_makes_siblings_with_other_seeds_and_ids() -> None:
    asked = parse(n=3, seed=5).requests
    assert [r.sampling.seed for r in asked] == [5, 6, 7]
    assert len({r.request_id for r in asked}) == 3


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def image(url: str) -> dict[str, Any]:
    return user({"type": "image_url", "image_url": {"url": url}})


UNFINISHED = [{"id": "c", "function": {"name": "f", "arguments": "{"}}]
NO_SUCH_TOOL = {"type": "function", "function": {"name": "x"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": ""}, "model", "model is required"),
        ({"messages": []}, "messages", "[] is too short - 'messages'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or an array"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content is required"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "robot"),
        (image("http://x/y.png"), "messages[0].content[0].image_url", "data URI"),
        (image("data:image/png;base64,*"), "messages[0].content[0].image_url", "base64"),
        (user({"type": "input_audio"}), "messages[0].content[0]", "Audio"),
        ({"messages": [{"role": "assistant", "tool_calls": UNFINISHED}]},
         "messages[0].tool_calls[0].function.arguments", "JSON"),
        ({"temperature": 3}, "temperature", "between 0.0 and 2.0"),
        ({"temperature": "hot"}, "temperature", "expected a number, got a string"),
        ({"top_k": "all"}, "top_k", "expected an integer, got a string"),
        ({"top_k": -2}, "top_k", "between -1"),
        ({"min_p": 1.5}, "min_p", "between 0.0 and 1.0"),
        ({"repetition_penalty": 11}, "repetition_penalty", "between 0.0 and 10.0"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 129}, "n", "between 1 and 128"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "huge"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "required"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "custom"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NO_SUCH_TOOL, "tools": [CLOCK]}, "tool_choice", '"x"'),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"keep_alive": "soon"}, "keep_alive", "duration"),
        ({"options": {"num_ctx": "big"}}, "num_ctx", "must be of type integer"),
        ({"modalities": ["audio"]}, "modalities", "Audio"),
        ({"stop": [str(i) for i in range(65)]}, "stop", "at most 64"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", MissingBody),
        (b"{", Malformed),
        (b'{"model":"\xff"}', Malformed),
        (b"[]", Invalid),
        (b"nul", Malformed),
    ],
)
def test_bodies_that_are_no_request(raw: bytes, error: type[Invalid]) -> None:
    with pytest.raises(error):
        parse_chat(raw, CONTEXT)


# ── whole answers ───────────────────────────────────────────────────────────────────


def test_a_whole_answer() -> None:
    rows = (TokenLogprob("Hé", -0.5, "Hé".encode(), (TopLogprob("Hé", -0.5, "Hé".encode()),)),)
    answer = body(
        parse(),
        Opened(),
        Delta(thinking="hm"),
        Delta(text="Hé", logprobs=rows),
        Delta(text="llo"),
        Finished(reason="length", usage=USAGE),
    )
    parsed = ChatCompletion.model_validate(answer, strict=True)
    assert parsed.id == "chatcmpl-r1"
    assert parsed.created == 1_700_000_000
    choice = parsed.choices[0]
    assert choice.message.content == "Héllo"
    assert answer["choices"][0]["message"]["reasoning"] == "hm"
    assert answer["choices"][0]["message"]["reasoning_content"] == "hm"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].bytes == list("Hé".encode())
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 12
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 3
    assert parsed.usage.completion_tokens_details is not None
    assert parsed.usage.completion_tokens_details.reasoning_tokens == 2


def test_tool_calls_have_string_arguments() -> None:
    answer = body(
        parse(tools=[CLOCK]),
        Delta(tool_calls=(ToolCall(id="c1", name="clock", arguments='{"a"'),)),
        Delta(tool_calls=(ToolCall(id="c1", name="", arguments=":1}"),)),
        Delta(tool_calls=(ToolCall(id="", name="clock", arguments="", index=1),)),
        Finished(reason="stop"),
    )
    choice = ChatCompletion.model_validate(answer, strict=True).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert answer["choices"][0]["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a":1}'}},
        {"id": "call_r1_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ]


def test_choices_finish_in_any_order() -> None:
    call = parse(n=2)
    feed = call.encoder.feed
    out = feed(1, Delta(text="b")) + feed(1, Finished(reason="stop", usage=USAGE)) + feed(0, Delta(text="a"))
    assert out == b""
    parsed = ChatCompletion.model_validate_json(feed(0, Finished(reason="stop", usage=USAGE)), strict=True)
    assert [c.message.content for c in parsed.choices] == ["a", "b"]
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (7, 10)


# ── streams ─────────────────────────────────────────────────────────────────────────


def test_a_stream_in_order() -> None:
    call = parse(stream=True, stream_options={"include_usage": True})
    assert call.stream
    assert call.encoder.content_type.startswith("text/event-stream")
    events: list[Event] = [Opened(), Delta(text="a"), Delta(text="b"), Finished(reason="stop", usage=USAGE)]
    sent = b"".join(call.encoder.feed(0, event) for event in events)
    assert sent.count(b'"usage":null') == 4, "all chunks but the last"
    rows = chunks(sent)
    assert [row.choices[0].delta.to_dict() if row.choices else None for row in rows] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
        None,
    ]
    assert rows[-2].choices[0].finish_reason == "stop"
    assert rows[-1].usage is not None
    assert rows[-1].usage.total_tokens == 12
    assert rows[0].usage is None


def test_reasoning_streams_under_both_names() -> None:
    call = parse(stream=True)
    call.encoder.feed(0, Opened())
    row = json.loads(call.encoder.feed(0, Delta(thinking="hm"))[6:])
    assert row["choices"][0]["delta"] == {"reasoning": "hm", "reasoning_content": "hm"}


def test_calls_that_were_cut_say_length() -> None:
    events = [Delta(tool_calls=(ToolCall(id="c1", name="clock", arguments="{"),)), Finished(reason="length")]
    assert body(parse(), *events)["choices"][0]["finish_reason"] == "length"
    call = parse(stream=True)
    *_, last = chunks(b"".join(call.encoder.feed(0, event) for event in events))
    assert last.choices[0].finish_reason == "length"


def test_text_that_breaks_lines_elsewhere_is_escaped() -> None:
    call = parse(stream=True)
    call.encoder.feed(0, Opened())
    text = "a\u2028b\u2029c\x85d\ne"
    out = call.encoder.feed(0, Delta(text=text))
    assert len(out.decode().splitlines()) == 2
    assert json.loads(out[6:])["choices"][0]["delta"]["content"] == text


def test_an_error_in_the_stream_is_one_the_client_raises_on() -> None:
    call = parse(stream=True, n=2)
    out = call.encoder.feed(0, Opened()) + call.encoder.feed(0, Failed(RunnerDied("the runner died")))
    *_, last = sse(out)
    assert json.loads(last)["error"] == {
        "message": "the runner died",
        "type": "api_error",
        "param": None,
        "code": "runner_died",
    }
    assert call.encoder.feed(1, Delta(text="late")) == b""


fragments = st.lists(st.text(max_size=5), min_size=1, max_size=4)
deltas = st.one_of(
    st.builds(Delta, text=st.text(max_size=8), thinking=st.text(max_size=4)),
    st.builds(
        Delta,
        text=st.text(min_size=1, max_size=3),
        logprobs=st.just((TokenLogprob("t", -1.0, b"t", (TopLogprob("u", -2.0, b"u"),)),)),
    ),
    st.builds(
        lambda index, arguments: Delta(
            tool_calls=(ToolCall(id=f"c{index}", name=f"f{index}", arguments=arguments, index=index),)
        ),
        st.integers(0, 2),
        st.text(max_size=5),
    ),
)
reasons = st.sampled_from(["stop", "length", "tool_calls"])


@settings(deadline=None)  # a busy machine is not a defect
@given(st.lists(deltas, max_size=12), reasons, st.booleans())
def test_stream_and_whole_agree(rows: list[Delta], reason: Any, opened: bool) -> None:
    """Whatever comes, the official accumulator ends where the non-streaming body is."""
    events: list[Event] = [Opened()] if opened else []
    events += [*rows, Finished(reason=reason, usage=USAGE)]

    whole = body(parse(), *events)
    stream = parse(stream=True, stream_options={"include_usage": True}).encoder
    state: ChatCompletionStreamState[Any] = ChatCompletionStreamState()
    content = reasoning = ""
    for chunk in chunks(b"".join(stream.feed(0, event) for event in events)):
        if chunk.choices:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning", None) or ""
        state.handle_chunk(chunk)
    message = whole["choices"][0]["message"]
    assert content == (message["content"] or "")
    assert reasoning == message.get("reasoning", "")
    final = state.current_completion_snapshot
    assert final.choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    calls = [
        (c.id, c.function.name, c.function.arguments or "{}")
        for c in final.choices[0].message.tool_calls or []
    ]
    assert calls == [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])
    ]
    logprobs = final.choices[0].logprobs
    counted = len(logprobs.content or []) if logprobs else 0
    assert counted == sum(len(row.logprobs) for row in rows)
    assert final.usage is not None
    assert final.usage.to_dict() == whole["usage"]


# ── errors ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (Invalid("bad", param="n"), 400, "invalid_request_error", "n"),
        (Unsupported("no", param="tools"), 400, "invalid_request_error", "tools"),
        (ContextExceeded("long"), 400, "invalid_request_error", None),
        (ModelNotFound("model 'x' not found"), 404, "not_found_error", None),
        (QueueFull("busy", retry_after_s=2.5), 429, "rate_limit_error", None),
        (RunnerDied("gone"), 502, "api_error", None),
    ],
)
def test_error_bodies(error: Invalid, status: int, kind: str, param: str | None) -> None:
    answer = render_error(error, RequestId("r1"))
    assert answer.status == status
    assert json.loads(answer.body) == {
        "error": {"message": error.message, "type": kind, "param": param, "code": error.code}
    }
    assert ("retry-after" in dict(answer.headers)) == isinstance(error, QueueFull)


def test_routes_are_the_hot_ones() -> None:
    assert {(route.method, route.path) for route in ROUTES} == {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
    }
