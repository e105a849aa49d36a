"""POST /v1/messages and /v1/messages/count_tokens: the request.

Source: Anthropic API reference "Messages" (2026-11). `cache_control`, `metadata`,
`service_tier` and thinking signatures change nothing here and are ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.inference import (
    ChatPrompt,
    Format,
    InferenceRequest,
    JsonSchema,
    Message,
    Think,
    Tool,
    ToolCall,
    ToolChoice,
)
from ollama_distributed.gateway.dialects.contract import RequestContext
from ollama_distributed.gateway.dialects.fields import (
    IMAGE_TYPES,
    INT_MAX,
    decode_base64,
    json_arguments,
    need_model,
    stops,
    within,
)
from ollama_distributed.gateway.dialects.openai_messages import checked_tools, named_tool
from ollama_distributed.gateway.dialects.options import keep_alive_s, merged_options

# ── what comes in ───────────────────────────────────────────────────────────────────


class AnthropicSource(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    media_type: str = ""
    data: str = ""


class AnthropicBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A content block of any type."""

    type: str = ""
    text: str | None = None
    source: AnthropicSource | str | None = None
    """A struct; a plain string in `search_result`."""
    title: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[AnthropicBlock] | None = None
    is_error: bool | None = None
    thinking: str | None = None


class AnthropicMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[AnthropicBlock]


class AnthropicTool(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "auto"
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    budget_tokens: int | None = None


class AnthropicFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    schema: dict[str, Any] | None = None


class AnthropicOutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None = None
    format: AnthropicFormat | None = None


class MessagesIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    max_tokens: int | None = None
    messages: list[AnthropicMessage] | None = None
    system: str | list[AnthropicBlock] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutputConfig | None = None
    output_format: AnthropicFormat | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


def inference_request(
    row: MessagesIn, context: RequestContext, *, counting: bool = False
) -> InferenceRequest:
    """The internal request. `counting`: only the prompt matters, and `max_tokens` may be missing."""
    model = need_model(row.model)
    if row.max_tokens is None and not counting:
        raise Invalid("max_tokens is required and must be greater than 0", param="max_tokens")
    if not row.messages:
        raise Invalid("messages must hold at least one message", param="messages")
    offered = _tools(row.tools)
    drawn, loading = merged_options(
        row.options,
        num_predict=within("max_tokens", row.max_tokens, 1, INT_MAX),
        temperature=within("temperature", row.temperature, 0.0, 2.0),
        top_p=within("top_p", row.top_p, 0.0, 1.0),
        top_k=within("top_k", row.top_k, 0, INT_MAX),
        stop=stops("stop_sequences", row.stop_sequences),
    )
    return InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        prompt=ChatPrompt(
            messages=(*_system(row.system), *_messages(row.messages)),
            tools=offered,
            tool_choice=_tool_choice(row.tool_choice, offered),
            parallel_tool_calls=not (row.tool_choice and row.tool_choice.disable_parallel_tool_use),
        ),
        sampling=drawn,
        options=loading,
        format=_format(row),
        think=_think(row),
        think_if_able=True,  # agents send an effort to every model by habit
        keep_alive_s=keep_alive_s(row.keep_alive),
    )


# ── messages ────────────────────────────────────────────────────────────────────────


def _system(system: str | list[AnthropicBlock] | None) -> tuple[Message, ...]:
    text = _text_of("system", system) if system else ""
    return (Message(role="system", content=text),) if text else ()


def _text_of(at: str, content: str | list[AnthropicBlock]) -> str:
    if isinstance(content, str):
        return content
    text, images = _text_and_images(at, content)
    if images:
        raise Invalid(f"{at} takes text only", param=at)
    return text


def _messages(rows: list[AnthropicMessage]) -> list[Message]:
    found: list[Message] = []
    names: dict[str, str] = {}
    """Tool use id -> tool name, for results that carry the id only."""
    for i, row in enumerate(rows):
        at = f"messages[{i}]"
        if row.role == "assistant":
            found.append(_assistant(f"{at}.content", row.content, names))
        elif row.role == "user":
            found += _user(f"{at}.content", row.content, names)
        elif row.role == "system":
            found.append(Message(role="system", content=_text_of(f"{at}.content", row.content)))
        else:
            raise Invalid(f'{at}.role must be user or assistant, got "{row.role}"', param=f"{at}.role")
    return found


def _assistant(at: str, content: str | list[AnthropicBlock], names: dict[str, str]) -> Message:
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(content):
        here = f"{at}[{i}]"
        match block.type:
            case "text":
                texts.append(block.text or "")
            case "thinking":
                thinking.append(block.thinking or "")
            case "redacted_thinking":
                pass  # encrypted by another provider: there is nothing to read
            case "tool_use":
                if not block.id or not block.name:
                    raise Invalid(f"{here}: a tool_use block needs id and name", param=here)
                arguments = json_arguments(f"{here}.input", block.input)
                calls.append(ToolCall(id=block.id, name=block.name, arguments=arguments, index=len(calls)))
                names[block.id] = block.name
            case _:
                raise _unsupported(here, block)
    return Message(
        role="assistant", content="".join(texts), thinking="".join(thinking), tool_calls=tuple(calls)
    )


