"""The parts of llama-server's chat API that we use. Pure.

Its template (`/apply-template`) renders every prompt. Its chat parser serves only answers
that may hold tool calls. It does not enforce `tool_choice` (trap 8), so a required tool is
our own: the rendered prompt, completed under a JSON schema that admits nothing but calls.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.llamacpp.protocol import (
    WireError,
    WireLogprob,
    WireProgress,
    WireTimings,
    error_of,
    format_fields,
    sampling_fields,
    token_logprob,
)
from ollama_distributed.base.errors import EngineError, Invalid, Unsupported
from ollama_distributed.base.inference import (
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Think,
    Tool,
    ToolCall,
)
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Progress
from ollama_distributed.serving.ports import ChatRequest

# ── out ─────────────────────────────────────────────────────────────────────────────


def template_body(
    messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
) -> dict[str, Any]:
    """What decides the rendered prompt."""
    body: dict[str, Any] = {"messages": [message_value(m) for m in messages], "add_generation_prompt": True}
    if tools:
        body["tools"] = [tool_value(t) for t in tools]
    if think is not None:
        body["chat_template_kwargs"] = think_values(think)
    return body


def think_values(think: Think) -> dict[str, Any]:
    """Template variables: `enable_thinking` (Qwen and others), `reasoning_effort` (gpt-oss)."""
    if isinstance(think, bool):
        return {"enable_thinking": think}
    return {"enable_thinking": True, "reasoning_effort": "high" if think == "max" else think}


def message_value(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images
        ]
        value["content"] = [*parts, {"type": "text", "text": message.content}] if message.content else parts
    if message.thinking:
        value["reasoning_content"] = message.thinking
    if message.tool_calls:
        value["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments or "{}"}}
            for c in message.tool_calls
        ]
    if message.role == "tool":
        if message.tool_call_id:
            value["tool_call_id"] = message.tool_call_id
        if message.tool_name:
            value["name"] = message.tool_name
    return value


def _data_url(image: bytes) -> str:
    return "data:image/*;base64," + base64.b64encode(image).decode()


def tool_value(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": _parameters(tool)}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _parameters(tool: Tool) -> dict[str, Any]:
    return dict(tool.parameters) or {"type": "object", "properties": {}}


def chat_body(request: ChatRequest, *, context_tokens: int) -> dict[str, Any]:
    """The JSON of a chat whose tool calls, if any, are the model's own choice.

    Raises:
        Invalid: a value that the engine cannot take.
        Unsupported: logprobs of an answer that may hold calls.
    """
    tools = () if request.tool_choice == "none" else request.tools
    if tools and request.top_logprobs is not None:
        raise Unsupported("logprobs are not given where tools are offered", param="logprobs")
    body = {
        **template_body(request.messages, tools, request.think),
        **sampling_fields(request.sampling, context_tokens=context_tokens),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "cache_prompt": True,
        "parallel_tool_calls": request.parallel_tool_calls,
    }
    body["max_tokens"] = body.pop("n_predict", -1)
    match request.format:
        case JsonObject() | JsonSchema():
            schema = format_fields(request.format)["json_schema"]
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        case None:
            pass
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": max(1, request.top_logprobs)}
    return body


# ── a required tool ─────────────────────────────────────────────────────────────────


def enforced(request: ChatRequest) -> bool:
    return request.tool_choice not in ("auto", "none")


def wanted(request: ChatRequest) -> ChatRequest:
    """The same chat by the model's own choice, offered only what it may call."""
    choice = request.tool_choice
    tools = tuple(t for t in request.tools if not isinstance(choice, NamedTool) or t.name == choice.name)
    return msgspec.structs.replace(request, tools=tools, tool_choice="auto", format=None, top_logprobs=None)


