"""What the inference routes answer, for the OpenAPI document.

The encoders write bytes without these; `tests/unit/gateway/test_openapi.py` holds every answer
against them. A field with a default may be absent; clients should expect fields that come later.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class _Body(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


# ── Ollama and ours ─────────────────────────────────────────────────────────────────


class OllamaTopLogprob(_Body, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] = []


class OllamaLogprob(OllamaTopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[OllamaTopLogprob] = []


class OllamaFunction(_Body, frozen=True, kw_only=True):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(_Body, frozen=True, kw_only=True):
    id: str
    function: OllamaFunction


class QueuePlace(_Body, frozen=True, kw_only=True):
    """While the request waits, for who asked with `X-Ollama-Progress`."""

    position: int
    eta_s: float | None


class _Counted(_Body, frozen=True, kw_only=True):
    """What the last line, or the whole answer, has beside the text. Durations in nanoseconds, none of 0."""

    done: bool
    """False in all lines of a stream but the last."""
    done_reason: str = ""
    """`stop`, `length`, `load`, `unload`."""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    """Tokens of the prompt."""
    prompt_eval_cached_count: int | msgspec.UnsetType = msgspec.UNSET
    """Those of them that the slot had kept; 0 is told too."""
    prompt_eval_duration: int = 0
    eval_count: int = 0
    """Tokens of the answer."""
    eval_duration: int = 0
    failovers: int = 0
    """How often the answer went on at another node."""
    logprobs: list[OllamaLogprob] = []
    queue: QueuePlace | None = None


class GenerateAnswer(_Counted, frozen=True, kw_only=True):
    """Of `generate`: the whole answer, or a line of its stream."""

    model: str
    created_at: str
    response: str
    thinking: str = ""
    tool_calls: list[OllamaToolCall] = []
    context: list[int] = []


class OllamaMessage(_Body, frozen=True, kw_only=True):
    role: str
    content: str
    thinking: str = ""
    tool_calls: list[OllamaToolCall] = []


class ChatAnswer(_Counted, frozen=True, kw_only=True):
    """Of `chat`: the whole answer, or a line of its stream."""

    model: str
    created_at: str
    message: OllamaMessage


class EmbedAnswer(_Body, frozen=True, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class EmbeddingAnswer(_Body, frozen=True, kw_only=True):
    """The older, single form."""

    embedding: list[float]


# ── OpenAI ──────────────────────────────────────────────────────────────────────────


class CachedTokens(_Body, frozen=True, kw_only=True):
    cached_tokens: int


class ReasoningTokens(_Body, frozen=True, kw_only=True):
    reasoning_tokens: int


class OpenAIUsage(_Body, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class OpenAITopLogprob(_Body, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class OpenAILogprob(OpenAITopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[OpenAITopLogprob]


class OpenAILogprobs(_Body, frozen=True, kw_only=True):
    content: list[OpenAILogprob]
    refusal: None


class OpenAIFunctionCall(_Body, frozen=True, kw_only=True):
    name: str
    arguments: str
    """JSON."""


class OpenAICall(_Body, frozen=True, kw_only=True):
    id: str
    type: Literal["function"]
    function: OpenAIFunctionCall


class OpenAIAssistant(_Body, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str = ""
    reasoning_content: str = ""
    """The same, under another name that clients read."""
    tool_calls: list[OpenAICall] = []
    function_call: OpenAIFunctionCall | None = None


class ChatChoice(_Body, frozen=True, kw_only=True):
    index: int
    message: OpenAIAssistant
    logprobs: OpenAILogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class ChatCompletion(_Body, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


class CompletionLogprobs(_Body, frozen=True, kw_only=True):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(_Body, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Body, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class InputUsage(_Body, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingRow(_Body, frozen=True, kw_only=True):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Text: base64 of little-endian float32."""


class EmbeddingList(_Body, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: InputUsage


class OutputText(_Body, frozen=True, kw_only=True):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[OpenAILogprob]


class SummaryText(_Body, frozen=True, kw_only=True):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(_Body, tag_field="type", tag="reasoning", frozen=True, kw_only=True):
    id: str
    status: str
    summary: list[SummaryText]


class MessageItem(_Body, tag_field="type", tag="message", frozen=True, kw_only=True):
    id: str
    status: str
    role: Literal["assistant"]
    content: list[OutputText]


class CallItem(_Body, tag_field="type", tag="function_call", frozen=True, kw_only=True):
    id: str
    status: str
    call_id: str
    name: str
    arguments: str
    """JSON."""
    namespace: str = ""


class CustomCallItem(_Body, tag_field="type", tag="custom_tool_call", frozen=True, kw_only=True):
    id: str
    status: str
    call_id: str
    name: str
    input: str
    """Free text."""
    namespace: str = ""


class ResponseInputDetails(_Body, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(_Body, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseError(_Body, frozen=True, kw_only=True):
    code: str
    """Of OpenAI's list."""
    message: str
    type: str
    """Our code."""


class ResponseAnswer(_Body, frozen=True, kw_only=True):
    """OpenAI's `response`: what was asked, how it stands, and the output."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[ReasoningItem | MessageItem | CallItem | CustomCallItem]
    usage: ResponseUsage | None
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    background: bool
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: str
    user: str | None


# ── Anthropic ───────────────────────────────────────────────────────────────────────


class TextBlock(_Body, tag_field="type", tag="text", frozen=True, kw_only=True):
    text: str


class ThinkingBlock(_Body, tag_field="type", tag="thinking", frozen=True, kw_only=True):
    thinking: str
    signature: str
    """Empty."""


class ToolUseBlock(_Body, tag_field="type", tag="tool_use", frozen=True, kw_only=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, str]


class ThinkingTokens(_Body, frozen=True, kw_only=True):
    thinking_tokens: int


class MessageUsage(_Body, frozen=True, kw_only=True):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: dict[str, int]
    output_tokens: int
    output_tokens_details: ThinkingTokens
    inference_geo: Literal["not_available"]
    service_tier: Literal["standard"]


class MessageAnswer(_Body, frozen=True, kw_only=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "tool_use", "stop_sequence"]
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


class TokenCount(_Body, frozen=True, kw_only=True):
    input_tokens: int


# ── Cohere and Jina ─────────────────────────────────────────────────────────────────


class RankedText(_Body, frozen=True, kw_only=True):
    text: str


class RankedRow(_Body, frozen=True, kw_only=True):
    index: int
    """Of the document in the request."""
    relevance_score: float
    document: RankedText | None = None


class RerankAnswer(_Body, frozen=True, kw_only=True):
    """The best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RankedRow]
    usage: InputUsage
