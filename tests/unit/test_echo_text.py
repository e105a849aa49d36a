"""What the echo engine says."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import JsonObject, JsonSchema, Message, NamedTool, Tool, ToolCall
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest
from ollama_distributed.testing import echo_text

WEATHER = Tool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city", "days"],
    },
)
CLOCK = Tool(name="clock")


def user(text: str) -> Message:
    return Message(role="user", content=text)


@given(st.text())
def test_tokens_are_reversible(text: str) -> None:
    ids = echo_text.tokenize(text)
    assert echo_text.detokenize(ids).decode() == text
    assert echo_text.count_tokens(text.encode()) == len(ids)
    assert all(0 < i < 2**31 for i in ids)


@given(st.text(min_size=1), st.data())
def test_an_answer_goes_on_from_the_emitted_ids(text: str, data: st.DataObject) -> None:
    ids = echo_text.tokenize(text)
    done = data.draw(st.integers(0, len(ids)))
    rendered = echo_text.render([user(text)])
    _, rest = echo_text.answer_to(CompletionRequest(prompt=(rendered, tuple(ids[:done]))))
    assert [echo_text.token_id(chunk) for chunk in echo_text.chunks(rest)] == ids[done:]
    as_ids = (*echo_text.tokenize(rendered), *ids[:done])
    assert echo_text.answer_to(CompletionRequest(prompt=as_ids))[1] == rest


@pytest.mark.parametrize("token", [0, 7, 4 << 24, 1 << 24 | 0x1FF, -1])
def test_foreign_ids_are_refused(token: int) -> None:
    with pytest.raises(Invalid):
        echo_text.token_bytes(token)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("plain text", "plain text"),
        (echo_text.render([user("hi"), Message(role="assistant", content="hi"), user("bye")]), "bye"),
        (echo_text.render([user("hi"), Message(role="tool", content="42")]), "42"),
        (echo_text.render([Message(role="user", content="see", images=(b"png",))]), "see"),
        ("", ""),
    ],
)
def test_it_echoes_the_last_turn(prompt: str, answer: str) -> None:
    assert echo_text.answer_to(CompletionRequest(prompt=prompt))[1].decode() == answer


def test_hash_tokens_are_many_and_stable() -> None:
    _, first = echo_text.answer_to(CompletionRequest(prompt="a"), hash_tokens=100)
    assert first == echo_text.answer_to(CompletionRequest(prompt="a"), hash_tokens=100)[1]
    assert first != echo_text.answer_to(CompletionRequest(prompt="b"), hash_tokens=100)[1]
    assert echo_text.count_tokens(first) == 100


def test_formats() -> None:
    _, answer = echo_text.answer_to(CompletionRequest(prompt="hi", format=JsonObject()))
    assert json.loads(answer) == {"echo": "hi"}
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "number"},
            "s": {"type": "string", "minLength": 2},
            "kind": {"enum": ["a", "b"]},
            "many": {"type": "array", "minItems": 2, "items": {"type": "boolean"}},
            "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]},
            "one": {"const": 1},
            "nested": {"properties": {"x": {"type": ["integer", "null"]}}, "required": ["x"]},
        },
        "required": ["n", "s", "kind", "many", "maybe", "one", "nested"],
    }
    _, answer = echo_text.answer_to(CompletionRequest(prompt="hi", format=JsonSchema(schema)))
    jsonschema.validate(json.loads(answer), schema)


def calls(request: ChatRequest) -> list[tuple[str, str]]:
    answer = echo_text.chat_answer(request)
    assert not isinstance(answer, str)
    assert [call.index for call in answer] == list(range(len(answer)))
    return [(call.name, call.arguments) for call in answer]


def test_tool_calls() -> None:
    two = ChatRequest(messages=(user('call weather {"city": "Bonn"}\ncall clock'),), tools=(WEATHER, CLOCK))
    assert calls(two) == [("weather", '{"city": "Bonn"}'), ("clock", "{}")]
    reminded = (*two.messages, Message(role="system", content="it is late"))
    assert calls(ChatRequest(messages=reminded, tools=two.tools)) == calls(two)
    one = ChatRequest(messages=two.messages, tools=two.tools, parallel_tool_calls=False)
    assert calls(one) == [("weather", '{"city": "Bonn"}')]
    none = ChatRequest(messages=two.messages, tools=two.tools, tool_choice="none")
    assert echo_text.chat_answer(none) == two.messages[0].content
    unknown = ChatRequest(messages=(user("call nothing {}"),), tools=two.tools)
    assert echo_text.chat_answer(unknown) == "call nothing {}"
    named = ChatRequest(messages=(user("hi"),), tools=two.tools, tool_choice=NamedTool("clock"))
    assert calls(named) == [("clock", "{}")]
    required = ChatRequest(messages=(user("hi"),), tools=two.tools, tool_choice="required")
    ((name, arguments),) = calls(required)
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), dict(WEATHER.parameters))


def test_a_tool_result_is_echoed() -> None:
    call = ToolCall(id="1", name="clock", arguments="{}")
    messages = (
        user("call clock"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="noon"),
    )
    assert echo_text.chat_answer(ChatRequest(messages=messages, tools=(CLOCK,))) == "noon"


def test_vectors_of_near_texts_are_near() -> None:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(map(float.__mul__, a, b)) / math.hypot(*a) / math.hypot(*b)

    base, near, far = (
        echo_text.vector(t, 256) for t in ("the red cat sat", "a red cat sat", "stock prices fell")
    )
    assert cosine(base, near) > cosine(base, far) + 0.3
    assert echo_text.relevance("red cat", "the red cat") > echo_text.relevance("red cat", "the dog") == 0.0
