"""The tools of POST /v1/responses: functions, namespaces of them, and custom tools.

A custom tool takes free text where a function takes JSON. Here the model calls a function whose only
argument is the text, and the answer tells of it as a `custom_tool_call`. The grammar of a custom tool is told
to the model, not enforced. Source: OpenAI API reference "Create a model response", guide "Function calling".
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Unsupported
from ollama_distributed.base.inference import Tool, ToolChoice
from ollama_distributed.gateway.dialects.openai_messages import (
    OpenAIFunction,
    allowed_tools,
    checked_tools,
    choice_mode,
    function_tool,
    named_tool,
)


class CustomFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "text"
    syntax: str = ""
    definition: str = ""


class ResponsesTool(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: list[ResponsesTool] | None = None
    """Of a `namespace`."""
    format: CustomFormat | None = None
    """Of a `custom` tool's text."""


class ResponsesToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    name: str = ""
    mode: str = "auto"
    tools: list[ResponsesTool] = []


_OURS = ("function", "namespace", "custom")
_TEXT = "input"
"""The one argument of a custom tool."""


def namespaces(rows: list[ResponsesTool]) -> dict[str, str]:
    """Tool name -> the namespace that it came in; clients route calls by it."""
    return {tool.name: row.name for row in rows if row.type == "namespace" for tool in row.tools or ()}


def customs(rows: list[ResponsesTool]) -> frozenset[str]:
    """Names of the custom tools."""
    inside = [tool for row in rows for tool in row.tools or ()]
    return frozenset([row.name for row in (*rows, *inside) if row.type == "custom"])


def read_tools(rows: list[ResponsesTool]) -> tuple[Tool, ...]:
    """Those that the caller runs. Tools that OpenAI runs itself (`web_search`, ...) are left out where
    such are offered too: agents send them to every server by habit. Alone they are refused."""
    found: list[Tool] = []
    usable = any(row.type in _OURS for row in rows)
    for i, row in enumerate(rows):
        at = f"tools[{i}]"
        if usable and row.type not in _OURS:
            continue
        if row.type == "namespace":
            found += [_tool(f"{at}.tools[{j}]", tool) for j, tool in enumerate(row.tools or ())]
        else:
            found.append(_tool(at, row))
    return checked_tools(found)


def _tool(at: str, row: ResponsesTool) -> Tool:
    if row.type == "custom":
        return _custom(at, row)
    if row.type != "function":
        raise Unsupported(
            f'{at}.type "{row.type}" is not supported; only functions that the caller runs are',
            param=f"{at}.type",
        )
    return function_tool(
        at, OpenAIFunction(name=row.name, description=row.description, parameters=row.parameters)
    )


def _custom(at: str, row: ResponsesTool) -> Tool:
    described = row.description or ""
    if row.format is not None and row.format.definition:
        described += f"\n\nThe input follows this grammar ({row.format.syntax}):\n{row.format.definition}"
    parameters = {"type": "object", "properties": {_TEXT: {"type": "string"}}, "required": [_TEXT]}
    return function_tool(at, OpenAIFunction(name=row.name, description=described, parameters=parameters))


def custom_arguments(text: str) -> str:
    """The arguments of an earlier call of a custom tool, as its function has them."""
    return msgspec.json.encode({_TEXT: text}).decode()


def custom_text(arguments: str) -> str:
    """What a custom tool was called with. A model that wrote no such object is taken at its word."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    text = value.get(_TEXT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def read_choice(
    choice: str | ResponsesToolChoice | None, offered: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that may be used, and how."""
    if choice is None or isinstance(choice, str):
        return offered, choice_mode(choice or "auto", offered)
    if choice.type in ("function", "custom"):
        return offered, named_tool(choice.name, offered)
    if choice.type == "allowed_tools":
        allowed = allowed_tools([tool.name for tool in choice.tools], offered)
        return allowed, choice_mode(choice.mode, allowed)
    raise Unsupported(f'tool_choice of type "{choice.type}" is not supported', param="tool_choice")


# ── as the answer repeats them ──────────────────────────────────────────────────────


def choice_body(choice: str | ResponsesToolChoice | None) -> dict[str, Any] | str:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.type in ("function", "custom"):
        return {"type": choice.type, "name": choice.name}
    names = [{"type": tool.type, "name": tool.name} for tool in choice.tools]
    return {"type": choice.type, "mode": choice.mode, "tools": names}


def tool_body(tool: ResponsesTool) -> dict[str, Any]:
    match tool.type:
        case "namespace":
            return {
                "type": "namespace",
                "name": tool.name,
                "description": tool.description or "",
                "tools": [tool_body(inner) for inner in tool.tools or ()],
            }
        case "custom":
            form = tool.format or CustomFormat()
            grammar = {"syntax": form.syntax, "definition": form.definition} if form.definition else {}
            return {
                "type": "custom",
                "name": tool.name,
                "description": tool.description,
                "format": {"type": form.type} | grammar,
            }
        case "function":
            return {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
        case other:  # left out
            return {"type": other}
