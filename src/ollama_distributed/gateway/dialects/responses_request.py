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
    Tool,
    ToolCall,
    ToolChoice,
)
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.fields import INT_MAX, json_arguments, need_model, within
from ollama_distributed.gateway.dialects.openai_messages import (
    FunctionIn,
    Part,
    allowed_tools,
    checked_tools,
    choice_mode,
    content_parts,
    function_tool,
    named_tool,
    think,
)
from ollama_distributed.gateway.dialects.openai_sampling import MAX_TOP_LOGPROBS, sampling
from ollama_distributed.gateway.dialects.options import keep_alive_s

# ── what comes in ───────────────────────────────────────────────────────────────────


class TextIn(msgspec.Struct, frozen=True):
    text: str = ""


class ItemIn(msgspec.Struct, frozen=True, kw_only=True):
    """An input item of any type; `type` may be missing on a message."""

    type: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[TextIn] | None = None


class ToolIn(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: list[ToolIn] | None = None
    """The functions of a `namespace`."""


class ChoiceIn(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    name: str = ""
    mode: str = "auto"
    tools: list[ToolIn] = []


class FormatIn(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "text"
    name: str = ""
    strict: bool | None = None
    schema: dict[str, Any] | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    format: FormatIn | None = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    input: str | list[ItemIn] | None = None
    instructions: str | None = None
    tools: list[ToolIn] | None = None
    tool_choice: str | ChoiceIn | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
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


def inference_request(row: ResponsesIn, context: RequestContext) -> InferenceRequest:
    for name in _STATEFUL:
        if getattr(row, name):
            raise Unsupported(
                f"{name} is not supported: this endpoint is stateless and keeps no responses; "
                "send the whole conversation in input",
                param=name,
            )
    rows = _input(row)
    usable, choice = _tool_choice(row.tool_choice, _tools(row.tools))
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
        keep_alive_s=keep_alive_s(row.keep_alive),
        truncate=row.truncation != "disabled",
        logprobs=bool(top_logprobs) or LOGPROBS in (row.include or ()),
        top_logprobs=top_logprobs,
    )


# ── input items -> messages ─────────────────────────────────────────────────────────


class _Turn:
    """What the assistant said between two items of somebody else."""

    def __init__(self) -> None:
        self.thinking = ""
        self.content = ""
        self.calls: list[ToolCall] = []

    def message(self) -> Message | None:
        if not (self.thinking or self.content or self.calls):
            return None
        return Message(
            role="assistant", content=self.content, thinking=self.thinking, tool_calls=tuple(self.calls)
        )


def _input(row: ResponsesIn) -> tuple[Message, ...]:
    if row.input is None:
        raise Invalid("input is required", param="input")
    found: list[Message] = []
    if row.instructions:
        found.append(Message(role="system", content=row.instructions))
    if isinstance(row.input, str):
        return (*found, Message(role="user", content=row.input))
    if not row.input:
        raise Invalid("input must not be empty", param="input")
    names: dict[str, str] = {}
    turn = _Turn()

    def close() -> _Turn:
        said = turn.message()
        if said is not None:
            found.append(said)
        return _Turn()

    for i, item in enumerate(row.input):
        at = f"input[{i}]"
        match item.type or ("message" if item.role else ""):
            case "message" if item.role == "assistant":
                if turn.content or turn.calls:
                    turn = close()
                turn.content, _ = _content(at, item, joiner="")
            case "message":
                turn = close()
                found.append(_message(at, item))
            case "reasoning":
                if turn.content or turn.calls:
                    turn = close()
                turn.thinking += _reasoning(item)
            case "function_call":
                call = _call(at, item, len(turn.calls))
                turn.calls.append(call)
                names[call.id] = call.name
            case "function_call_output":
                turn = close()
                found.append(_result(at, item, names))
            case "item_reference":
                raise Unsupported(
                    f"{at}: item_reference is not supported: no items are kept here; send the item itself",
                    param=at,
                )
            case other:
                raise Unsupported(f'{at}.type "{other}" is not supported', param=f"{at}.type")
    close()
    return tuple(found)


_ROLES = {"system": "system", "developer": "system", "user": "user"}


def _message(at: str, item: ItemIn) -> Message:
    role = _ROLES.get(item.role or "")
    if role is None:
        raise Invalid(
            f'{at}.role must be system, developer, user or assistant, got "{item.role}"', param=f"{at}.role"
        )
    text, images = _content(at, item, joiner="\n")
    return Message(role="system" if role == "system" else "user", content=text, images=images)


def _content(at: str, item: ItemIn, joiner: str) -> tuple[str, tuple[bytes, ...]]:
    if item.content is None:
        raise Invalid(f"{at}.content is required", param=f"{at}.content")
    if isinstance(item.content, str):
        return item.content, ()
    return content_parts(f"{at}.content", item.content, joiner)


def _reasoning(item: ItemIn) -> str:
    """The text itself where the item has it, else its summary."""
    if isinstance(item.content, list) and item.content:
        return "".join(part.text or "" for part in item.content)
    if isinstance(item.content, str) and item.content:
        return item.content
    return "\n".join(part.text for part in item.summary or ())


def _call(at: str, item: ItemIn, index: int) -> ToolCall:
    if not item.name:
        raise Invalid(f"{at}.name is required", param=f"{at}.name")
    if not item.call_id:
        raise Invalid(f"{at}.call_id is required", param=f"{at}.call_id")
    arguments = json_arguments(f"{at}.arguments", item.arguments or "")
    return ToolCall(id=item.call_id, name=item.name, arguments=arguments, index=index)


def _result(at: str, item: ItemIn, names: dict[str, str]) -> Message:
    if not item.call_id:
        raise Invalid(f"{at}.call_id is required", param=f"{at}.call_id")
    if item.output is None:
        raise Invalid(f"{at}.output is required", param=f"{at}.output")
    text, images = (
        (item.output, ())
        if isinstance(item.output, str)
        else content_parts(f"{at}.output", item.output, joiner="\n")
    )
    name = item.name or names.get(item.call_id, "")
    return Message(role="tool", content=text, images=images, tool_name=name, tool_call_id=item.call_id)


# ── tools and format ────────────────────────────────────────────────────────────────


def namespaces(rows: list[ToolIn] | None) -> dict[str, str]:
    """Function name -> the namespace that it came in; clients route calls by it."""
    return {tool.name: row.name for row in rows or () if row.type == "namespace" for tool in row.tools or ()}


def _tools(rows: list[ToolIn] | None) -> tuple[Tool, ...]:
    found: list[Tool] = []
    for i, row in enumerate(rows or ()):
        at = f"tools[{i}]"
        if row.type == "namespace":
            found += [_function(f"{at}.tools[{j}]", tool) for j, tool in enumerate(row.tools or ())]
        else:
            found.append(_function(at, row))
    return checked_tools(found)


def _function(at: str, row: ToolIn) -> Tool:
    if row.type != "function":
        raise Unsupported(
            f'{at}.type "{row.type}" is not supported; only functions that the caller runs are',
            param=f"{at}.type",
        )
    return function_tool(
        at, FunctionIn(name=row.name, description=row.description, parameters=row.parameters)
    )


def _tool_choice(
    choice: str | ChoiceIn | None, offered: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], ToolChoice]:
    if choice is None or isinstance(choice, str):
        return offered, choice_mode(choice or "auto", offered)
    if choice.type == "function":
        return offered, named_tool(choice.name, offered)
    if choice.type == "allowed_tools":
        allowed = allowed_tools([tool.name for tool in choice.tools], offered)
        return allowed, choice_mode(choice.mode, allowed)
    raise Unsupported(f'tool_choice of type "{choice.type}" is not supported', param="tool_choice")


def _format(row: FormatIn | None) -> Format | None:
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
