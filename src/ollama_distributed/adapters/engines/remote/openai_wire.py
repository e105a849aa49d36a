"""The JSON of OpenAI-compatible servers (vLLM, SGLang, others), out and in. Pure.

llama-server has routes of its own that say more; they are spoken by `llamacpp.protocol`.
Sources: OpenAI API reference (completions, chat, streaming); vLLM "OpenAI-Compatible
Server" (extra parameters, `return_token_ids`); SGLang "OpenAI APIs".
"""

from __future__ import annotations

import functools
import hmac
import re
from typing import Any, Literal

import msgspec

from ollama_distributed.adapters.engines.llamacpp.chat import template_body
from ollama_distributed.adapters.engines.llamacpp.protocol import prompt_value
from ollama_distributed.base.errors import (
    ContextExceeded,
    EngineError,
    Invalid,
    ModelNotFound,
    OllamaDistributedError,
    QueueFull,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import (
    Format,
    JsonObject,
    JsonSchema,
    NamedTool,
    Sampling,
)
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest

ServerKind = Literal["vllm", "sglang", "llama-server", "openai"]

_CONTEXT = re.compile(
    r"maximum context length|context length|exceeds? the (model's )?context|too long", re.IGNORECASE
)
_NUMBERS = re.compile(r"\d+")

# ── out ─────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=1024)
def cache_salt(tenant: str, secret: str) -> str:
    """What keeps a tenant's part of vLLM's prefix cache apart: the same on each node that knows the
    server's key, and not to be guessed by others who may ask that server."""
    return hmac.new(secret.encode(), tenant.encode(), "sha256").hexdigest()


def completion_body(
    model: str, request: CompletionRequest, kind: ServerKind, *, secret: str = ""
) -> dict[str, Any]:
    """`secret`: of the server, for `cache_salt`.

    Raises:
        Unsupported: `/v1/completions` cannot say it.
    """
    if request.images:
        raise Unsupported("this engine takes images in a chat only")
    if request.grammar:
        raise Unsupported("this engine takes a JSON schema, but no grammar")
    prompt = prompt_value(request.prompt)
    if isinstance(prompt, list) and any(isinstance(part, str) for part in prompt):
        raise Unsupported("this engine takes a prompt as text or as token ids, not as both")
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        **_shared(request.sampling, request.format, kind),
    }
    if request.suffix:
        body["suffix"] = request.suffix
    if request.top_logprobs is not None:
        body["logprobs"] = request.top_logprobs
    if kind == "vllm":
        body |= {"return_token_ids": True, "skip_special_tokens": True, "add_special_tokens": True}
    if kind == "vllm" and request.tenant:
        body["cache_salt"] = cache_salt(request.tenant, secret)
    return body


def chat_body(model: str, request: ChatRequest, kind: ServerKind, *, secret: str = "") -> dict[str, Any]:
    """As `completion_body`."""
    tools = () if request.tool_choice == "none" else request.tools
    body = template_body(request.messages, tools, request.think)
    if kind == "openai":
        # Extensions of the others; a strict server refuses what it does not know.
        body.pop("add_generation_prompt", None)
        body.pop("chat_template_kwargs", None)
    body["model"] = model
    body |= _shared(request.sampling, request.format, kind)
    if request.whole:
        body["stream"] = False
        del body["stream_options"]
    if tools:
        body["parallel_tool_calls"] = request.parallel_tool_calls
        match request.tool_choice:
            case NamedTool(name):
                body["tool_choice"] = {"type": "function", "function": {"name": name}}
            case choice:
                body["tool_choice"] = choice
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if kind == "vllm" and request.tenant:
        body["cache_salt"] = cache_salt(request.tenant, secret)
    return body


def _shared(sampling: Sampling, form: Format | None, kind: ServerKind) -> dict[str, Any]:
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    if sampling.temperature is not None:
        body["temperature"] = sampling.temperature
    if sampling.top_p is not None:
        body["top_p"] = sampling.top_p
    if sampling.presence_penalty is not None:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty is not None:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.num_predict is not None and sampling.num_predict >= 0:
        body["max_tokens"] = sampling.num_predict
    if sampling.seed is not None and sampling.seed >= 0:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = dict(sampling.logit_bias)
    if kind in ("vllm", "sglang"):
        if sampling.top_k:  # 0 is "off" to us and an error to them
            body["top_k"] = sampling.top_k
        if sampling.min_p is not None:
            body["min_p"] = sampling.min_p
        if sampling.repeat_penalty is not None:
            body["repetition_penalty"] = sampling.repeat_penalty
        if sampling.ignore_eos:
            body["ignore_eos"] = True
    match form:
        case JsonObject():
            body["response_format"] = {"type": "json_object"}
        case JsonSchema(schema):
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": dict(schema)},
            }
        case None:
            pass
    return body


# ── errors, metrics, models ─────────────────────────────────────────────────────────


def read_error(status: int, body: bytes) -> OllamaDistributedError:
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        value = None
    message = ""
    if isinstance(value, dict):
        error = value.get("error", value)
        message = error if isinstance(error, str) else str(error.get("message") or error.get("detail") or "")
    return error_of(status, message or f"the engine answered with status {status}")


def error_of(status: int, message: str) -> OllamaDistributedError:
    if status in (400, 413, 422, 500) and _CONTEXT.search(message):
        numbers = sorted({int(n) for n in _NUMBERS.findall(message)}, reverse=True)
        context = numbers[1] if len(numbers) > 1 else 0
        return ContextExceeded(message, prompt_tokens=numbers[0] if context else 0, context_tokens=context)
    match status:
        case 400 | 413 | 422:
            return Invalid(message)
        case 401 | 403:
            return Unauthenticated(f"the engine refused the node's key: {message}")
        case 404:
            return ModelNotFound(message)
        case 429:
            return QueueFull(message)
        case 501:
            return Unsupported(message)
        case 503:
            return Unavailable(message)
        case _:
            return EngineError(message)


class Gauges(msgspec.Struct, frozen=True):
    """Names of a server's figures in its `/metrics`."""

    busy: str
    queued: str
    speed: str = ""
    kv: tuple[str, ...] = ()


GAUGES: dict[ServerKind, Gauges] = {
    "vllm": Gauges("vllm:num_requests_running", "vllm:num_requests_waiting",
                   kv=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")),
    "sglang": Gauges("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:gen_throughput",
                     ("sglang:token_usage",)),
    "llama-server": Gauges("llamacpp:requests_processing", "llamacpp:requests_deferred",
                           "llamacpp:predicted_tokens_seconds", ("llamacpp:kv_cache_usage_ratio",)),
}  # fmt: skip


def gauge(text: str, name: str) -> float | None:
    """The sum of a metric over its labels (engines, ranks); None when it is not there."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE) if name else []
    try:
        return sum(map(float, found)) if found else None
    except ValueError:
        return None


def kind_of(owner: str) -> ServerKind:
    """From `owned_by` in `/v1/models`."""
    known: dict[str, ServerKind] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server"}
    return known.get(owner.lower(), "openai")
