"""llama-server's native protocol: our requests to its JSON, its errors to ours. Pure.

Requests are built field by field from typed ones: nothing a client wrote reaches the
runner under a name of its own (security table S-13). Always streamed, always with
progress: only then does the server see that a client left while the prompt is read
(trap 2). Checked against llama.cpp b11549 and b11669.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.llamacpp.guidance import guided
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema
from ollama_distributed.base.errors import (
    ContextExceeded,
    EngineError,
    Invalid,
    OllamaDistributedError,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import (
    Format,
    JsonObject,
    JsonSchema,
    Sampling,
    TokenLogprob,
    TopLogprob,
)
from ollama_distributed.serving.ports import CompletionRequest

SAMPLERS = ["penalties", "top_k", "typ_p", "top_p", "min_p", "temperature"]
"""Penalties see all candidates, temperature only those that are left: Ollama's meaning."""
UNLIKELY = -9999.0
"""Stands for a log probability of minus infinity, which JSON cannot hold (OpenAI's value)."""
MAX_BIAS = 100.0
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)", re.DOTALL)

# ── out ─────────────────────────────────────────────────────────────────────────────


def completion_path(request: CompletionRequest) -> str:
    return "/infill" if request.suffix else "/completion"


def completion_body(request: CompletionRequest, *, context_tokens: int) -> dict[str, Any]:
    """The JSON of a completion. `context_tokens`: of one slot.

    Raises:
        Invalid: a value that the engine cannot take.
    """
    body: dict[str, Any] = {
        "stream": True,
        "return_progress": True,
        "return_tokens": True,
        "cache_prompt": True,
        **sampling_fields(request.sampling, context_tokens=context_tokens),
        **format_fields(request.format, request.grammar),
    }
    if request.top_logprobs is not None:
        body["n_probs"] = max(1, request.top_logprobs)
    if request.suffix:
        if not isinstance(request.prompt, str) or request.images:
            raise Invalid("fill in the middle takes plain text around the gap")
        # The tokens around the gap come from the model's vocabulary.
        body |= {"prompt": "", "input_prefix": request.prompt, "input_suffix": request.suffix}
    elif request.images:
        if not isinstance(request.prompt, str):
            raise Invalid("a prompt with images must be text")
        body["prompt"] = {
            "prompt_string": request.prompt,
            "multimodal_data": [base64.b64encode(image).decode() for image in request.images],
        }
    else:
        body["prompt"] = prompt_value(request.prompt)
    return body


def prompt_value(prompt: str | tuple[int, ...] | tuple[str | tuple[int, ...], ...]) -> str | list[str | int]:
    """Text, ids, or a mix in one flat list. Texts that follow each other are joined: a list
    of texts alone would be several prompts to the server."""
    if isinstance(prompt, str):
        return prompt
    flat: list[str | int] = []
    for part in prompt:
        if isinstance(part, int):
            flat.append(part)
        elif isinstance(part, str):
            if flat and isinstance(flat[-1], str):
                flat[-1] += part
            elif part:
                flat.append(part)
        else:
            flat.extend(part)
    if len(flat) == 1 and isinstance(flat[0], str):
        return flat[0]
    if not flat:
        return ""
    return flat


def sampling_fields(sampling: Sampling, *, context_tokens: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"samplers": SAMPLERS}

    def put(name: str, value: float | None, low: float = -math.inf, high: float = math.inf) -> None:
        if value is not None:
            if not math.isfinite(value):
                raise Invalid(f"{name} must be a finite number")
            fields[name] = min(max(value, low), high)

    put("temperature", sampling.temperature, 0.0)
    put("top_k", sampling.top_k, 0)
    put("top_p", sampling.top_p, 0.0, 1.0)
    put("min_p", sampling.min_p, 0.0, 1.0)
    put("typical_p", sampling.typical_p, 0.0, 1.0)
    put("repeat_penalty", sampling.repeat_penalty, 0.0)
    put("presence_penalty", sampling.presence_penalty)
    put("frequency_penalty", sampling.frequency_penalty)
    put("n_predict", sampling.num_predict, -1, 2**31 - 1)
    put("n_keep", sampling.num_keep, -1, context_tokens)
    if sampling.repeat_last_n is not None:
        last = sampling.repeat_last_n
        fields["repeat_last_n"] = context_tokens if last < 0 else min(last, context_tokens)
    if sampling.seed is not None and sampling.seed >= 0:
        fields["seed"] = sampling.seed & 0xFFFF_FFFF
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    if sampling.logit_bias:
        fields["logit_bias"] = [_bias(token, value) for token, value in sampling.logit_bias.items()]
    return fields


