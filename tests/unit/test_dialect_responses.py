"""OpenAI responses: request JSON -> internal request; events -> what the official client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ollama_distributed.base.errors import Invalid, QueueFull, RunnerDied, Unsupported
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    Event,
    Failed,
    Finished,
    JsonSchema,
    Message,
    NamedTool,
    Opened,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.responses import parse_responses

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.5)
USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5, reasoning_tokens=2)
CLOCK = {"type": "function", "name": "clock", "parameters": {"type": "object"}, "strict": True}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parse(**fields: Any) -> Generate:
    return parse_responses(json.dumps({"model": "m", "input": "hi"} | fields).encode(), CONTEXT)


def prompt(**fields: Any) -> ChatPrompt:
    asked = parse(**fields).requests[0].prompt
    assert isinstance(asked, ChatPrompt)
    return asked


def stream_events(call: Generate, *events: Event) -> list[Any]:
    out = b"".join(call.encoder.feed(0, event) for event in events).decode()
    found = []
    for number, block in enumerate(out.split("\n\n")[:-1]):
        name, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        assert body["sequence_number"] == number
        found.append(EVENT.validate_json(data.removeprefix("data: ")))
    return found


def whole(call: Generate, *events: Event) -> Response:
    return Response.model_validate_json(b"".join(call.encoder.feed(0, event) for event in events))


# ── requests ────────────────────────────────────────────────────────────────────────


def test_a_plain_request() -> None:
    request = parse(
        instructions="be brief",
        max_output_tokens=9,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "s", "schema": {"a": 1}, "strict": True}},
        options={"num_ctx": 99},
        store=True,
        metadata={"a": "b"},
    ).requests[0]
    assert request.prompt == ChatPrompt(
        messages=(Message(role="system", content="be brief"), Message(role="user", content="hi"))
    )
    assert (request.sampling.num_predict, request.sampling.temperature, request.sampling.top_p) == (
        9,
        1.0,
        1.0,
    )
    assert (request.think, request.format, request.options.num_ctx) == ("low", JsonSchema({"a": 1}), 99)


def test_a_whole_assistant_turn_becomes_one_message() -> None:
    rows = prompt(
        input=[
            {"role": "developer", "content": "d"},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "see"},
                {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"}]},
            {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "id": "msg", "status": "completed",
             "content": [{"type": "output_text", "text": "wait", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "zone", "arguments": ""},
            {"type": "function_call_output", "call_id": "c2", "output": "noon"},
            {"type": "function_call_output", "call_id": "c1", "output": [
                {"type": "input_text", "text": "x"}]},
            {"role": "assistant", "content": "done"},
            {"role": "user", "content": "thanks"},
        ]
    ).messages  # fmt: skip
    assert [row.role for row in rows] == ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert rows[1].images == (b"hi",)
    assert rows[2] == Message(
        role="assistant",
        content="wait",
        thinking="hm",
        tool_calls=(
            ToolCall(id="c1", name="clock", arguments="{}", index=0),
            ToolCall(id="c2", name="zone", arguments="{}", index=1),
        ),
    )
    assert rows[3] == Message(role="tool", content="noon", tool_name="zone", tool_call_id="c2")
    assert rows[4].tool_name == "clock"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "name": "clock"}, NamedTool("clock")),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]},
            "required",
        ),
    ],
)
def test_tool_choice_comes_back_as_it_was_asked(choice: Any, expected: object) -> None:
    call = parse(tools=[CLOCK], tool_choice=choice)
    asked = call.requests[0].prompt
    assert isinstance(asked, ChatPrompt)
    assert asked.tool_choice == expected
    answer = json.loads(call.encoder.feed(0, Finished(reason="stop")))
    assert answer["tool_choice"] == choice


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stateless"),
        ({"conversation": "c"}, "conversation", "stateless"),
        ({"background": True}, "background", "stateless"),
        ({"prompt": {"id": "p"}}, "prompt", "stateless"),
        ({"input": None}, "input", "required"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "itself"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "robot"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "not in tools"),
        ({"max_output_tokens": 0}, "max_output_tokens", "between 1"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
        ({"model": None}, "model", "required"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(("asked", "cut"), [(None, True), ("auto", True), ("disabled", False)])
def test_truncation(asked: str | None, cut: bool) -> None:
    assert parse(truncation=asked).requests[0].truncate == cut


def test_stateless_fields_that_ask_for_nothing_pass() -> None:
    assert parse(background=False, previous_response_id=None, conversation=None).requests


# ── answers ─────────────────────────────────────────────────────────────────────────

TURN: tuple[Event, ...] = (
    Opened(),
    Delta(thinking="hm"),
    Delta(text="a"),
    Delta(text="b"),
    Delta(tool_calls=(ToolCall(id="c1", name="clock", arguments='{"a"'),)),
    Delta(tool_calls=(ToolCall(id="c1", name="clock", arguments=":1}"),)),
    Finished(reason="stop", usage=USAGE),
)


def test_events_come_in_order() -> None:
    events = stream_events(parse(stream=True, tools=[CLOCK]), *TURN)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message", "function_call"]
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens == 2


def test_a_whole_response() -> None:
    answer = whole(parse(tools=[CLOCK], metadata={"k": "v"}), *TURN)
    assert (answer.id, answer.status, answer.output_text) == ("resp_r1", "completed", "ab")
    assert answer.metadata == {"k": "v"}
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.usage.input_tokens_details.cached_tokens) == (12, 3)
    call = answer.output[2]
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments) == ("c1", "clock", '{"a":1}')


def test_a_response_has_all_that_open_responses_demands() -> None:
    asked = {"max_tool_calls": 3, "prompt_cache_key": "k", "safety_identifier": "s", "frequency_penalty": 0.5}
    for fields, told in (({}, [0, 0, None, None, None]), (asked, [0, 0.5, 3, "k", "s"])):
        answer = whole(parse(**fields), Delta(text="a"), Finished(reason="stop", usage=USAGE)).model_dump()
        names = ("presence_penalty", "frequency_penalty", "max_tool_calls", "prompt_cache_key")
        assert [answer[name] for name in (*names, "safety_identifier")] == told
        assert answer["service_tier"] == "default"


def test_the_response_shows_the_sampling_that_was_used() -> None:
    call = parse(top_p=0.5, options={"temperature": 0.2, "num_predict": 7})
    answer = whole(call, Delta(text="a"), Finished(reason="stop"))
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.2, 0.5, 7)


def test_a_cut_answer_is_incomplete() -> None:
    events = stream_events(parse(stream=True), Delta(text="a"), Finished(reason="length", usage=USAGE))
    assert events[-1].type == "response.incomplete"
    response = events[-1].response
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunnerDied("gone"), "server_error"),
        (QueueFull("busy"), "rate_limit_exceeded"),
        (Invalid("x"), "invalid_prompt"),
    ],
)
def test_a_failure_ends_the_stream(error: Invalid, code: str) -> None:
    call = parse(stream=True)
    events = stream_events(call, Delta(text="a"), Failed(error))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == code
    assert events[-1].response.error.message == error.message
    assert call.encoder.feed(0, Delta(text="late")) == b""


def test_logprobs_ride_on_the_text() -> None:
    token = TokenLogprob("a", -1.0, b"a", (TopLogprob("b", -2.0, b"b"),))
    call = parse(stream=True, top_logprobs=1, include=["message.output_text.logprobs"])
    assert (call.requests[0].logprobs, call.requests[0].top_logprobs) == (True, 1)
    events = stream_events(call, Delta(text="a", logprobs=(token,)), Finished(reason="stop"))
    delta = next(event for event in events if event.type == "response.output_text.delta")
    assert delta.logprobs[0].top_logprobs[0].token == "b"
    assert events[-1].response.output[0].content[0].logprobs[0].bytes == [97]


def test_functions_of_a_namespace_come_back_with_it() -> None:
    call = parse(tools=[{"type": "namespace", "name": "mcp", "description": "d", "tools": [CLOCK]}])
    event = Delta(tool_calls=(ToolCall(id="c1", name="clock", arguments="{}"),))
    assert whole(call, event, Finished(reason="stop")).output[0].namespace == "mcp"  # type: ignore[union-attr]


deltas = st.one_of(
    st.builds(Delta, text=st.text(max_size=8), thinking=st.text(max_size=4)),
    st.builds(
        lambda index, arguments: Delta(
            tool_calls=(ToolCall(id=f"c{index}", name=f"f{index}", arguments=arguments, index=index),)
        ),
        st.integers(0, 2),
        st.text(max_size=5),
    ),
)


@settings(deadline=None)  # a busy machine is not a defect
@given(st.lists(deltas, max_size=12), st.sampled_from(["stop", "length", "tool_calls"]))
def test_stream_and_whole_agree(rows: list[Delta], reason: Any) -> None:
    """The official accumulator takes every sequence and ends with the non-streaming body."""
    events: list[Event] = [Opened(), *rows, Finished(reason=reason, usage=USAGE)]
    encoder = parse().encoder
    plain = json.loads(b"".join(encoder.feed(0, event) for event in events))
    Response.model_validate(plain)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    found = stream_events(parse(stream=True), *events)
    text = ""
    for event in found:
        for seen in state.handle_event(event):
            text += seen.delta if seen.type == "response.output_text.delta" else ""
    assert text == "".join(row.text for row in rows)
    last = found[-1].response.to_dict()
    assert last["output"] == plain["output"]
    assert last["status"] == plain["status"]
    for item in plain["output"]:
        if item["type"] == "function_call":
            parts = [c.arguments for row in rows for c in row.tool_calls if c.id == item["call_id"]]
            assert item["arguments"] == ("".join(parts) or "{}")


def test_tools_that_openai_runs_itself_are_left_out_beside_functions() -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    hosted = [{"type": "web_search"}, {"type": "local_shell"}]
    request = parse(tools=[*hosted, function]).requests[0]
    assert [tool.name for tool in request.prompt.tools] == ["f"]
    with pytest.raises(Unsupported, match="web_search"):
        parse(tools=hosted)


# ── custom tools ────────────────────────────────────────────────────────────────────

PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: TEXT"},
}


def test_a_custom_tool_is_a_function_of_one_text() -> None:
    called = {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": 'a "b"'}
    result = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
    asked = prompt(
        input=[{"role": "user", "content": "go"}, called, result],
        tools=[PATCH, CLOCK],
        tool_choice={"type": "custom", "name": "apply_patch"},
    )
    patch, clock = asked.tools
    assert patch.parameters["required"] == ["input"]
    assert "start: TEXT" in patch.description
    assert clock.name == "clock"
    assert asked.tool_choice == NamedTool("apply_patch")
    assert json.loads(asked.messages[1].tool_calls[0].arguments) == {"input": 'a "b"'}
    assert asked.messages[2] == Message(
        role="tool", content="done", tool_name="apply_patch", tool_call_id="c1"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "*** Begin"}', "*** Begin"),
        ("*** Begin", "*** Begin"),
        ('{"patch": 1}', '{"patch": 1}'),
        ("", ""),
    ],
)
def test_a_call_of_a_custom_tool_is_told_as_its_text(arguments: str, text: str) -> None:
    rows = [
        Delta(tool_calls=(ToolCall(id="c1", name="apply_patch", arguments=arguments[:6]),)),
        Delta(tool_calls=(ToolCall(id="", name="", arguments=arguments[6:]),)),
        Delta(tool_calls=(ToolCall(id="c2", name="clock", arguments="{}", index=1),)),
    ]
    events: list[Event] = [Opened(), *rows, Finished(reason="tool_calls", usage=USAGE)]
    body = whole(parse(tools=[PATCH, CLOCK]), *events)
    custom, plain = body.output
    assert custom.type == "custom_tool_call"
    assert (custom.call_id, custom.name, custom.input) == ("c1", "apply_patch", text)
    assert plain.type == "function_call"
    assert body.tools[0].to_dict() == PATCH
    found = stream_events(parse(stream=True, tools=[PATCH, CLOCK]), *events)
    assert found[-1].response.output == body.output
    told = [event.delta for event in found if event.type == "response.custom_tool_call_input.delta"]
    assert told == [text]
    assert [event.input for event in found if event.type == "response.custom_tool_call_input.done"] == [text]


def test_tools_that_come_as_input_are_offered_too() -> None:
    """As Codex sends them for its newest models: a namespace with functions and custom tools."""
    grouped = {"type": "namespace", "name": "functions", "description": "d", "tools": [PATCH, CLOCK]}
    items = [
        {"type": "additional_tools", "role": "developer", "tools": [grouped]},
        {"role": "user", "content": "go"},
    ]
    asked = prompt(input=items)
    assert [tool.name for tool in asked.tools] == ["apply_patch", "clock"]
    assert asked.messages == (Message(role="user", content="go"),)
    call = Delta(tool_calls=(ToolCall(id="c1", name="apply_patch", arguments='{"input": "x"}'),))
    body = whole(parse(input=items), call, Finished(reason="tool_calls", usage=USAGE))
    assert body.output[0].type == "custom_tool_call"
    assert (body.output[0].input, body.output[0].to_dict()["namespace"]) == ("x", "functions")
