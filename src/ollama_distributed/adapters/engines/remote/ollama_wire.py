"""Ollama's JSON, out and in. Pure. Source: `reference/ollama-api.md`, sections 3, 4, 7, 8."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from ollama_distributed.base.errors import (
    ContextExceeded,
    EngineError,
    Invalid,
    ModelNotFound,
    OllamaDistributedError,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import (
    Format,
    JsonObject,
    JsonSchema,
    Message,
    Sampling,
    Think,
    TokenLogprob,
    Tool,
    ToolCall,
    TopLogprob,
)
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Tokens
from ollama_distributed.models.spec import Architecture, ModelSpec, RemoteModel
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty",
    "presence_penalty", "frequency_penalty", "num_predict", "num_keep",
)  # fmt: skip

# ── out ─────────────────────────────────────────────────────────────────────────────


def options(sampling: Sampling, plan: LoadPlan) -> dict[str, Any]:
    values: dict[str, Any] = {"num_ctx": plan.context_tokens}
    for name in _SAMPLING:
        value = getattr(sampling, name)
        if value is not None:
            values[name] = value
    if sampling.seed is not None and sampling.seed >= 0:
        values["seed"] = sampling.seed
    if sampling.logit_bias:
        raise Unsupported("Ollama takes no logit_bias")
    return values


def generate_body(model: str, request: CompletionRequest, plan: LoadPlan) -> dict[str, Any]:
    """Raises `Unsupported` for token ids and grammars, which Ollama's API does not take."""
    if isinstance(request.prompt, str):
        prompt = request.prompt
    else:
        texts = [part for part in request.prompt if isinstance(part, str)]
        if len(texts) != len(request.prompt):
            raise Unsupported("Ollama takes text only: an answer cannot be continued from token ids there")
        prompt = "".join(texts)
    if request.grammar:
        raise Unsupported("Ollama takes a JSON schema, but no grammar")
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "raw": not request.suffix,
        "stream": True,
        "options": options(request.sampling, plan),
        "shift": request.shift,
        "truncate": False,
        **_format(request.format),
        **_logprobs(request.top_logprobs),
    }
    if request.images:
        body["images"] = [base64.b64encode(image).decode() for image in request.images]
    if request.suffix:
        body["suffix"] = request.suffix
    return body


def chat_body(model: str, request: ChatRequest, plan: LoadPlan) -> dict[str, Any]:
    """Raises `Unsupported` for a tool that must be called: Ollama has no `tool_choice`."""
    if request.tool_choice not in ("auto", "none"):
        raise Unsupported("Ollama cannot be told to call a tool (tool_choice)")
    tools = request.tools if request.tool_choice == "auto" else ()
    return {
        **template_body(model, request.messages, tools, request.think),
        "stream": True,
        "options": options(request.sampling, plan),
        "truncate": False,
        **_format(request.format),
        **_logprobs(request.top_logprobs),
    }


def template_body(
    model: str, messages: Sequence[Message], tools: Sequence[Tool], think: Think | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [_message(m) for m in messages]}
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
            }
            for t in tools
        ]
    if think is not None:
        body["think"] = think
    return body


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        value["thinking"] = message.thinking
    if message.images:
        value["images"] = [base64.b64encode(image).decode() for image in message.images]
    if message.tool_calls:
        value["tool_calls"] = [
            {"id": c.id, "function": {"index": c.index, "name": c.name, "arguments": _arguments(c)}}
            for c in message.tool_calls
        ]
    if message.tool_name:
        value["tool_name"] = message.tool_name
    if message.tool_call_id:
        value["tool_call_id"] = message.tool_call_id
    return value


def _arguments(call: ToolCall) -> Any:
    try:
        return msgspec.json.decode(call.arguments or "{}")
    except msgspec.DecodeError as exc:
        raise Invalid(f"the arguments of the tool call {call.name!r} are not JSON") from exc


def _format(form: Format | None) -> dict[str, Any]:
    match form:
        case None:
            return {}
        case JsonObject():
            return {"format": "json"}
        case JsonSchema(schema):
            return {"format": dict(schema)}


def _logprobs(top: int | None) -> dict[str, Any]:
    return {} if top is None else {"logprobs": True, "top_logprobs": top}


# ── in ──────────────────────────────────────────────────────────────────────────────


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class _Logprob(_Top):
    top_logprobs: list[_Top] = []


