"""The bodies that Ollama's inference routes take (its `api/types.go`), field by field.

Decoded straight into these structs; a field that is not here is ignored. `null` means
absent everywhere, as in Go. The seed's `/api/v1` takes the same bodies.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

Base64 = Annotated[str, msgspec.Meta(extra_json_schema={"contentEncoding": "base64"})]
"""Decoded by the dialect, in pieces: the JSON decoder would hold the event loop meanwhile."""


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    suffix: str | None = None
    images: list[Base64] | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    format: Any = None
    stream: bool | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug_render_only: bool | None = msgspec.field(default=None, name="_debug_render_only")


class FunctionBody(msgspec.Struct, frozen=True, kw_only=True):
    index: int | None = None
    name: str = ""
    arguments: dict[str, Any] | None = None
    """An object here; OpenAI has a string."""


class ToolCallBody(msgspec.Struct, frozen=True, kw_only=True):
    function: FunctionBody
    id: str | None = None


class MessageBody(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Base64] | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ToolFunctionBody(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(msgspec.Struct, frozen=True, kw_only=True):
    function: ToolFunctionBody
    type: str | None = None


class ChatBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    messages: list[MessageBody] | None = None
    tools: list[ToolBody] | None = None
    format: Any = None
    stream: bool | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    debug_render_only: bool | None = msgspec.field(default=None, name="_debug_render_only")


class EmbedBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    input: Any = None
    """string or [string]"""
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """The older, single form."""

    model: str | None = None
    prompt: str | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