def _bias(token: str, value: float) -> list[int | float]:
    if not (token.isascii() and token.isdigit()) or not math.isfinite(value):
        raise Invalid(f"logit_bias maps token ids to numbers, not {token[:20]!r}")
    return [int(token), min(max(value, -MAX_BIAS), MAX_BIAS)]


def format_fields(output: Format | None, grammar: str = "") -> dict[str, Any]:
    """Raises:
    Invalid: the schema cannot be kept.
    """
    match output:
        case None:
            return {"grammar": grammar} if grammar else {}
        case JsonObject():
            return {"json_schema": guided({"type": "object"})}
        case JsonSchema(schema):
            check_schema(schema)
            return {"json_schema": guided(schema or {"type": "object"})}


# ── in ──────────────────────────────────────────────────────────────────────────────


class WireTop(msgspec.Struct):
    token: str = ""
    bytes: list[int] | None = None
    logprob: float | None = None


class WireLogprob(WireTop):
    top_logprobs: list[WireTop] = []


class WireProgress(msgspec.Struct):
    total: int
    processed: int
    cache: int = 0


class WireTimings(msgspec.Struct):
    cache_n: int = 0
    prompt_ms: float | None = 0.0
    predicted_n: int = 0
    predicted_ms: float | None = 0.0


class WireError(msgspec.Struct):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _ErrorBody(msgspec.Struct):
    error: WireError


_error_body = msgspec.json.Decoder(_ErrorBody)


def token_logprob(wire: WireLogprob, top: int) -> TokenLogprob:
    return TokenLogprob(
        token=wire.token,
        logprob=_finite(wire.logprob),
        bytes=bytes(wire.bytes or ()),
        top=tuple(
            TopLogprob(token=t.token, logprob=_finite(t.logprob), bytes=bytes(t.bytes or ()))
            for t in wire.top_logprobs[:top]
        ),
    )


def _finite(logprob: float | None) -> float:
    return UNLIKELY if logprob is None else max(logprob, UNLIKELY)


def error_of_body(status: int, body: bytes) -> OllamaDistributedError:
    """The error that an answer with a status of 400 or more stands for."""
    try:
        return error_of(status, _error_body.decode(body).error)
    except msgspec.DecodeError:
        return EngineError(f"the engine answered with status {status}")


def error_of(status: int, error: WireError) -> OllamaDistributedError:
    message = error.message or f"the engine answered with status {status}"
    if error.type == "exceed_context_size_error":
        return context_exceeded(error.n_prompt_tokens, error.n_ctx)
    if found := _TOO_LARGE.search(message):
        return context_exceeded(int(found[1]), int(found[2]))
    if "json_schema" in message or "grammar" in message:
        return Invalid(f"format: {message}")
    if "input is not supported" in message:  # images or sound for a model without a projector
        return Unsupported(message.partition(" - hint")[0])
    match error.type:
        case "invalid_request_error":
            return Invalid(message)
        case "not_supported_error":
            return Unsupported(message)
        case "unavailable_error":
            return Unavailable(message)
        case _:
            return EngineError(message)


def context_exceeded(prompt_tokens: int, context_tokens: int) -> ContextExceeded:
    return ContextExceeded(
        f"the prompt has {prompt_tokens} tokens; the context holds {context_tokens}",
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )


def metric(text: str, name: str) -> float:
    """A value of Prometheus text; 0 when it is not there."""
    found = re.search(rf"^llamacpp:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    try:
        return float(found[1]) if found else 0.0
    except ValueError:
        return 0.0