def _user(at: str, content: str | list[AnthropicBlock], names: dict[str, str]) -> list[Message]:
    """Tool results first, as messages of their own; then what the user says."""
    if isinstance(content, str):
        return [Message(role="user", content=content)]
    found: list[Message] = []
    for i, block in enumerate(content):
        if block.type == "tool_result":
            found.append(_result(f"{at}[{i}]", block, names))
    if len(found) < len(content):
        text, images = _text_and_images(at, content)
        found.append(Message(role="user", content=text, images=images))
    return found


def _result(at: str, block: AnthropicBlock, names: dict[str, str]) -> Message:
    if not block.tool_use_id:
        raise Invalid(f"{at}.tool_use_id is required", param=f"{at}.tool_use_id")
    text, images = (
        _text_and_images(f"{at}.content", block.content)
        if isinstance(block.content, list)
        else (block.content or "", ())
    )
    if block.is_error:
        text = f"Error: {text}"
    return Message(
        role="tool",
        content=text,
        images=images,
        tool_name=names.get(block.tool_use_id, ""),
        tool_call_id=block.tool_use_id,
    )


def _text_and_images(at: str, blocks: list[AnthropicBlock]) -> tuple[str, tuple[bytes, ...]]:
    texts: list[str] = []
    images: list[bytes] = []
    for i, block in enumerate(blocks):
        here = f"{at}[{i}]"
        match block.type:
            case "text":
                if block.text is None:
                    raise Invalid(f"{here}.text is required", param=f"{here}.text")
                texts.append(block.text)
            case "image":
                images.append(_image(f"{here}.source", block.source))
            case "document":
                texts.append(_document(f"{here}.source", block))
            case "search_result":
                parts = [block.title or "", _text_of(f"{here}.content", block.content or "")]
                texts.append("\n".join(part for part in parts if part))
            case "tool_result":
                pass  # a message of its own
            case _:
                raise _unsupported(here, block)
    return "\n".join(texts), tuple(images)


def _image(at: str, source: AnthropicSource | str | None) -> bytes:
    if not isinstance(source, AnthropicSource) or source.type != "base64":
        raise Unsupported(f"{at} must have the type base64; images are not fetched from URLs", param=at)
    if source.media_type and source.media_type.lower() not in IMAGE_TYPES:
        raise Invalid(f'{at}.media_type "{source.media_type}" is not supported', param=f"{at}.media_type")
    return decode_base64(f"{at}.data", source.data)


def _document(at: str, block: AnthropicBlock) -> str:
    if not isinstance(block.source, AnthropicSource) or block.source.type != "text":
        raise Unsupported(f"{at}: only documents of the type text are supported, no PDF", param=at)
    return "\n".join(part for part in (block.title or "", block.source.data) if part)


def _unsupported(at: str, block: AnthropicBlock) -> Unsupported:
    return Unsupported(f'{at}.type "{block.type}" is not supported', param=f"{at}.type")


# ── tools, thinking, format ─────────────────────────────────────────────────────────


def _tools(rows: list[AnthropicTool] | None) -> tuple[Tool, ...]:
    """Those that the caller runs. Tools that Anthropic runs itself (`web_search_...`) are left out where such
    are offered too: agents send them to every server by habit. Alone they are refused."""
    found: list[Tool] = []
    usable = any(row.type in _OURS for row in rows or ())
    for i, row in enumerate(rows or ()):
        at = f"tools[{i}]"
        if row.type not in _OURS:
            if usable:
                continue
            raise Unsupported(
                f'{at}.type "{row.type}" is not supported; only tools with an input_schema are',
                param=f"{at}.type",
            )
        if not row.name:
            raise Invalid(f"{at}.name is required", param=f"{at}.name")
        if row.input_schema is None:
            raise Invalid(f"{at}.input_schema is required", param=f"{at}.input_schema")
        found.append(Tool(name=row.name, description=row.description or "", parameters=row.input_schema))
    return checked_tools(found)


_OURS = (None, "custom")
"""Types of tools that the caller runs."""


def _tool_choice(row: AnthropicToolChoice | None, offered: tuple[Tool, ...]) -> ToolChoice:
    match row.type if row else "auto":
        case "auto":
            return "auto"
        case "none":
            return "none"
        case "any":
            if not offered:
                raise Invalid('tool_choice "any" needs tools', param="tool_choice")
            return "required"
        case "tool":
            return named_tool(row.name if row else "", offered)
        case other:
            raise Invalid(
                f'tool_choice.type must be auto, any, tool or none, got "{other}"', param="tool_choice.type"
            )


_EFFORT: dict[str, Think] = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "max"}


def _think(row: MessagesIn) -> Think | None:
    """As Ollama reads it: `thinking` decides; without it the effort does."""
    effort = row.output_config.effort if row.output_config else None
    if effort is not None and effort not in _EFFORT:
        raise Invalid(
            f'output_config.effort must be one of {", ".join(_EFFORT)}, got "{effort}"',
            param="output_config.effort",
        )
    match row.thinking.type if row.thinking else "adaptive":
        case "enabled":
            return True
        case "disabled":
            return False
        case "adaptive" | "between_tools":
            return _EFFORT[effort] if effort else None
        case other:
            raise Invalid(
                f'thinking.type must be enabled, disabled or adaptive, got "{other}"', param="thinking.type"
            )


def _format(row: MessagesIn) -> Format | None:
    form = row.output_config.format if row.output_config and row.output_config.format else row.output_format
    if form is None:
        return None
    if form.type != "json_schema" or form.schema is None:
        raise Invalid(
            "output_config.format must be of the type json_schema and have a schema",
            param="output_config.format",
        )
    return JsonSchema(form.schema)
