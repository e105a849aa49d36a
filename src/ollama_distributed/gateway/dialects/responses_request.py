"""POST /v1/responses: the request. Stateless: everything the model sees is in the body.

Input items become chat messages; what one assistant turn said (reasoning, text, function
calls) is one message again. Source: OpenAI API reference "Create a model response".
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.inference import (
    ChatPrompt,
    Format,
    InferenceRequest,
    JsonObject,
    JsonSchema,
    Message,
    ToolCall,
)
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.fields import INT_MAX, json_arguments, need_model, within
from ollama_distributed.gateway.dialects.openai_messages import OpenAIPart, content_parts, think
from ollama_distributed.gateway.dialects.openai_sampling import MAX_TOP_LOGPROBS, sampling
from ollama_distributed.gateway.dialects.options import keep_alive_s
from ollama_distributed.gateway.dialects.responses_tools import (
    ResponsesTool,
    ResponsesToolChoice,
    custom_arguments,
    read_choice,
    read_tools,
)

# ── what comes in ───────────────────────────────────────────────────────────────────


class ResponsesSummary(msgspec.Struct, frozen=True):
    text: str = ""


class ResponsesItem(msgspec.Struct, frozen=True, kw_only=True):
    """An input item of any type; `type` may be missing on a message."""

    type: str | None = None
    role: str | None = None
    content: str | list[OpenAIPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    """Of a call of a custom tool."""
    output: str | list[OpenAIPart] | None = None
    summary: list[ResponsesSummary] | None = None
    tools: list[ResponsesTool] | None = None
    """Of `additional_tools`."""


class ResponsesFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "text"
    name: str = ""
    strict: bool | None = None
    schema: dict[str, Any] | None = None


class ResponsesText(msgspec.Struct, frozen=True, kw_only=True):
    format: ResponsesFormat | None = None


class ResponsesReasoning(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    input: str | list[ResponsesItem] | None = None
    instructions: str | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: str | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    reasoning: ResponsesReasoning | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    # These three are told again in the answer, and no more.
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None
    # Not OpenAI's: taken here as on /v1/chat/completions.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


_STATEFUL = ("previous_response_id", "conversation", "background", "prompt")
LOGPROBS = "message.output_text.logprobs"


def offered_tools(row: ResponsesIn) -> list[ResponsesTool]:
    """All that the caller runs, also those that came as input."""
    items = row.input if isinstance(row.input, list) else ()
    more = [tool for item in items if item.type == "additional_tools" for tool in item.tools or ()]
    return [*(row.tools or ()), *more]


def inference_request(row: ResponsesIn, context: RequestContext) -> InferenceRequest:
    for name in _STATEFUL:
        if getattr(row, name):
            raise Unsupported(
                f"{name} is not supported: this endpoint is stateless and keeps no responses; "
                "send the whole conversation in input",
                param=name,
            )
    rows = _input(row)
    usable, choice = read_choice(row.tool_choice, read_tools(offered_tools(row)))
    top_logprobs = within("top_logprobs", row.top_logprobs, 0, MAX_TOP_LOGPROBS) or 0
    drawn, loading = sampling(row, num_predict=within("max_output_tokens", row.max_output_tokens, 1, INT_MAX))
    return InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=need_model(row.model),
        prompt=ChatPrompt(
            messages=rows,
            tools=usable,
            tool_choice=choice,
            parallel_tool_calls=row.parallel_tool_calls is not False,
        ),
        sampling=drawn,
        options=loading,
        format=_format(row.text.format if row.text else None),
        think=think("reasoning.effort", row.reasoning.effort if row.reasoning else None),
        think_if_able=True,  # agents send an effort to every model by habit
        keep_alive_s=keep_alive_s(row.keep_alive),
        truncate=row.truncation != "disabled",
        logprobs=bool(top_logprobs) or LOGPROBS in (row.include or ()),
        top_logprobs=top_logprobs,
    )


# ── input items -> messages ─────────────────────────────────────────────────────────


class _Conversation:
    """Messages so far, and what the assistant has said since somebody else spoke."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.names: dict[str, str] = {}
        """Call id -> function name, for results that carry the id only."""
        self._thinking = ""
        self._content = ""
        self._calls: list[ToolCall] = []

    def think(self, text: str) -> None:
        self._begin()
        self._thinking += text

    def say(self, text: str) -> None:
        self._begin()
        self._content = text

    def call(self, call_id: str, name: str, arguments: str) -> None:
        self._calls.append(ToolCall(id=call_id, name=name, arguments=arguments, index=len(self._calls)))
        self.names[call_id] = name

    def add(self, message: Message) -> None:
        self.close()
        self.messages.append(message)

    def close(self) -> None:
        """End the assistant's turn, if one is open."""
        if self._thinking or self._content or self._calls:
            said = Message(
                role="assistant",
                content=self._content,
                thinking=self._thinking,
                tool_calls=tuple(self._calls),
            )
            self.messages.append(said)
        self._thinking, self._content, self._calls = "", "", []

    def _begin(self) -> None:
        """Reasoning and text come before the calls of a turn: after them a new one begins."""
        if self._content or self._calls:
            self.close()


