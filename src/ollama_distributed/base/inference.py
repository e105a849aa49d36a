"""The one internal form of an inference request and of what comes back.

Each dialect (seed, Ollama, OpenAI, Anthropic) is a pure pair of functions around this
module: bytes in -> `InferenceRequest`, events -> bytes out. Nothing here knows a wire
format. A field that a dialect does not have keeps its default, and `None` always means
"not asked for": the model's own parameters, then the built-in defaults apply.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.priority import Priority as Priority

# ── what is asked ───────────────────────────────────────────────────────────────────


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Per-request options, Ollama's names. `None`: not asked for."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    """Negative: random."""
    num_predict: int | None = None
    """Most tokens to generate; negative: until the model stops or the context is full."""
    num_keep: int | None = None
    stop: tuple[str, ...] | None = None
    logit_bias: Mapping[str, float] | None = None
    """Token id, as a decimal string -> bias (OpenAI's form)."""
    ignore_eos: bool | None = None
    """Never choose a token that ends an answer."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options that shape the loaded model; a request that changes one reloads the runner."""

    num_ctx: int | None = None
    """Context of one slot, tokens."""
    num_batch: int | None = None
    num_gpu: int | None = None
    """Layers on the GPU; negative or None: as many as fit."""
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it. Complete in a result, a fragment in a delta."""
    index: int = 0


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: tuple[bytes, ...] = ()
    """Decoded image files (PNG, JPEG, ...)."""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str = ""
    parameters: Mapping[str, Any] = {}
    """JSON schema of the arguments."""


class NamedTool(msgspec.Struct, frozen=True):
    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Completion of one text; the model's template is applied unless `raw`."""

    text: str
    suffix: str = ""
    """Fill in the middle; needs the capability `insert`."""
    system: str | None = None
    template: str | None = None
    """A Modelfile TEMPLATE (Go syntax) in place of the model's."""
    context: tuple[int, ...] = ()
    """Token ids of an earlier answer, put before the prompt."""
    images: tuple[bytes, ...] = ()
    raw: bool = False


class TokensPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Completion of token ids, used as they are."""

    ids: tuple[int, ...]


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True


class JsonObject(msgspec.Struct, frozen=True, tag="json"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, tag="schema"):
    schema: Mapping[str, Any]


Format = JsonObject | JsonSchema
Think = bool | Literal["low", "medium", "high", "max"]


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    request_id: RequestId
    identity: Identity
    model: str
    """The name as the client wrote it."""
    prompt: TextPrompt | TokensPrompt | ChatPrompt
    sampling: Sampling = Sampling()
    options: LoadOptions = LoadOptions()
    format: Format | None = None
    think: Think | None = None
    think_if_able: bool = False
    """`think` is a wish, not a demand: a model that cannot is no error (Anthropic's clients
    ask for it whatever the model is)."""
    keep_alive_s: float | None = None
    """Seconds the model stays loaded after this request; negative: for ever; None: the
    server's default."""
    truncate: bool = True
    """Cut a prompt that is too long (oldest messages first, system kept); else refuse."""
    shift: bool = True
    """Slide the window when the context fills up; else stop with `length`."""
    logprobs: bool = False
    top_logprobs: int = 0
    load_only: bool = False
    """Only load the model (or unload it, with `keep_alive_s` 0); the prompt is empty."""
    want_context: bool = False
    """`Finished.context` must carry the token ids of prompt and answer."""
    whole: bool = False
    """Nobody sees a part of the answer before its end: until then it may be begun again."""
    resume_at: int | None = None
    """Take up the answer of this `request_id` again (re-attach): the client has so many bytes of
    its text already, thinking included, in UTF-8."""
    render_only: bool = False
    """Answer with the rendered prompt instead of generating (Ollama's _debug_render_only)."""
    priority: Priority = "normal"
    """The class in which it waits for a slot."""
    within_s: float | None = None
    """Seconds from now within which it must have a slot; None: as long as the node lets wait."""
    progress: bool = False
    """While it waits it is told how its place changes."""


# ── what comes back ─────────────────────────────────────────────────────────────────


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: builtins.bytes


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: builtins.bytes
    top: tuple[TopLogprob, ...] = ()


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """The model is loaded and the prompt accepted: no refusal can come any more."""

    prompt_tokens: int = 0
    """0 when the engine has not said yet."""
    node: str = ""
    """Name of the node that answers; empty: this one."""
    route: str = ""
    """Why that node, in a word; empty: there was no choice."""


class Queued(msgspec.Struct, frozen=True, kw_only=True, tag="queued"):
    """It waits for a slot; may come several times, before `Opened` only."""

    position: int
    """1: the next one, unless somebody comes who goes before."""
    eta_s: float | None = None
    """Seconds that the wait will take, as far as can be told; None: it cannot."""
    node: str = ""
    """Name of the node where it waits; empty: this one."""


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag="moved"):
    """The node that answered was lost; what follows comes from another, without a gap."""

    node: str = ""
    """As in `Opened`."""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """A piece of the answer; any of the parts may be empty."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`, those that the prefix cache held."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    total_s: float = 0.0
    load_s: float = 0.0
    """Until a runner was there."""
    wait_s: float = 0.0
    """Of that, for a slot of a model that was loaded."""
    prompt_s: float = 0.0
    completion_s: float = 0.0


FinishReason = Literal["stop", "length", "tool_calls", "load", "unload"]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The last event of an answer that went well."""

    reason: FinishReason
    usage: Usage = Usage()
    stop_sequence: str | None = None
    """The stop text that ended it, if one did."""
    context: tuple[int, ...] = ()
    rendered: str | None = None
    """The prompt, for `render_only`."""
    rendered_images: int = 0
    moves: int = 0
    """Times that it went on at another node."""
    spent: Usage | None = None
    """What was had of it here, where an earlier part was had by another request (it was taken up
    again); None: all of `usage`."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last event of an answer that did not."""

    error: OllamaDistributedError


