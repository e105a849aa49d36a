"""The official Anthropic client against the dialect, without a socket: its own requests are
parsed by us, our bytes by it. What the model says is scripted."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic

from ollama_distributed.base.errors import ModelNotFound, OllamaDistributedError, QueueFull, RunnerDied
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
    Opened,
    ToolCall,
    Usage,
)
from ollama_distributed.gateway.dialects import anthropic as dialect
from ollama_distributed.gateway.dialects.contract import CountTokens, Generate, RequestContext

ROUTES = {route.path: route for route in dialect.ROUTES}
USAGE = Usage(prompt_tokens=7, cached_tokens=2, completion_tokens=5)
HELLO: tuple[Event, ...] = (
    Opened(prompt_tokens=7),
    Delta(thinking="hm"),
    Delta(text="Hel"),
    Delta(text="lo"),
    Finished(reason="stop", usage=USAGE),
)
CALL: tuple[Event, ...] = (
    Opened(),
    Delta(text="wait"),
    Delta(tool_calls=(ToolCall(id="t1", name="get_weather", arguments='{"city":'),)),
    Delta(tool_calls=(ToolCall(id="t1", name="", arguments='"Rome"}'),)),
    Finished(reason="tool_calls", usage=USAGE),
)
USER: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {}}}}


class Wire:
    """Answers the client's requests with scripted events; keeps what was asked."""

    def __init__(self) -> None:
        self.events: tuple[Event, ...] = HELLO
        self.error: OllamaDistributedError | None = None
        self.asked: InferenceRequest | None = None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        route = ROUTES[request.url.path]
        context = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1.7e9)
        try:
            if self.error is not None:
                raise self.error
            call = route.parse(request.read(), context)
        except OllamaDistributedError as exc:
            refused = route.render_error(exc, context.request_id)
            return httpx2.Response(refused.status, content=refused.body, headers=dict(refused.headers))
        if isinstance(call, CountTokens):
            return httpx2.Response(200, content=call.encode(42))
        assert isinstance(call, Generate)
        self.asked = call.requests[0]
        body = b"".join(call.encoder.feed(0, event) for event in self.events)
        return httpx2.Response(200, content=body, headers={"content-type": call.encoder.content_type})


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def client(wire: Wire) -> Any:
    transport = httpx2.MockTransport(wire)
    with Anthropic(
        base_url="http://node", api_key="k", max_retries=0, http_client=httpx2.Client(transport=transport)
    ) as client:
        yield client


def test_messages(client: Anthropic, wire: Wire) -> None:
    answer = client.messages.create(
        model="m", max_tokens=9, messages=USER, system="s", extra_body={"options": {"num_ctx": 64}}
    )
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (7, 0)
    assert wire.asked is not None
    assert wire.asked.options.num_ctx == 64


def test_message_stream(client: Anthropic) -> None:
    with client.messages.stream(model="m", max_tokens=9, messages=USER) as stream:
        assert "".join(stream.text_stream) == "Hello"
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 5)


def test_tools_and_the_way_back(client: Anthropic, wire: Wire) -> None:
    wire.events = CALL
    with client.messages.stream(
        model="m", max_tokens=9, messages=USER, tools=[TOOL], tool_choice={"type": "any"}
    ) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    call = final.content[1]
    assert call.type == "tool_use"
    assert (call.id, call.input) == ("t1", {"city": "Rome"})

    wire.events = HELLO
    result: Any = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sun"}],
    }
    history: Any = [*USER, {"role": "assistant", "content": final.content}, result]
    client.messages.create(model="m", max_tokens=9, messages=history, tools=[TOOL])
    assert wire.asked is not None
    assert isinstance(wire.asked.prompt, ChatPrompt)
    assert [(row.role, row.content) for row in wire.asked.prompt.messages] == [
        ("user", "hi"),
        ("assistant", "wait"),
        ("tool", "sun"),
    ]
    assert wire.asked.prompt.messages[2].tool_name == "get_weather"


def test_structured_output(client: Anthropic, wire: Wire) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.messages.create(
        model="m",
        max_tokens=9,
        messages=USER,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert wire.asked is not None
    assert wire.asked.format == JsonSchema(schema)


def test_count_tokens(client: Anthropic) -> None:
    assert client.messages.count_tokens(model="m", messages=USER, tools=[TOOL]).input_tokens == 42


def test_a_failure_in_a_stream_raises(client: Anthropic, wire: Wire) -> None:
    wire.events = (Opened(), Delta(text="a"), Failed(RunnerDied("the runner died")))
    with (
        pytest.raises(anthropic.APIError, match="the runner died"),
        client.messages.stream(model="m", max_tokens=9, messages=USER) as stream,
    ):
        stream.get_final_message()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModelNotFound("model 'x' not found"), anthropic.NotFoundError),
        (QueueFull("busy"), anthropic.RateLimitError),
    ],
)
def test_refusals_raise_the_right_class(
    client: Anthropic, wire: Wire, error: OllamaDistributedError, kind: type[Exception]
) -> None:
    wire.error = error
    with pytest.raises(kind, match=error.message):
        client.messages.create(model="x", max_tokens=9, messages=USER)
