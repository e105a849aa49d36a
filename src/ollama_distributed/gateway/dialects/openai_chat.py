"""POST /v1/chat/completions: the request.

Source: OpenAI API reference "Create chat completion". Fields that change nothing here
(`user`, `metadata`, `store`, `service_tier`, ...) are accepted and ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import ChatPrompt, InferenceRequest
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.fields import INT_MAX, SEED_MAX, decode, need_model, stops, within
from ollama_distributed.gateway.dialects.openai_chat_answer import ChatBody, ChatStream
from ollama_distributed.gateway.dialects.openai_messages import (
    ChoiceIn,
    FormatIn,
    FunctionIn,
    MessageIn,
    ToolIn,
    messages,
    response_format,
    think,
    tool_choice,
    tools,
)
from ollama_distributed.gateway.dialects.options import Options, keep_alive_s, load_options, sampling

MAX_CHOICES = 128
"""OpenAI's own bound on `n`; each choice is a generation of its own."""
MAX_TOP_LOGPROBS = 20


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Reasoning(msgspec.Struct, frozen=True):
    effort: str | None = None


class ChatIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    messages: list[MessageIn] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ToolIn] | None = None
    tool_choice: str | ChoiceIn | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionIn] | None = None
    function_call: str | FunctionIn | None = None
    response_format: FormatIn | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    modalities: list[str] | None = None
    options: Options | None = None
    keep_alive: str | float | None = None


_DECODER = msgspec.json.Decoder(ChatIn)


def parse_chat(body: bytes, context: RequestContext) -> Generate:
    row = decode(body, _DECODER)
    model = need_model(row.model)
    if not row.messages:
        raise Invalid("[] is too short - 'messages'", param="messages")
    if "audio" in (row.modalities or ()):
        raise Unsupported("Audio output is not supported", param="modalities")
    prompt, legacy = _prompt(row, row.messages)
    top_logprobs = within("top_logprobs", row.top_logprobs, 0, MAX_TOP_LOGPROBS) or 0
    if top_logprobs and not row.logprobs:
        raise Invalid("top_logprobs needs logprobs: true", param="top_logprobs")
    effort = row.reasoning_effort or (row.reasoning.effort if row.reasoning else None)
    first = InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        prompt=prompt,
        sampling=sampling(
            row.options,
            **common_sampling(row),
            num_predict=max_tokens("max_completion_tokens", row.max_completion_tokens)
            or max_tokens("max_tokens", row.max_tokens),
            logit_bias=logit_bias(row.logit_bias),
        ),
        options=load_options(row.options),
        format=response_format(row.response_format),
        think=think("reasoning_effort", effort),
        keep_alive_s=keep_alive_s(row.keep_alive),
        logprobs=bool(row.logprobs),
        top_logprobs=top_logprobs,
    )
    count = within("n", row.n, 1, MAX_CHOICES) or 1
    requests = choices(first, count)
    if row.stream:
        usage = bool(row.stream_options and row.stream_options.include_usage)
        return Generate(
            requests, ChatStream(context, model, count, with_usage=usage, legacy=legacy), stream=True
        )
    return Generate(requests, ChatBody(context, model, count, legacy=legacy), stream=False)


def _prompt(row: ChatIn, rows: list[MessageIn]) -> tuple[ChatPrompt, bool]:
    """The prompt, and whether the caller speaks the older `functions`."""
    legacy = bool(row.functions) and not row.tools
    if legacy:
        offered = tools([ToolIn(function=function) for function in row.functions or ()])
        call = row.function_call
        wanted = ChoiceIn(type="function", function=call) if isinstance(call, FunctionIn) else call
    else:
        offered = tools(row.tools)
        wanted = row.tool_choice
    usable, choice = tool_choice(wanted, offered)
    prompt = ChatPrompt(
        messages=messages(rows),
        tools=usable,
        tool_choice=choice,
        parallel_tool_calls=row.parallel_tool_calls is not False and not legacy,
    )
    return prompt, legacy


# ── shared with /v1/completions ─────────────────────────────────────────────────────


def common_sampling(row: Any) -> dict[str, Any]:
    """The fields that chat and completions share. OpenAI's defaults differ from Ollama's:
    temperature and top_p are 1.0 unless the caller, or its `options`, say otherwise."""
    options: Options | None = row.options
    temperature = within("temperature", row.temperature, 0.0, 2.0)
    if temperature is None and (options is None or options.temperature is None):
        temperature = 1.0
    top_p = within("top_p", row.top_p, 0.0, 1.0)
    if top_p is None and (options is None or options.top_p is None):
        top_p = 1.0
    return {
        "temperature": temperature,
        "top_p": top_p,
        "presence_penalty": within("presence_penalty", row.presence_penalty, -2.0, 2.0),
        "frequency_penalty": within("frequency_penalty", row.frequency_penalty, -2.0, 2.0),
        "seed": within("seed", row.seed, -SEED_MAX, SEED_MAX),
        "stop": stops("stop", row.stop),
    }


def max_tokens(param: str, value: int | None) -> int | None:
    """Negative, as some clients send it: no limit. 0 is refused: nothing could be answered."""
    if value is None:
        return None
    if value == 0 or value > INT_MAX:
        raise Invalid(
            f"{param} must be at least 1, got {value}" if not value else f"{param} is too large", param=param
        )
    return max(value, -1)


def logit_bias(bias: dict[str, float] | None) -> dict[str, float] | None:
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit()):
            raise Invalid(f'logit_bias keys are token ids, got "{token}"', param="logit_bias")
        within(f"logit_bias.{token}", value, -100.0, 100.0)
    return bias or None


def choices(first: InferenceRequest, count: int) -> tuple[InferenceRequest, ...]:
    """`count` requests that differ in id, and in seed where one was given."""
    if count == 1:
        return (first,)
    return (first, *(_sibling(first, number) for number in range(1, count)))


def _sibling(first: InferenceRequest, number: int) -> InferenceRequest:
    drawn = first.sampling
    if drawn.seed is not None and drawn.seed >= 0:
        drawn = msgspec.structs.replace(drawn, seed=(drawn.seed + number) & INT_MAX)
    return msgspec.structs.replace(
        first, request_id=RequestId(f"{first.request_id}-{number}"), sampling=drawn
    )
