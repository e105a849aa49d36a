"""POST /v1/messages: the answer, whole or as events in the order that the clients need.

`message_start`, `ping`, then for each block start, deltas, stop, then `message_delta`
with the stop reason and all usage, and `message_stop`. One block is open at a time.
Source: Anthropic API reference "Streaming messages".
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.inference import Delta, Event, Failed, Finished, Opened, ToolCall, Usage
from ollama_distributed.gateway.dialects.answer import ToolCalls
from ollama_distributed.gateway.dialects.anthropic_errors import error_body
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.sse import CONTENT_TYPE, json_text, json_value, sse_event

Body = dict[str, Any]


def usage_body(usage: Usage) -> Body:
    """All input is `input_tokens`: the cache fields count what `cache_control` asked for, and that
    is ignored here; clients that read one number only then read the right one."""
    return {
        "input_tokens": usage.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def stop_body(finished: Finished, *, called: bool, asked: tuple[str, ...]) -> Body:
    """`stop_reason` and `stop_sequence`. A stop text of the model's own is an `end_turn`."""
    if finished.reason == "length":
        return _stopped("max_tokens")
    if called:
        return _stopped("tool_use")
    if finished.stop_sequence is not None and finished.stop_sequence in asked:
        return _stopped("stop_sequence", finished.stop_sequence)
    return _stopped("end_turn")


def _stopped(reason: str | None, sequence: str | None = None) -> Body:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}


def _message(context: RequestContext, model: str, content: list[Body], stop: Body, usage: Body) -> Body:
    return {
        "id": f"msg_{context.request_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **stop,
        "usage": usage | _SERVICE,
    }


_SERVICE: Body = {
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "inference_geo": "not_available",
    "service_tier": "standard",
}
"""Of a message's usage, not of a delta's: Anthropic sends it with each, and typed clients want it. What its
schema has but it leaves out (`citations`, `server_tool_use`) is left out: others refuse a null there."""


class _Block:
    """A content block as far as it has come."""

    __slots__ = ("before_delta", "call_id", "index", "kind", "name", "text")

    def __init__(self, kind: str, index: int, *, call_id: str = "", name: str = "") -> None:
        self.kind = kind
        self.index = index
        self.call_id = call_id
        self.name = name
        self.text: list[str] = []
        self.before_delta = _BEFORE_DELTA[kind] % index

    def start(self) -> Body:
        if self.kind == "text":
            return {"type": "text", "text": ""}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        caller = {"type": "direct"}
        return {"type": "tool_use", "id": self.call_id, "name": self.name, "input": {}, "caller": caller}

    def whole(self, *, cut: bool) -> Body:
        text = "".join(self.text)
        if self.kind == "text":
            return {"type": "text", "text": text}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": text, "signature": ""}
        return self.start() | {"input": tool_input(self.name, text, cut=cut)}


def tool_input(name: str, arguments: str, *, cut: bool) -> Body:
    """The arguments as the object that this API wants. Those of an answer that was `cut`
    by the token limit are not whole: such a call has none, and the stop reason says why.

    Raises:
        EngineError: the model wrote something else.
    """
    try:
        value = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError) as exc:
        if cut:
            return {}
        raise EngineError(f'The model called "{name}" with arguments that are not JSON') from exc
    if not isinstance(value, dict):
        raise EngineError(f'The model called "{name}" with arguments that are not a JSON object')
    return value


def _before_delta(kind: str, field: str) -> bytes:
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%%d,'
        b'"delta":{"type":"%b","%b":' % (kind.encode(), field.encode())
    )


_BEFORE_DELTA = {
    "text": _before_delta("text_delta", "text"),
    "thinking": _before_delta("thinking_delta", "thinking"),
    "tool_use": _before_delta("input_json_delta", "partial_json"),
}


