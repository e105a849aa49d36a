"""POST /v1/chat/completions: the request.

Source: OpenAI API reference "Create chat completion". Fields that change nothing here
(`user`, `metadata`, `store`, `service_tier`, ...) are accepted and ignored.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.inference import ChatPrompt, InferenceRequest
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.fields import decode, need_model, within
from ollama_distributed.gateway.dialects.openai_chat_answer import ChatBody, ChatStream
from ollama_distributed.gateway.dialects.openai_messages import (
    OpenAIFormat,
    OpenAIFunction,
    OpenAIMessage,
    OpenAITool,
    OpenAIToolChoice,
    messages,
    response_format,
    think,
    tool_choice,
    tools,
)
from ollama_distributed.gateway.dialects.openai_sampling import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    ServerFields,
    StreamOptions,
    choices,
    max_tokens,
    sampling,
)
from ollama_distributed.gateway.dialects.options import keep_alive_s


class OpenAIReasoning(msgspec.Struct, frozen=True):
    effort: str | None = None


class ChatIn(ServerFields, frozen=True, kw_only=True):
    model: str | None = None
    messages: list[OpenAIMessage] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[OpenAITool] | None = None
    tool_choice: str | OpenAIToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[OpenAIFunction] | None = None
    function_call: str | OpenAIFunction | None = None
    response_format: OpenAIFormat | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    reasoning: OpenAIReasoning | None = None
    modalities: list[str] | None = None


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
    beside = row.beside()
    if row.tools or row.functions or row.response_format:
        beside.pop("ignore_eos", None)  # a call or a form ends where it is complete
    drawn, loading = sampling(
        row,
        num_predict=max_tokens("max_completion_tokens", row.max_completion_tokens)
        or max_tokens("max_tokens", row.max_tokens),
        bias=row.logit_bias,
        beside=beside,
    )
    first = InferenceRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        prompt=prompt,
        sampling=drawn,
        options=loading,
        format=response_format(row.response_format),
        think=think("reasoning_effort", effort),
        think_if_able=True,  # agents send an effort to every model by habit
        keep_alive_s=keep_alive_s(row.keep_alive),
        logprobs=bool(row.logprobs),
        top_logprobs=top_logprobs,
        whole=not row.stream,
    )
    count = within("n", row.n, 1, MAX_CHOICES) or 1
    requests = choices(first, count)
    if row.stream:
        usage = bool(row.stream_options and row.stream_options.include_usage)
        return Generate(
            requests, ChatStream(context, model, count, with_usage=usage, legacy=legacy), stream=True
        )
    return Generate(requests, ChatBody(context, model, count, legacy=legacy), stream=False)


def _prompt(row: ChatIn, rows: list[OpenAIMessage]) -> tuple[ChatPrompt, bool]:
    """The prompt, and whether the caller speaks the older `functions`."""
    if row.tools is None and row.functions is None and row.tool_choice is None:
        return ChatPrompt(
            messages=messages(rows), parallel_tool_calls=row.parallel_tool_calls is not False
        ), False
    legacy = bool(row.functions) and not row.tools
    if legacy:
        offered = tools([OpenAITool(function=function) for function in row.functions or ()])
        call = row.function_call
        wanted = (
            OpenAIToolChoice(type="function", function=call) if isinstance(call, OpenAIFunction) else call
        )
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
