"""Anthropic messages: request JSON -> internal request; events -> what the official client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message as AnthropicMessage
from anthropic.types import MessageTokensCount, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from ollama_distributed.base.errors import (
    BodyTooLarge,
    EngineError,
    Forbidden,
    Invalid,
    ModelNotFound,
    OllamaDistributedError,
    QueueFull,
    RunnerDied,
    Unauthenticated,
    Unavailable,
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
    JsonSchema,
    Message,
    NamedTool,
    Opened,
    ToolCall,
    Usage,
)
from ollama_distributed.gateway.dialects.anthropic import ROUTES, parse_count_tokens, parse_messages
from ollama_distributed.gateway.dialects.anthropic_errors import render_error
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.5)
USER = [{"role": "user", "content": "hi"}]
USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5, reasoning_tokens=2)
CLOCK = {"name": "clock", "description": "d", "input_schema": {"type": "object"}}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def parse(**fields: Any) -> Generate:
    body = {"model": "m", "max_tokens": 9, "messages": USER} | fields
    return parse_messages(json.dumps(body).encode(), CONTEXT)


def request(**fields: Any) -> InferenceRequest:
    return parse(**fields).requests[0]


def prompt(**fields: Any) -> ChatPrompt:
    asked = request(**fields).prompt
    assert isinstance(asked, ChatPrompt)
    return asked


def content(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


def named_events(call: Generate, *events: Event) -> list[tuple[str, dict[str, Any]]]:
    out = b"".join(call.encoder.feed(0, event) for event in events).decode()
    found = []
    for block in out.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def accumulated(call: Generate, *events: Event) -> AnthropicMessage:
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for name, body in named_events(call, *events):
        assert body["type"] == name
        if name != "ping":
            snapshot = accumulate_event(
                event=EVENT.validate_python(body), current_snapshot=snapshot, json_bufs=buffers
            )
    return AnthropicMessage.model_validate(snapshot.to_dict())


def whole(call: Generate, *events: Event) -> AnthropicMessage:
    return AnthropicMessage.model_validate_json(
        b"".join(call.encoder.feed(0, e) for e in events), strict=True
    )


# ── requests ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "num_predict", 9),
        ({}, "temperature", None),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, "top_k", 3),
        ({"stop_sequences": ["x", "y"]}, "stop", ("x", "y")),
        ({"options": {"min_p": 0.1, "num_predict": 3}}, "num_predict", 9),
        ({"options": {"min_p": 0.1}}, "min_p", 0.1),
    ],
)
def test_sampling(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(request(**fields).sampling, name) == value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
        ({"output_config": {"effort": "xhigh"}}, "high"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, False),
    ],
)
def test_thinking(fields: dict[str, Any], expected: object) -> None:
    assert request(**fields).think == expected


@pytest.mark.parametrize("field", ["output_format", "output_config"])
def test_formats(field: str) -> None:
    form = {"type": "json_schema", "schema": {"a": 1}}
    value = form if field == "output_format" else {"format": form}
    assert request(**{field: value}).format == JsonSchema({"a": 1})


def test_a_whole_conversation() -> None:
    rows = prompt(
        system=[
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "b"}],
        messages=[
            {"role": "user", "content": [
                {"type": "text", "text": "see"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "wait"},
                {"type": "tool_use", "id": "t1", "name": "clock", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "text", "text": "go on"},
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True,
                 "content": [{"type": "text", "text": "broken"}]}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "noon"}]},
            {"role": "user", "content": [
                {"type": "document", "title": "T", "source": {"type": "text", "data": "D"}},
                {"type": "search_result", "title": "S", "source": "u",
                 "content": [{"type": "text", "text": "R"}]}]},
        ],
    ).messages  # fmt: skip
    assert rows[0] == Message(role="system", content="a\nb")
    assert rows[1] == Message(role="user", content="see", images=(b"hi",))
    assert rows[2] == Message(
        role="assistant",
        content="wait",
        thinking="hm",
        tool_calls=(ToolCall(id="t1", name="clock", arguments='{"a":1}'),),
    )
    assert rows[3] == Message(role="tool", content="Error: broken", tool_name="clock", tool_call_id="t1")
    assert rows[4] == Message(role="user", content="go on")
    assert rows[5] == Message(role="tool", content="noon", tool_name="clock", tool_call_id="t1")
    assert rows[6] == Message(role="user", content="T\nD\nS\nR")
    assert len(rows) == 7


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "clock", "disable_parallel_tool_use": True}, NamedTool("clock")),
    ],
)
def test_tool_choice(choice: Any, expected: object) -> None:
    asked = prompt(tools=[CLOCK], tool_choice=choice)
    assert asked.tool_choice == expected
    assert asked.tools[0].parameters == {"type": "object"}
    assert asked.parallel_tool_calls == (not isinstance(expected, NamedTool))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": ""}, "model", "model is required"),
        ({"max_tokens": None}, "max_tokens", "required"),
        ({"max_tokens": 0}, "max_tokens", "between 1"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "robot"),
        (content({"type": "image", "source": {"type": "url", "url": "http://x"}}),
         "messages[0].content[0].source", "base64"),
        (content({"type": "image", "source": {"type": "base64", "media_type": "image/bmp"}}),
         "messages[0].content[0].source.media_type", "bmp"),
        (content({"type": "document", "source": {"type": "base64", "data": "x"}}),
         "messages[0].content[0].source", "PDF"),
        (content({"type": "server_tool_use"}), "messages[0].content[0].type", "server_tool_use"),
        (content({"type": "tool_result"}), "messages[0].content[0].tool_use_id", "required"),
        (content({"type": "tool_use", "id": "x"}, role="assistant"), "messages[0].content[0]", "id and name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "required"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "two tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "not in tools"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "maybe"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort", "huge"),
        ({"output_format": {"type": "xml"}}, "output_config.format", "json_schema"),
        ({"system": 5}, "system", "a string or an array"),
        ({"stop_sequences": "x"}, "stop_sequences", "an array"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


def test_counting_needs_no_max_tokens() -> None:
    body = {"model": "m", "messages": USER, "system": "s", "tools": [CLOCK]}
    call = parse_count_tokens(json.dumps(body).encode(), CONTEXT)
    asked = call.request.prompt
    assert isinstance(asked, ChatPrompt)
    assert (len(asked.messages), len(asked.tools)) == (2, 1)
    assert MessageTokensCount.model_validate_json(call.encode(12), strict=True).input_tokens == 12


# ── answers ─────────────────────────────────────────────────────────────────────────

TURN: tuple[Event, ...] = (
    Opened(prompt_tokens=7),
    Delta(thinking="hm"),
    Delta(text="a"),
    Delta(text="b"),
    Delta(tool_calls=(ToolCall(id="t1", name="clock", arguments='{"a"'),)),
    Delta(tool_calls=(ToolCall(id="t1", name="clock", arguments=":1}"),)),
    Delta(tool_calls=(ToolCall(id="t2", name="zone", arguments="", index=1),)),
    Finished(reason="stop", usage=USAGE),
)


def test_events_come_in_order_with_their_indexes() -> None:
    events = named_events(parse(stream=True), *TURN)
    assert [(name, body.get("index")) for name, body in events] == [
        ("message_start", None), ("ping", None),
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3), ("content_block_stop", 3),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert events[0][1]["message"]["usage"]["input_tokens"] == 7
    assert events[4][1]["delta"] == {"type": "signature_delta", "signature": ""}  # ends a thinking
    told = {"stop_reason": "tool_use", "stop_sequence": None, "stop_details": None, "container": None}
    assert events[-2][1]["delta"] == told
    assert events[-2][1]["usage"] == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 2},
    }


def test_a_message_has_what_typed_clients_want() -> None:
    call = parse()
    body = json.loads(b"".join(call.encoder.feed(0, event) for event in TURN))
    assert (body["container"], body["stop_details"]) == (None, None)
    usage = body["usage"]
    assert (usage["service_tier"], usage["inference_geo"]) == ("standard", "not_available")
    assert set(usage["cache_creation"].values()) == {0}
    assert body["content"][2]["caller"] == {"type": "direct"}
    assert body["content"][1] == {
        "type": "text",
        "text": "ab",
    }  # a null in `citations` is refused by the AI SDK
    back = {"role": "assistant", "content": body["content"][:3]}
    assert prompt(messages=[*USER, back]).messages[-1].tool_calls[0].name == "clock"


def test_a_whole_message() -> None:
    message = whole(parse(), *TURN)
    assert (message.id, message.stop_reason) == ("msg_r1", "tool_use")
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in message.content if block.type == "tool_use"] == [{"a": 1}, {}]


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        (Finished(reason="stop"), "end_turn", None),
        (Finished(reason="length"), "max_tokens", None),
        (Finished(reason="stop", stop_sequence="END"), "stop_sequence", "END"),
        (Finished(reason="stop", stop_sequence="<|im_end|>"), "end_turn", None),
    ],
)
def test_stop_reasons(finished: Finished, reason: str, sequence: str | None) -> None:
    for message in (
        whole(parse(stop_sequences=["END"]), Delta(text="a"), finished),
        accumulated(parse(stop_sequences=["END"], stream=True), Delta(text="a"), finished),
    ):
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_arguments_that_are_not_whole() -> None:
    call = Delta(tool_calls=(ToolCall(id="t1", name="clock", arguments='{"a'),))
    cut = whole(parse(), call, Finished(reason="length"))
    assert cut.stop_reason == "max_tokens"
    assert [block.input for block in cut.content if block.type == "tool_use"] == [{}]
    with pytest.raises(EngineError, match='"clock"'):
        whole(parse(), call, Finished(reason="stop"))


def test_a_failure_ends_the_stream() -> None:
    call = parse(stream=True)
    events = named_events(call, Delta(text="a"), Failed(RunnerDied("gone")))
    assert events[-1] == (
        "error",
        {
            "type": "error",
            "error": {"type": "api_error", "message": "gone", "code": "runner_died"},
            "request_id": "r1",
        },
    )
    assert call.encoder.feed(0, Delta(text="late")) == b""


inputs = st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2)
deltas = st.one_of(
    st.builds(Delta, text=st.text(max_size=8), thinking=st.text(max_size=4)),
    st.builds(
        lambda index, value: Delta(
            tool_calls=(ToolCall(id=f"t{index}", name=f"f{index}", arguments=json.dumps(value), index=index),)
        ),
        st.integers(0, 10_000),
        inputs,
    ),
)


@settings(deadline=None)  # a busy machine is not a defect
@given(
    st.lists(
        deltas, max_size=12, unique_by=lambda row: row.tool_calls[0].index if row.tool_calls else object()
    ),
    st.sampled_from(["stop", "length", "tool_calls"]),
)
def test_stream_and_whole_agree(rows: list[Delta], reason: Any) -> None:
    """The official accumulator takes every sequence and ends with the non-streaming body."""
    events: list[Event] = [Opened(), *rows, Finished(reason=reason, usage=USAGE)]
    message = whole(parse(), *events)
    assert accumulated(parse(stream=True), *events).model_dump() == message.model_dump()
    assert "".join(b.text for b in message.content if b.type == "text") == "".join(r.text for r in rows)
    assert "".join(b.thinking for b in message.content if b.type == "thinking") == "".join(
        row.thinking for row in rows
    )
    assert [json.dumps(b.input) for b in message.content if b.type == "tool_use"] == [
        call.arguments for row in rows for call in row.tool_calls
    ]


# ── errors ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Invalid("x"), 400, "invalid_request_error"),
        (Unauthenticated("x"), 401, "authentication_error"),
        (Forbidden("x"), 403, "permission_error"),
        (ModelNotFound("x"), 404, "not_found_error"),
        (BodyTooLarge("x"), 413, "request_too_large"),
        (QueueFull("x"), 429, "rate_limit_error"),
        (Unavailable("x"), 503, "overloaded_error"),
        (RunnerDied("x"), 502, "api_error"),
    ],
)
def test_error_bodies(error: OllamaDistributedError, status: int, kind: str) -> None:
    answer = render_error(error, RequestId("r1"))
    assert answer.status == status
    assert json.loads(answer.body) == {
        "type": "error",
        "error": {"type": kind, "message": "x", "code": error.code},
        "request_id": "r1",
    }


def test_routes() -> None:
    assert [route.path for route in ROUTES] == ["/v1/messages", "/v1/messages/count_tokens"]


def test_tools_that_anthropic_runs_itself_are_left_out_beside_others() -> None:
    mine = {"name": "clock", "input_schema": {"type": "object"}}
    searching = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    asked = prompt(tools=[searching, mine, mine | {"name": "zone", "type": "custom"}])
    assert [tool.name for tool in asked.tools] == ["clock", "zone"]