class MessageStream:
    content_type = CONTENT_TYPE

    def __init__(self, context: RequestContext, model: str, stop_sequences: tuple[str, ...]) -> None:
        self._context = context
        self._model = model
        self._stop_sequences = stop_sequences
        self._blocks: list[_Block] = []
        self._open: _Block | None = None
        self._calls = ToolCalls(context.request_id)
        self._call_blocks: list[_Block] = []
        self._begun = False
        self._ended = False

    def feed(self, index: int, event: Event) -> bytes:  # noqa: ARG002 - one request only
        if self._ended:
            return b""
        if type(event) is Delta:
            block = self._open
            if (
                block is not None
                and block.kind == "text"
                and event.text
                and not (event.thinking or event.tool_calls)
            ):
                return self._grow(block, event.text)
            return self._delta(event)
        if isinstance(event, Opened):
            return self._begin(event.prompt_tokens)
        if isinstance(event, Failed):
            self._ended = True
            return b"event: error\ndata: " + error_body(event.error, self._context.request_id) + b"\n\n"
        assert isinstance(event, Finished)
        return self._finish(event)

    def _begin(self, prompt_tokens: int = 0) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        usage = usage_body(Usage(prompt_tokens=prompt_tokens))
        message = _message(self._context, self._model, [], _stopped(None), usage)
        return sse_event("message_start", {"type": "message_start", "message": message}) + _PING

    @staticmethod
    def _grow(block: _Block, text: str) -> bytes:
        block.text.append(text)
        return block.before_delta + json_text(text) + b"}}\n\n"

    def _delta(self, delta: Delta) -> bytes:
        parts = [self._begin()]
        if delta.thinking:
            parts.append(self._grow(self._block("thinking", parts), delta.thinking))
        if delta.text:
            parts.append(self._grow(self._block("text", parts), delta.text))
        for fragment in delta.tool_calls:
            block = self._call_block(fragment, parts)
            if fragment.arguments:
                parts.append(self._grow(block, fragment.arguments))
        return b"".join(parts)

    def _block(self, kind: str, parts: list[bytes]) -> _Block:
        """The open block of this kind; a new one closes what was open."""
        if self._open is not None and self._open.kind == kind:
            return self._open
        return self._start(_Block(kind, len(self._blocks)), parts)

    def _call_block(self, fragment: ToolCall, parts: list[bytes]) -> _Block:
        """The call's block. A late fragment of an earlier call goes to its block by index."""
        call, opens = self._calls.add(fragment)
        if opens:
            block = _Block("tool_use", len(self._blocks), call_id=call.id, name=call.name)
            self._call_blocks.append(self._start(block, parts))
        return self._call_blocks[call.place]

    def _start(self, block: _Block, parts: list[bytes]) -> _Block:
        self._stop(parts)
        self._blocks.append(block)
        self._open = block
        started = {"type": "content_block_start", "index": block.index, "content_block": block.start()}
        parts.append(sse_event("content_block_start", started))
        return block

    def _stop(self, parts: list[bytes]) -> None:
        if self._open is not None:
            if self._open.kind == "thinking":
                parts.append(_SIGNATURE % self._open.index)
            stopped = {"type": "content_block_stop", "index": self._open.index}
            parts.append(sse_event("content_block_stop", stopped))
            self._open = None

    def _finish(self, finished: Finished) -> bytes:
        self._ended = True
        parts = [self._begin()]
        if not self._blocks:
            self._block("text", parts)  # an empty answer is one empty text
        self._stop(parts)
        ended = {"type": "message_delta", "delta": self._why(finished), "usage": usage_body(finished.usage)}
        parts.append(sse_event("message_delta", ended))
        parts.append(sse_event("message_stop", {"type": "message_stop"}))
        return b"".join(parts)

    def _why(self, finished: Finished) -> Body:
        return stop_body(finished, called=bool(self._call_blocks), asked=self._stop_sequences)

    def whole(self, finished: Finished) -> Body:
        """The message that the events told."""
        cut = finished.reason == "length"
        content = [block.whole(cut=cut) for block in self._blocks]
        return _message(self._context, self._model, content, self._why(finished), usage_body(finished.usage))


_SIGNATURE = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"signature_delta","signature":""}}\n\n'
)
"""Ends each thinking: there is nothing to sign, but clients that saw none do not send the thinking back."""
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessageBody:
    """The whole message: what the stream's accumulator ends with."""

    content_type = "application/json"

    def __init__(self, context: RequestContext, model: str, stop_sequences: tuple[str, ...]) -> None:
        self._stream = MessageStream(context, model, stop_sequences)

    def feed(self, index: int, event: Event) -> bytes:
        told = self._stream.feed(index, event)
        return json_value(self._stream.whole(event)) if told and isinstance(event, Finished) else b""