def calls_schema(request: ChatRequest) -> dict[str, Any]:
    """A JSON schema whose values are exactly the calls that `tool_choice` admits.

    Raises:
        Invalid: no tool is there to be called.
    """
    tools: Sequence[Tool] = request.tools
    if isinstance(request.tool_choice, NamedTool):
        wanted = request.tool_choice.name
        tools = [t for t in tools if t.name == wanted]
        if not tools:
            raise Invalid(f"tool_choice names {wanted!r}, which is not among the tools")
    if not tools:
        raise Invalid("tool_choice requires a tool, but none is given")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": t.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, t in enumerate(tools)
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    parallel = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedTool)
    body = {"type": "array", "items": call, "minItems": 1} if parallel else call
    definitions = {f"tool{i}": _moved(_parameters(t), f"#/$defs/tool{i}") for i, t in enumerate(tools)}
    return {**body, "$defs": definitions}


def _moved(schema: Any, root: str) -> Any:
    """The schema with references into itself made to follow it to its new place."""
    match schema:
        case dict():
            return {
                key: root + value[1:]
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, root)
                for key, value in schema.items()
            }
        case list() | tuple():
            return [_moved(item, root) for item in schema]
        case _:
            return schema


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


_calls = msgspec.json.Decoder(_Call | list[_Call])


def parse_calls(text: str, new_id: Callable[[], str]) -> tuple[ToolCall, ...]:
    """The calls of a completed answer under `calls_schema`.

    Raises:
        EngineError: the answer is not whole.
    """
    try:
        found: _Call | list[_Call] = _calls.decode(text)
    except msgspec.DecodeError as exc:
        raise EngineError("the model's tool call is not whole") from exc
    calls = found if isinstance(found, list) else [found]
    return tuple(
        ToolCall(id=new_id(), name=c.name, arguments=bytes(c.arguments).decode(), index=i)
        for i, c in enumerate(calls)
    )


# ── in ──────────────────────────────────────────────────────────────────────────────


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolDelta(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolDelta] | None = None


class _Logprobs(msgspec.Struct):
    content: list[WireLogprob] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: WireTimings | None = None
    prompt_progress: WireProgress | None = None
    error: WireError | None = None


_chunk = msgspec.json.Decoder(_Chunk)


class ChatStream:
    """Turns the events of `/v1/chat/completions` into engine events."""

    def __init__(self, *, top_logprobs: int = 0) -> None:
        self._top = top_logprobs
        self._reason = ""
        self._usage = _Usage()
        self._timings = WireTimings()

    def feed(self, data: bytes) -> list[EngineEvent]:
        """The engine events of one server event.

        Raises:
            EngineError: it is not what llama-server sends.
        """
        if data == b"[DONE]":
            return [self._done()] if self._reason else []
        try:
            chunk = _chunk.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise EngineError("the engine sent an event that is not its protocol") from exc
        if chunk.error is not None:
            return [EngineFailed(error_of(500, chunk.error))]
        self._usage = chunk.usage or self._usage
        self._timings = chunk.timings or self._timings
        events: list[EngineEvent] = []
        if chunk.prompt_progress is not None:
            progress = chunk.prompt_progress
            events.append(Progress(total=progress.total, processed=progress.processed, cached=progress.cache))
        for choice in chunk.choices:
            self._reason = choice.finish_reason or self._reason
            delta = self._delta(choice)
            if delta != ChatDelta():
                events.append(delta)
        return events

    def _delta(self, choice: _Choice) -> ChatDelta:
        logprobs = choice.logprobs.content if choice.logprobs is not None else None
        return ChatDelta(
            text=choice.delta.content or "",
            thinking=choice.delta.reasoning_content or "",
            tool_calls=tuple(
                ToolCall(
                    id=c.id or "",
                    name=c.function.name or "",
                    arguments=c.function.arguments or "",
                    index=c.index,
                )
                for c in choice.delta.tool_calls or ()
            ),
            logprobs=tuple(token_logprob(p, self._top) for p in logprobs or ()),
        )

    def _done(self) -> Done:
        details = self._usage.prompt_tokens_details
        return Done(
            reason="length"
            if self._reason == "length"
            else "tool_calls"
            if self._reason == "tool_calls"
            else "stop",
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=details.cached_tokens if details is not None else self._timings.cache_n,
            completion_tokens=self._usage.completion_tokens,
            prompt_s=(self._timings.prompt_ms or 0.0) / 1000,
            completion_s=(self._timings.predicted_ms or 0.0) / 1000,
        )
