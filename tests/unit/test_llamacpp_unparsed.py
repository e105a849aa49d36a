"""Chats that llama-server cannot take apart (`llamacpp.unparsed`, and demanded calls)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ollama_distributed.adapters.engines.llamacpp.chat import ChatStream
from ollama_distributed.adapters.engines.llamacpp.enforced import WantedCalls
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.adapters.engines.llamacpp.unparsed import FormattedChat, SpokenChat
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Progress

PARSER = {
    "code": 500,
    "message": "The model produced output that does not match the expected peg-native format",
}
OTHER = {"code": 500, "message": "Compute error."}
CALL = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}
READ = msgspec.json.encode({"prompt_progress": {"total": 5, "processed": 5, "cache": 0}})


def delta(**fields: Any) -> bytes:
    return msgspec.json.encode({"choices": [{"index": 0, "delta": fields}]})


def error(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"error": body})


def formatted(*events: bytes) -> tuple[list[EngineEvent], int]:
    """What is passed on, and how often it was given up."""
    given_up: list[None] = []
    stream = FormattedChat(ChatStream(), lambda: given_up.append(None))
    return [event for data in events for event in stream.feed(data)], len(given_up)


@pytest.mark.parametrize(
    "before", [[], [READ], [READ, delta(role="assistant", content=None, reasoning_content="hm")]]
)
def test_what_was_not_told_yet_is_given_up_once_and_heard_no_more(before: list[bytes]) -> None:
    events, given_up = formatted(*before, error(PARSER), delta(content="late"), error(PARSER))
    assert given_up == 1
    assert len(events) == len(before)
    assert all(type(event) is Progress or (type(event) is ChatDelta and event.thinking) for event in events)


@pytest.mark.parametrize("told", [delta(content="Yes"), delta(tool_calls=[CALL])])
def test_what_was_told_is_not_told_again(told: bytes) -> None:
    events, given_up = formatted(told, error(PARSER))
    assert given_up == 0
    assert isinstance(events[-1], EngineFailed)


def test_another_error_is_an_error() -> None:
    events, given_up = formatted(READ, error(OTHER))
    assert given_up == 0
    assert isinstance(events[-1], EngineFailed)


def test_a_completion_is_told_as_a_chat() -> None:
    stream = SpokenChat(CompletionStream())
    chunks = [
        {"content": "Hel", "tokens": [5], "stop": False, "tokens_predicted": 1},
        {"content": "lo", "tokens": [6], "stop": False, "tokens_predicted": 2},
        {"content": "", "stop": True, "stop_type": "eos", "tokens_predicted": 3, "tokens_evaluated": 4},
    ]
    assert (
        stream.feed(msgspec.json.encode({"prompt_progress": {"total": 4, "processed": 4, "cache": 0}})) == []
    )
    events = [event for chunk in chunks for event in stream.feed(msgspec.json.encode(chunk))]
    assert "".join(event.text for event in events if type(event) is ChatDelta) == "Hello"
    assert type(events[-1]) is Done
    assert all(type(event) in (ChatDelta, Done) for event in events)


def test_a_demanded_call_that_is_none_is_enforced() -> None:
    refused: list[None] = []
    stream = WantedCalls(lambda: refused.append(None))
    assert stream.feed(error(PARSER)) == []
    assert refused == [None]
    assert stream.feed(delta(content="late")) == []


def test_a_call_that_was_told_is_not_enforced_again() -> None:
    refused: list[None] = []
    stream = WantedCalls(lambda: refused.append(None))
    events = [*stream.feed(delta(tool_calls=[CALL])), *stream.feed(error(PARSER))]
    assert refused == []
    assert isinstance(events[-1], EngineFailed)
