"""llama-server's native protocol: our requests to its JSON, its events to ours. Pure.

Requests are built field by field from typed ones: nothing a client wrote reaches the
runner under a name of its own (security table S-13). Always streamed, always with
progress: only then does the server see that a client left while the prompt is read
(trap 2). Checked against llama.cpp b11549 and b11669.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.llamacpp.guidance import guided
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema
from ollama_distributed.adapters.engines.llamacpp.vocabulary import Fragments
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
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, Progress, Tokens
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


class _Chunk(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    prompt_progress: WireProgress | None = None
    completion_probabilities: list[WireLogprob] | None = None
    timings: WireTimings | None = None
    error: WireError | None = None


class _ErrorBody(msgspec.Struct):
    error: WireError


_chunk = msgspec.json.Decoder(_Chunk)
_error_body = msgspec.json.Decoder(_ErrorBody)


class CompletionStream:
    """Turns the events of `/completion` and `/infill` into engine events.

    The id of the end-of-text token is never given out: it is no part of the answer, and
    an answer that is continued elsewhere must not go on after it.
    """

    def __init__(
        self, *, fragments: Fragments | None = None, stop_at_tokens: int | None = None, top_logprobs: int = 0
    ) -> None:
        """`stop_at_tokens`: prompt and answer together; at it the answer ends with `length`
        (the context is full and must not be shifted)."""
        self._fragments = fragments
        self._stop_at = stop_at_tokens
        self._top = top_logprobs
        self._predicted = 0
        self._cached = 0
        self._silent: list[int] = []
        """Ids of tokens without text, held until it is known whether the last one is the end."""

    def feed(self, data: bytes) -> list[EngineEvent]:
        """The engine events of one server event. After `Done` or `EngineFailed` comes nothing.

        Raises:
            EngineError: it is not what llama-server sends.
        """
        if data == b"[DONE]":
            return []
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError as exc:
            raise EngineError("the engine sent an event that is not its protocol") from exc
        if chunk.error is not None:
            return [EngineFailed(error_of(500, chunk.error))]
        if chunk.prompt_progress is not None:  # its `tokens` is [0] without meaning
            progress = chunk.prompt_progress
            self._cached = progress.cache
            return [Progress(total=progress.total, processed=progress.processed, cached=progress.cache)]
        if chunk.stop:
            return self._ended(chunk)
        if not chunk.tokens:
            return []
        return self._token(chunk)

    def _token(self, chunk: _Chunk) -> list[EngineEvent]:
        missing = chunk.tokens_predicted - self._predicted - len(chunk.tokens)
        self._predicted = chunk.tokens_predicted
        ids = tuple(chunk.tokens)
        if missing > 0 and self._fragments is not None:
            ids = (self._fragments.withheld(missing, chunk.content, ids[0]) or ()) + ids
        logprobs: tuple[TokenLogprob, ...] = ()
        if chunk.completion_probabilities:
            logprobs = tuple(token_logprob(p, self._top) for p in chunk.completion_probabilities)
        if missing > 0 and len(logprobs) == 1:
            # Only the token that completed the character came with a figure: it stands for all of them.
            whole = chunk.content
            logprobs = (msgspec.structs.replace(logprobs[0], token=whole, bytes=whole.encode()),)
        events: list[EngineEvent] = []
        if chunk.content:
            events.append(Tokens((*self._silent, *ids), chunk.content, logprobs))
            self._silent.clear()
        else:
            self._silent.extend(ids)
        if self._stop_at is not None and chunk.tokens_evaluated + self._predicted + 1 >= self._stop_at:
            events.append(
                Done(
                    reason="length",
                    prompt_tokens=chunk.tokens_evaluated,
                    cached_tokens=self._cached,
                    completion_tokens=self._predicted,
                )
            )
        return events

    def _ended(self, chunk: _Chunk) -> list[EngineEvent]:
        if chunk.stop_type == "eos":
            del self._silent[-1:]
        events: list[EngineEvent] = [Tokens(tuple(self._silent), "")] if self._silent else []
        timings = chunk.timings or WireTimings()
        events.append(
            Done(
                reason="length" if chunk.stop_type == "limit" else "stop",
                prompt_tokens=chunk.tokens_evaluated,
                cached_tokens=timings.cache_n,
                completion_tokens=chunk.tokens_predicted,
                prompt_s=(timings.prompt_ms or 0.0) / 1000,
                completion_s=(timings.predicted_ms or 0.0) / 1000,
            )
        )
        return events


class FormatStream:
    """A `CompletionStream` under a `format`: an answer that ended by itself must be JSON.

    The safety net below `check_schema`: a schema that the engine dropped after all is an
    error at the end, not free text that passes for an answer.
    """

    def __init__(self, stream: CompletionStream) -> None:
        self._stream = stream
        self._text: list[str] = []

    def feed(self, data: bytes) -> list[EngineEvent]:
        events = self._stream.feed(data)
        for i, event in enumerate(events):
            if isinstance(event, Tokens):
                self._text.append(event.text)
            elif isinstance(event, Done) and event.reason == "stop" and not _is_json("".join(self._text)):
                events[i] = EngineFailed(
                    EngineError("the engine did not keep the format: its answer is no JSON")
                )
        return events


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_int=str, parse_float=str)  # a number of any length is one
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return True  # too deep to tell
    return True


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
