"""The Ollama dialect: `/api/generate`, `/api/chat`, `/api/embed`, `/api/embeddings`.

Source: Ollama's `server/routes.go` and `api/types.go` as digested in
`reference/ollama-api.md`; the texts of errors are Ollama's, for clients compare them.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import msgspec

from ollama_distributed.base.errors import Invalid, ModelNotFound, OllamaDistributedError
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    EmbedRequest,
    Format,
    InferenceRequest,
    JsonObject,
    JsonSchema,
    Message,
    TextPrompt,
    Think,
    Tool,
    ToolCall,
)
from ollama_distributed.gateway.dialects.contract import (
    Call,
    Embed,
    ErrorResponse,
    Generate,
    HotRoute,
    RequestContext,
)
from ollama_distributed.gateway.dialects.fields import decode, decode_base64
from ollama_distributed.gateway.dialects.ollama_answer import (
    CHAT,
    GENERATE,
    ErrorLine,
    LineStream,
    Shape,
    Whole,
    embed_answer,
    embeddings_answer,
)
from ollama_distributed.gateway.dialects.ollama_options import read_options
from ollama_distributed.gateway.dialects.ollama_wire import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    MessageBody,
    ToolBody,
)
from ollama_distributed.gateway.dialects.options import keep_alive_s
from ollama_distributed.gateway.errors import ollama_error_body, render_ollama

_GENERATE = msgspec.json.Decoder(GenerateBody)
_CHAT = msgspec.json.Decoder(ChatBody)
_EMBED = msgspec.json.Decoder(EmbedBody)
_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsBody)

_ROLES = ("system", "user", "assistant", "tool")
_LEVELS = ("high", "medium", "low", "max")


def parse_generate(body: bytes, context: RequestContext) -> Call:
    return generate_call(decode(body, _GENERATE), context, streams=True, error_line=ollama_error_body)


def parse_chat(body: bytes, context: RequestContext) -> Call:
    return chat_call(decode(body, _CHAT), context, streams=True, error_line=ollama_error_body)


def parse_embed(body: bytes, context: RequestContext) -> Call:
    return embed_call(decode(body, _EMBED), context)


def parse_embeddings(body: bytes, context: RequestContext) -> Call:
    row = decode(body, _EMBEDDINGS)
    if not row.model:
        raise Invalid("model is required", param="model")
    _, loading = read_options(row.options)
    request = EmbedRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=row.model,
        inputs=(row.prompt,) if row.prompt else (),
        normalize=False,
        keep_alive_s=keep_alive_s(row.keep_alive),
        options=loading,
    )
    return Embed(request, embeddings_answer)


def generate_call(
    row: GenerateBody, context: RequestContext, *, streams: bool, error_line: ErrorLine
) -> Generate:
    """`streams`: whether a body without `stream` asks for a stream."""
    _check_top_logprobs(row.top_logprobs)
    if not row.model:
        raise ModelNotFound("model '' not found")
    if row.raw and (row.template or row.system or row.context):
        raise Invalid("raw mode does not support template, system, or context")
    sampling, loading = read_options(row.options)
    prompt = TextPrompt(
        text=row.prompt or "",
        suffix=row.suffix or "",
        system=row.system or None,
        template=row.template or None,
        context=tuple(row.context or ()),
        images=_images("images", row.images),
        raw=bool(row.raw),
    )
    request = InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=row.model,
        prompt=prompt,
        sampling=sampling,
        options=loading,
        format=read_format(row.format),
        think=read_think(row.think),
        keep_alive_s=keep_alive_s(row.keep_alive),
        truncate=row.truncate is not False,
        shift=row.shift is not False,
        logprobs=bool(row.logprobs),
        top_logprobs=row.top_logprobs or 0,
        load_only=not row.prompt,
        want_context=not row.raw,
        render_only=bool(row.debug_render_only and row.prompt),
    )
    return _call(GENERATE, request, context, streams if row.stream is None else row.stream, error_line)


def chat_call(row: ChatBody, context: RequestContext, *, streams: bool, error_line: ErrorLine) -> Generate:
    """`streams`: whether a body without `stream` asks for a stream."""
    _check_top_logprobs(row.top_logprobs)
    if not row.model:
        raise Invalid("model is required", param="model")
    sampling, loading = read_options(row.options)
    request = InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=row.model,
        prompt=ChatPrompt(
            messages=tuple(_message(one, number) for number, one in enumerate(row.messages or ())),
            tools=tuple(_tool(one) for one in row.tools or ()),
        ),
        sampling=sampling,
        options=loading,
        format=read_format(row.format),
        think=read_think(row.think),
        keep_alive_s=keep_alive_s(row.keep_alive),
        truncate=row.truncate is not False,
        shift=row.shift is not False,
        logprobs=bool(row.logprobs),
        top_logprobs=row.top_logprobs or 0,
        load_only=not row.messages,
        render_only=bool(row.debug_render_only and row.messages),
    )
    return _call(CHAT, request, context, streams if row.stream is None else row.stream, error_line)


def embed_call(row: EmbedBody, context: RequestContext) -> Embed:
    inputs = _inputs(row.input)
    if not row.model:
        raise ModelNotFound("model '' not found")
    _, loading = read_options(row.options)
    model = row.model
    request = EmbedRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        inputs=inputs,
        truncate=row.truncate is not False,
        dimensions=row.dimensions if row.dimensions and row.dimensions > 0 else None,
        keep_alive_s=keep_alive_s(row.keep_alive),
        options=loading,
    )
    return Embed(request, lambda result: embed_answer(model, result))


def _call(
    shape: Shape, request: InferenceRequest, context: RequestContext, stream: bool, error_line: ErrorLine
) -> Generate:
    # Loading and rendering have one answer, whatever was asked.
    if stream and not request.load_only and not request.render_only:
        lines = LineStream(
            shape,
            model=request.model,
            request_id=request.request_id,
            wall=context.wall,
            error_line=error_line,
        )
        return Generate((request,), lines, stream=True)
    whole = Whole(
        shape,
        model=request.model,
        request_id=request.request_id,
        wall=context.wall,
        render_only=request.render_only,
    )
    return Generate((request,), whole, stream=False)


def read_format(value: Any) -> Format | None:
    if value is None or value == "":
        return None
    if value == "json":
        return JsonObject()
    if isinstance(value, dict):
        return JsonSchema(value)
    shown = msgspec.json.encode(value).decode()
    raise Invalid(
        f'invalid format: {shown[:80]}; expected "json" or a valid JSON Schema object', param="format"
    )


def read_think(value: bool | str | None) -> Think | None:
    if value is None or isinstance(value, bool):
        return value
    if value not in _LEVELS:
        raise Invalid(
            f'invalid think value: "{value[:80]}" (must be "high", "medium", "low", "max", true, or false)',
            param="think",
        )
    return cast(Literal["low", "medium", "high", "max"], value)


def _check_top_logprobs(value: int | None) -> None:
    if value is not None and not 0 <= value <= 20:
        raise Invalid("top_logprobs must be between 0 and 20", param="top_logprobs")


def _inputs(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise Invalid("invalid input type", param="input")


def _message(row: MessageBody, number: int) -> Message:
    role = row.role.lower()
    if role not in _ROLES:
        raise Invalid(
            f"invalid role: {role[:80]}, role must be one of [system, user, assistant, tool]",
            param=f"messages[{number}].role",
        )
    return Message(
        role=cast(Literal["system", "user", "assistant", "tool"], role),
        content=row.content or "",
        images=_images(f"messages[{number}].images", row.images),
        thinking=row.thinking or "",
        tool_calls=tuple(
            ToolCall(
                id=call.id or "",
                name=call.function.name,
                arguments=msgspec.json.encode(call.function.arguments or {}).decode(),
                index=call.function.index or place,
            )
            for place, call in enumerate(row.tool_calls or ())
        ),
        tool_name=row.tool_name or "",
        tool_call_id=row.tool_call_id or "",
    )


def _images(param: str, texts: list[str] | None) -> tuple[bytes, ...]:
    return tuple(decode_base64(f"{param}[{number}]", text) for number, text in enumerate(texts or ()))


def _tool(row: ToolBody) -> Tool:
    function = row.function
    return Tool(
        name=function.name, description=function.description or "", parameters=function.parameters or {}
    )


def render_scheduled(error: OllamaDistributedError, request_id: RequestId) -> ErrorResponse:
    """The embedding routes' errors: a missing model has another text there."""
    if (
        type(error) is ModelNotFound
        and error.message.startswith("model '")
        and error.message != "model '' not found"
    ):
        name = error.message.removeprefix("model '").split("'", 1)[0]
        error = ModelNotFound(f'model "{name}" not found, try pulling it first')
    return render_ollama(error, request_id)


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/api/generate", parse_generate, render_ollama, large_body=True),
    HotRoute("POST", "/api/chat", parse_chat, render_ollama, large_body=True),
    HotRoute("POST", "/api/embed", parse_embed, render_scheduled),
    HotRoute("POST", "/api/embeddings", parse_embeddings, render_scheduled),
)