Event = Queued | Opened | Moved | Delta | Finished | Failed


class Sink(Protocol):
    """Takes the events of one answer, in order; called on the event loop, never blocks.

    `Queued` comes while it waits; `Opened` at most once and then first; then any `Delta`s and `Moved`;
    then exactly one of
    `Finished` or `Failed`, after which nothing comes. Nothing comes after `cancel()`.
    """

    def __call__(self, event: Event, /) -> None: ...


class Generation(Protocol):
    """A running answer. All methods return at once and may be called at any time."""

    def cancel(self) -> None:
        """Stop generating and free the slot (within 1 s). Idempotent."""
        ...

    def pause(self) -> None:
        """The reader is slow: stop reading from the engine (backpressure)."""
        ...

    def resume(self) -> None: ...


class LiveAnswer(Generation, Protocol):
    """A generation that counts."""

    def used(self) -> Usage:
        """What was had of it so far; when it has ended, in all."""
        ...


# ── the other questions ─────────────────────────────────────────────────────────────


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    request_id: RequestId
    identity: Identity
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    """Texts or token ids. Empty: only load the model."""
    truncate: bool = True
    dimensions: int | None = None
    """Keep the first so many numbers and normalise again."""
    normalize: bool = True
    keep_alive_s: float | None = None
    options: LoadOptions = LoadOptions()
    priority: Priority = "normal"
    """As in `InferenceRequest`."""
    within_s: float | None = None
    """As in `InferenceRequest`."""


class EmbedResult(msgspec.Struct, frozen=True, kw_only=True):
    vectors: tuple[tuple[float, ...], ...]
    """[input, dimension]"""
    usage: Usage = Usage()
    node: str = ""
    """Name of the node that answered; empty: this one."""
    route: str = ""
    """As in `Opened`."""


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    request_id: RequestId
    identity: Identity
    model: str
    query: str
    documents: tuple[str, ...]
    keep_alive_s: float | None = None
    options: LoadOptions = LoadOptions()
    priority: Priority = "normal"
    """As in `InferenceRequest`."""
    within_s: float | None = None
    """As in `InferenceRequest`."""


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    scores: tuple[float, ...]
    """Relevance of each document, in the documents' order; higher is better."""
    usage: Usage = Usage()
    node: str = ""
    """As in `EmbedResult`."""
    route: str = ""
    """As in `Opened`."""


class Inference(Protocol):
    """What every dialect asks of the rest of the node."""

    def open(self, request: InferenceRequest, sink: Sink) -> LiveAnswer:
        """Start an answer. Never raises: refusals come as `Failed`."""
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...

    async def rerank(self, request: RerankRequest) -> RerankResult: ...

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Tokens of the rendered prompt. Loads the model if need be; generates nothing."""
        ...
