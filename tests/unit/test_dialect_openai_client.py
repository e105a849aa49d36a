"""The official OpenAI client against the dialect, without a socket: its own requests are
parsed by us, our bytes by it. What the model says is scripted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from ollama_distributed.base.errors import ModelNotFound, OllamaDistributedError, RunnerDied
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    EmbedResult,
    Event,
    Failed,
    Finished,
    InferenceRequest,
    JsonSchema,
    Opened,
    ToolCall,
    Usage,
)
from ollama_distributed.gateway.dialects import openai as dialect
from ollama_distributed.gateway.dialects import responses
from ollama_distributed.gateway.dialects.contract import CountTokens, Embed, Generate, RequestContext

ROUTES = {route.path: route for route in (*dialect.ROUTES, *responses.ROUTES)}
USAGE = Usage(prompt_tokens=7, completion_tokens=5)
HELLO: tuple[Event, ...] = (
    Opened(),
    Delta(thinking="hm"),
    Delta(text="Hel"),
    Delta(text="lo"),
    Finished(reason="stop", usage=USAGE),
)
CALL: tuple[Event, ...] = (
    Opened(),
    Delta(tool_calls=(ToolCall(id="c1", name="get_weather", arguments='{"city":'),)),
    Delta(tool_calls=(ToolCall(id="c1", name="", arguments='"Rome"}'),)),
    Finished(reason="tool_calls", usage=USAGE),
)
Ask = Callable[..., OpenAI]


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
        if isinstance(call, Embed):
            vectors = tuple((0.5, -0.25) for _ in call.request.inputs)
            return httpx2.Response(200, content=call.encode(EmbedResult(vectors=vectors)))
        if isinstance(call, CountTokens):
            return httpx2.Response(200, content=call.encode(42))
        assert isinstance(call, Generate)
        self.asked = call.requests[0]
        body = b"".join(
            call.encoder.feed(index, event) for event in self.events for index in range(len(call.requests))
        )
        return httpx2.Response(200, content=body, headers={"content-type": call.encoder.content_type})


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def client(wire: Wire) -> Any:
    transport = httpx2.MockTransport(wire)
    with OpenAI(
        base_url="http://node/v1", api_key="k", max_retries=0, http_client=httpx2.Client(transport=transport)
    ) as client:
        yield client


TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
USER: Any = [{"role": "user", "content": "hi"}]


class Pet(BaseModel):
    name: str


def test_chat(client: OpenAI, wire: Wire) -> None:
    answer = client.chat.completions.create(
        model="m", messages=USER, n=2, max_completion_tokens=5, extra_body={"options": {"num_ctx": 64}}
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].message.reasoning == "hm"  # type: ignore[attr-defined]
    assert wire.asked is not None
    assert (wire.asked.options.num_ctx, wire.asked.sampling.num_predict) == (64, 5)


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 12


def test_chat_stream_helper_collects_tool_calls(client: OpenAI, wire: Wire) -> None:
    wire.events = CALL
    with client.chat.completions.stream(
        model="m", messages=USER, tools=[TOOL], tool_choice="required"
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    assert wire.asked is not None
    assert isinstance(wire.asked.prompt, ChatPrompt)
    assert wire.asked.prompt.tool_choice == "required"


def test_the_clients_own_messages_go_back_in(client: OpenAI, wire: Wire) -> None:
    wire.events = CALL
    message = client.chat.completions.create(model="m", messages=USER, tools=[TOOL]).choices[0].message
    wire.events = HELLO
    client.chat.completions.create(
        model="m", messages=[*USER, message, {"role": "tool", "tool_call_id": "c1", "content": "sun"}]
    )
    assert wire.asked is not None
    assert isinstance(wire.asked.prompt, ChatPrompt)
    assert [row.role for row in wire.asked.prompt.messages] == ["user", "assistant", "tool"]
    assert wire.asked.prompt.messages[2].tool_name == "get_weather"


def test_parsed_output(client: OpenAI, wire: Wire) -> None:
    wire.events = (Delta(text='{"name":"Rex"}'), Finished(reason="stop"))
    parsed = client.chat.completions.parse(model="m", messages=USER, response_format=Pet)
    assert parsed.choices[0].message.parsed == Pet(name="Rex")
    assert wire.asked is not None
    assert isinstance(wire.asked.format, JsonSchema)
    assert wire.asked.format.schema["required"] == ["name"]


@pytest.mark.parametrize("call", ["chat", "completions", "responses"])
def test_a_failure_in_a_stream_raises(client: OpenAI, wire: Wire, call: str) -> None:
    wire.events = (Opened(), Delta(text="a"), Failed(RunnerDied("the runner died")))
    if call == "responses":
        *_, last = client.responses.create(model="m", input="hi", stream=True)
        assert last.type == "response.failed"
        return
    stream: Any = (
        client.chat.completions.create(model="m", messages=USER, stream=True)
        if call == "chat"
        else client.completions.create(model="m", prompt="hi", stream=True)
    )
    with pytest.raises(openai.APIError, match="the runner died"):
        list(stream)


def test_refusals_raise_the_right_class(client: OpenAI, wire: Wire) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=USER, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_request")
    wire.error = ModelNotFound("model 'x' not found")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="x", messages=USER)
    assert missing.value.code == "model_not_found"


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="m", prompt=["a", "b"], echo=True)
    assert [choice.text for choice in answer.choices] == ["aHello", "bHello"]
    stream = client.completions.create(model="m", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_embeddings_decode_from_base64_by_default(client: OpenAI) -> None:
    answer = client.embeddings.create(model="m", input=["a", "b"])
    assert [row.embedding for row in answer.data] == [[0.5, -0.25], [0.5, -0.25]]
    plain = client.embeddings.create(model="m", input=[[1, 2]], encoding_format="float")
    assert plain.data[0].embedding == [0.5, -0.25]


def test_responses(client: OpenAI, wire: Wire) -> None:
    answer = client.responses.create(
        model="m", input="hi", instructions="be brief", reasoning={"effort": "low"}
    )
    assert (answer.output_text, answer.status) == ("Hello", "completed")
    # What came out goes back in, as a stateless caller does it.
    again: Any = [{"role": "user", "content": "hi"}, *answer.output, {"role": "user", "content": "more"}]
    client.responses.create(model="m", input=again)
    assert wire.asked is not None
    assert isinstance(wire.asked.prompt, ChatPrompt)
    assert [(row.role, row.thinking, row.content) for row in wire.asked.prompt.messages] == [
        ("user", "", "hi"),
        ("assistant", "hm", "Hello"),
        ("user", "", "more"),
    ]


def test_input_tokens(client: OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="m", input="hi", instructions="s")
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 42)


def test_responses_stream_helper(client: OpenAI, wire: Wire) -> None:
    wire.events = CALL
    tool: Any = {"type": "function", "name": "get_weather", "parameters": {}, "strict": False}
    with client.responses.stream(model="m", input="hi", tools=[tool]) as stream:
        item = stream.get_final_response().output[0]
    assert item.type == "function_call"
    assert json.loads(item.arguments) == {"city": "Rome"}


def test_responses_parsed_output(client: OpenAI, wire: Wire) -> None:
    wire.events = (Delta(text='{"name":"Rex"}'), Finished(reason="stop"))
    assert client.responses.parse(model="m", input="hi", text_format=Pet).output_parsed == Pet(name="Rex")
    assert wire.asked is not None
    assert isinstance(wire.asked.format, JsonSchema)
