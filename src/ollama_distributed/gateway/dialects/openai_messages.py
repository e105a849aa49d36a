"""OpenAI chat messages, tools and formats -> the internal form.

Source: OpenAI API reference "Create chat completion" (2026-11), and what Ollama and vLLM
accept beside it: `reasoning` and `reasoning_content` in earlier answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.inference import (
    Format,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Think,
    Tool,
    ToolCall,
    ToolChoice,
)
from ollama_distributed.gateway.dialects.fields import image_from_uri, json_arguments

# ── what comes in ───────────────────────────────────────────────────────────────────


class ImageUrl(msgspec.Struct, frozen=True):
    url: str = ""


class OpenAIPart(msgspec.Struct, frozen=True, kw_only=True):
    """A content part: `text`, `refusal`, `image_url`, and kinds that are refused."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    arguments: str | dict[str, Any] | None = None


class OpenAIToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None


class OpenAIMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[OpenAIPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[OpenAIToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None


class OpenAIFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OpenAITool(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "function"
    function: OpenAIFunction | None = None


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True):
    mode: str = "auto"
    tools: list[OpenAITool] = []


class OpenAIToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    function: OpenAIFunction | None = None
    allowed_tools: AllowedTools | None = None


class SchemaIn(msgspec.Struct, frozen=True, kw_only=True):
    schema: dict[str, Any] | None = None


class OpenAIFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    json_schema: SchemaIn | None = None
    schema: dict[str, Any] | None = None
    """llama.cpp's form of `json_object`."""


# ── messages ────────────────────────────────────────────────────────────────────────

_ROLES: Mapping[str, Literal["system", "user", "assistant", "tool"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def messages(rows: list[OpenAIMessage]) -> tuple[Message, ...]:
    names: dict[str, str] = {}
    """Tool call id -> function name, for results that carry the id only."""
    return tuple([_message(i, row, names) for i, row in enumerate(rows)])


def _message(number: int, row: OpenAIMessage, names: dict[str, str]) -> Message:
    role = _ROLES.get(row.role.lower())
    if (role == "user" or role == "system") and type(row.content) is str:  # nearly all
        return Message(role=role, content=row.content)
    at = f"messages[{number}]"
    if role is None:
        raise Invalid(
            f'{at}.role must be system, developer, user, assistant or tool, got "{row.role}"',
            param=f"{at}.role",
        )
    if row.content is None and role != "assistant":
        raise Invalid(f"{at}.content is required for the role {row.role}", param=f"{at}.content")
    images: tuple[bytes, ...] = ()
    if isinstance(row.content, list):
        text, images = content_parts(f"{at}.content", row.content, joiner="" if role == "assistant" else "\n")
    else:
        text = row.content or ""
    if role == "tool":
        call_id = row.tool_call_id or ""
        name = row.name or names.get(call_id, "")
        return Message(role="tool", content=text, images=images, tool_name=name, tool_call_id=call_id)
    if role == "assistant":
        calls = _calls(at, row)
        names.update((call.id, call.name) for call in calls)
        thinking = row.reasoning or row.reasoning_content or ""
        return Message(role="assistant", content=text, images=images, thinking=thinking, tool_calls=calls)
    return Message(role=role, content=text, images=images)


def content_parts(at: str, parts: list[OpenAIPart], joiner: str) -> tuple[str, tuple[bytes, ...]]:
    """The texts, joined, and the images. Audio and files are refused."""
    texts: list[str] = []
    images: list[bytes] = []
    for i, part in enumerate(parts):
        here = f"{at}[{i}]"
        match part.type:
            case "text" | "input_text" | "output_text":
                if part.text is None:
                    raise Invalid(f"{here}.text is required", param=f"{here}.text")
                texts.append(part.text)
            case "refusal":
                texts.append(part.refusal or "")
            case "image_url" | "input_image":
                url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
                if not url:
                    raise Invalid(f"{here}.image_url is required", param=f"{here}.image_url")
                images.append(image_from_uri(f"{here}.image_url", url))
            case "input_audio" | "audio":
                raise Unsupported("Audio input is not supported; send text or images", param=here)
            case "file" | "input_file":
                raise Unsupported("File input is not supported; send its text", param=here)
            case other:
                raise Invalid(f'{here}.type "{other}" is not known', param=f"{here}.type")
    return joiner.join(texts), tuple(images)


def _calls(at: str, row: OpenAIMessage) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    for i, call in enumerate(row.tool_calls or ()):
        here = f"{at}.tool_calls[{i}]"
        if call.function is None or not call.function.name:
            raise Invalid(f"{here}.function.name is required", param=f"{here}.function")
        arguments = json_arguments(f"{here}.function.arguments", call.function.arguments)
        calls.append(ToolCall(id=call.id or "", name=call.function.name, arguments=arguments, index=i))
    if row.function_call is not None and not calls:
        arguments = json_arguments(f"{at}.function_call.arguments", row.function_call.arguments)
        calls.append(ToolCall(id="", name=row.function_call.name, arguments=arguments))
    return tuple(calls)


# ── tools ───────────────────────────────────────────────────────────────────────────

MAX_TOOLS = 512
"""Every tool becomes prompt text and grammar; OpenAI itself takes 128."""


def function_tool(param: str, function: OpenAIFunction | None) -> Tool:
    if function is None or not function.name:
        raise Invalid(f"{param}.name is required", param=f"{param}.name")
    return Tool(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or _NO_PARAMETERS,
    )


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def tools(rows: list[OpenAITool] | None) -> tuple[Tool, ...]:
    found: list[Tool] = []
    for i, row in enumerate(rows or ()):
        if row.type != "function":
            raise Unsupported(
                f'tools[{i}].type "{row.type}" is not supported; only "function" is', param=f"tools[{i}].type"
            )
        found.append(function_tool(f"tools[{i}].function", row.function))
    return checked_tools(found)


def checked_tools(found: list[Tool]) -> tuple[Tool, ...]:
    """Names are unique, and there are not too many."""
    if len(found) > MAX_TOOLS:
        raise Invalid(f"tools takes at most {MAX_TOOLS} tools, got {len(found)}", param="tools")
    names = [tool.name for tool in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise Invalid(f'tools has two tools named "{name}"', param="tools")
    return tuple(found)


def tool_choice(
    choice: str | OpenAIToolChoice | None, offered: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that may be used, and how."""
    if choice is None or isinstance(choice, str):
        return offered, choice_mode(choice or "auto", offered)
    if choice.type == "function":
        return offered, named_tool(choice.function.name if choice.function else "", offered)
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        names = [row.function.name if row.function else "" for row in choice.allowed_tools.tools]
        allowed = allowed_tools(names, offered)
        return allowed, choice_mode(choice.allowed_tools.mode, allowed)
    raise Unsupported(f'tool_choice of type "{choice.type}" is not supported', param="tool_choice")


def choice_mode(mode: str, offered: tuple[Tool, ...]) -> ToolChoice:
    if mode == "required":
        if not offered:
            raise Invalid('tool_choice "required" needs tools', param="tool_choice")
        return "required"
    if mode == "none":
        return "none"
    if mode == "auto":
        return "auto"
    raise Invalid(
        f'tool_choice must be none, auto, required or an object that names a tool, got "{mode}"',
        param="tool_choice",
    )


def named_tool(name: str, offered: tuple[Tool, ...]) -> NamedTool:
    if not any(tool.name == name for tool in offered):
        raise Invalid(f'tool_choice names the tool "{name}", which is not in tools', param="tool_choice")
    return NamedTool(name)


def allowed_tools(names: list[str], offered: tuple[Tool, ...]) -> tuple[Tool, ...]:
    for name in names:
        named_tool(name, offered)
    return tuple(tool for tool in offered if tool.name in names)


# ── format and reasoning ────────────────────────────────────────────────────────────


def response_format(row: OpenAIFormat | None) -> Format | None:
    if row is None or row.type in ("", "text"):
        return None
    if row.type == "json_object":
        return JsonSchema(row.schema) if row.schema else JsonObject()
    if row.type == "json_schema":
        schema = row.json_schema.schema if row.json_schema else row.schema
        if schema is None:
            raise Invalid(
                "response_format.json_schema.schema is required", param="response_format.json_schema.schema"
            )
        return JsonSchema(schema)
    raise Invalid(
        f'response_format.type must be text, json_object or json_schema, got "{row.type}"',
        param="response_format.type",
    )


_EFFORT: dict[str, Think] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
    "ultra": "max",
}


def think(param: str, effort: str | None) -> Think | None:
    """`reasoning_effort` in Ollama's words; efforts beyond the internal four take the nearest."""
    if effort is None:
        return None
    if effort not in _EFFORT:
        raise Invalid(f'{param} must be one of {", ".join(_EFFORT)}, got "{effort}"', param=param)
    return _EFFORT[effort]