def _input(row: ResponsesIn) -> tuple[Message, ...]:
    if row.input is None:
        raise Invalid("input is required", param="input")
    talk = _Conversation()
    if row.instructions:
        talk.add(Message(role="system", content=row.instructions))
    if isinstance(row.input, str):
        talk.add(Message(role="user", content=row.input))
    elif not row.input:
        raise Invalid("input must not be empty", param="input")
    else:
        for i, item in enumerate(row.input):
            _add_item(f"input[{i}]", item, talk)
    talk.close()
    return tuple(talk.messages)


def _add_item(at: str, item: ResponsesItem, talk: _Conversation) -> None:
    match item.type or ("message" if item.role else ""):
        case "message" if item.role == "assistant":
            talk.say(_content(at, item, joiner="")[0])
        case "message":
            talk.add(_message(at, item))
        case "reasoning":
            talk.think(_reasoning(item))
        case "function_call":
            name, call_id = _required(at, "name", item.name), _required(at, "call_id", item.call_id)
            talk.call(call_id, name, json_arguments(f"{at}.arguments", item.arguments or ""))
        case "custom_tool_call":
            name, call_id = _required(at, "name", item.name), _required(at, "call_id", item.call_id)
            talk.call(call_id, name, custom_arguments(item.input or ""))
        case "function_call_output" | "custom_tool_call_output":
            talk.add(_result(at, item, talk.names))
        case "additional_tools":
            pass  # `offered_tools` reads them
        case "item_reference":
            raise Unsupported(
                f"{at}: item_reference is not supported: no items are kept here; send the item itself",
                param=at,
            )
        case other:
            raise Unsupported(f'{at}.type "{other}" is not supported', param=f"{at}.type")


def _required(at: str, name: str, value: str | None) -> str:
    if not value:
        raise Invalid(f"{at}.{name} is required", param=f"{at}.{name}")
    return value


_ROLES = {"system": "system", "developer": "system", "user": "user"}


def _message(at: str, item: ResponsesItem) -> Message:
    role = _ROLES.get(item.role or "")
    if role is None:
        raise Invalid(
            f'{at}.role must be system, developer, user or assistant, got "{item.role}"', param=f"{at}.role"
        )
    text, images = _content(at, item, joiner="\n")
    return Message(role="system" if role == "system" else "user", content=text, images=images)


def _content(at: str, item: ResponsesItem, joiner: str) -> tuple[str, tuple[bytes, ...]]:
    if item.content is None:
        raise Invalid(f"{at}.content is required", param=f"{at}.content")
    if isinstance(item.content, str):
        return item.content, ()
    return content_parts(f"{at}.content", item.content, joiner)


def _reasoning(item: ResponsesItem) -> str:
    """The text itself where the item has it, else its summary."""
    if isinstance(item.content, list) and item.content:
        return "".join(part.text or "" for part in item.content)
    if isinstance(item.content, str) and item.content:
        return item.content
    return "\n".join(part.text for part in item.summary or ())


def _result(at: str, item: ResponsesItem, names: dict[str, str]) -> Message:
    call_id = _required(at, "call_id", item.call_id)
    if item.output is None:
        raise Invalid(f"{at}.output is required", param=f"{at}.output")
    text, images = (
        (item.output, ())
        if isinstance(item.output, str)
        else content_parts(f"{at}.output", item.output, joiner="\n")
    )
    name = item.name or names.get(call_id, "")
    return Message(role="tool", content=text, images=images, tool_name=name, tool_call_id=call_id)


# ── format ────────────────────────────────────────────────────────────────


def _format(row: ResponsesFormat | None) -> Format | None:
    if row is None or row.type == "text":
        return None
    if row.type == "json_object":
        return JsonObject()
    if row.type != "json_schema":
        raise Invalid(
            f'text.format.type must be text, json_object or json_schema, got "{row.type}"',
            param="text.format.type",
        )
    if row.schema is None:
        raise Invalid("text.format.schema is required", param="text.format.schema")
    return JsonSchema(row.schema)