class _Function(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Answer(msgspec.Struct):
    content: str = ""
    thinking: str = ""
    tool_calls: list[_Call] = []


class _Line(msgspec.Struct):
    response: str = ""
    thinking: str = ""
    message: _Answer | None = None
    logprobs: list[_Logprob] | None = None
    done: bool = False
    done_reason: str = "stop"
    prompt_eval_count: int = 0
    prompt_eval_cached_count: int = 0
    eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_duration: int = 0
    error: str = ""


_line = msgspec.json.Decoder(_Line)


class OllamaStream:
    """Turns the lines of `/api/generate` and `/api/chat` into engine events."""

    def __init__(self) -> None:
        self._calls = 0

    def feed(self, data: bytes) -> list[EngineEvent]:
        """Raises `EngineError` for a line that is not Ollama's."""
        try:
            line = _line.decode(data)
        except msgspec.DecodeError as exc:
            raise EngineError("the engine sent a line that is not its protocol") from exc
        if line.error:
            return [EngineFailed(error_of(500, line.error))]
        events: list[EngineEvent] = []
        logprobs = tuple(_token_logprob(entry) for entry in line.logprobs or ())
        if line.message is not None:
            delta = ChatDelta(
                text=line.message.content,
                thinking=line.message.thinking,
                tool_calls=tuple(self._call(call) for call in line.message.tool_calls),
                logprobs=logprobs,
            )
            if delta != ChatDelta():
                events.append(delta)
        elif line.response or logprobs:
            events.append(Tokens((), line.response, logprobs))
        if line.done:
            events.append(self._done(line))
        return events

    def _call(self, call: _Call) -> ToolCall:
        index, self._calls = self._calls, self._calls + 1
        arguments = bytes(call.function.arguments).decode()
        return ToolCall(
            id=call.id or f"call_{index}", name=call.function.name, arguments=arguments, index=index
        )

    def _done(self, line: _Line) -> Done:
        reason = "length" if line.done_reason == "length" else "stop"
        return Done(
            reason="tool_calls" if self._calls else "length" if reason == "length" else "stop",
            prompt_tokens=line.prompt_eval_count,
            cached_tokens=line.prompt_eval_cached_count,
            completion_tokens=line.eval_count,
            prompt_s=line.prompt_eval_duration / 1e9,
            completion_s=line.eval_duration / 1e9,
        )


def _token_logprob(entry: _Logprob) -> TokenLogprob:
    return TokenLogprob(
        entry.token,
        entry.logprob,
        bytes(entry.bytes or entry.token.encode()),
        tuple(TopLogprob(t.token, t.logprob, bytes(t.bytes or t.token.encode())) for t in entry.top_logprobs),
    )


def read_error(status: int, body: bytes) -> OllamaDistributedError:
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        value = None
    message = value.get("error") if isinstance(value, dict) else None
    return error_of(status, message if isinstance(message, str) else f"Ollama answered with status {status}")


def error_of(status: int, message: str) -> OllamaDistributedError:
    if ("exceeds" in message and "context" in message) or "input length" in message:
        return ContextExceeded(message)
    if "does not support" in message:
        return Unsupported(message)
    match status:
        case 404:
            return ModelNotFound(message)
        case 400:
            return Invalid(message)
        case 503:
            return Unavailable(message)
        case _:
            return EngineError(message)


# ── models ──────────────────────────────────────────────────────────────────────────

_KNOWN = frozenset({"completion", "tools", "insert", "vision", "embedding", "thinking", "audio"})


def model_spec(engine: str, tag: dict[str, Any], show: dict[str, Any], name: str, display: str) -> ModelSpec:
    """From one entry of `/api/tags` and the answer of `/api/show`."""
    details: dict[str, Any] = show.get("details") or tag.get("details") or {}
    info: dict[str, Any] = show.get("model_info") or {}
    family = str(info.get("general.architecture") or details.get("family") or "")

    def number(key: str) -> int:
        value = info.get(f"{family}.{key}")
        return value if isinstance(value, int) else 0

    heads = number("attention.head_count")
    length = number("embedding_length")
    head = length // heads if heads else 0
    able = frozenset(c for c in show.get("capabilities") or ["completion"] if c in _KNOWN)
    return ModelSpec(
        name=name,
        display=display,
        digest=str(tag.get("digest", "")).removeprefix("sha256:"),
        size_bytes=int(tag.get("size", 0)),
        modified_at=_seconds(tag.get("modified_at")),
        architecture=Architecture(
            name=family,
            layers=number("block_count"),
            context_tokens=number("context_length"),
            embedding_length=length,
            heads=heads,
            kv_heads=number("attention.head_count_kv") or heads,
            key_length=number("attention.key_length") or head,
            value_length=number("attention.value_length") or head,
            parameters=int(info.get("general.parameter_count") or 0),
            file_type=str(details.get("quantization_level") or ""),
        ),
        remote=RemoteModel(engine=engine, name=str(tag["name"])),
        template=str(show.get("template") or ""),
        license=(str(show["license"]),) if show.get("license") else (),
        capabilities=able,
        families=tuple(details.get("families") or ([family] if family else [])),
        pooling="mean" if able == {"embedding"} else "",
    )


def _seconds(value: object) -> float:
    try:
        return msgspec.convert(value, type=datetime).timestamp()
    except (msgspec.ValidationError, OverflowError):
        return 0.0
