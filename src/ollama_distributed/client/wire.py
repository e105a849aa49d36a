"""What the SDK sends and gets: one struct per JSON object, fields named as on the wire.

Requests leave out every field that was not set, so the server's and the model's own defaults
apply. Answers ignore fields that this version does not know: a newer server stays readable.
Times ending in `_duration` are integer nanoseconds, as in Ollama's API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from ollama_distributed.base.disk import EvictAnswer

Think = bool | Literal["low", "medium", "high", "max"]
Format = Literal["json"] | Mapping[str, Any]
KeepAlive = str | float
"""A duration (`"5m"`) or seconds; negative: for ever; 0: unload after this request."""
Image = bytes
"""A PNG or JPEG file's bytes; in base64 on the wire."""

# ── inference ───────────────────────────────────────────────────────────────────────


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    prompt: str = ""
    """Empty: only load the model (or unload it, with `keep_alive` 0)."""
    suffix: str | None = None
    images: Sequence[Image] | None = None
    system: str | None = None
    template: str | None = None
    context: Sequence[int] | None = None
    raw: bool = False
    format: Format | None = None
    stream: bool = False
    """Set by the method that is called: `generate` or `generate_stream`."""
    keep_alive: KeepAlive | None = None
    options: Mapping[str, Any] | None = None
    think: Think | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ToolFunction(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    arguments: Mapping[str, Any] = {}
    index: int | None = None


class ToolCall(msgspec.Struct, kw_only=True, omit_defaults=True):
    function: ToolFunction
    id: str = ""


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = msgspec.field(default_factory=str)
    """Sent even when it is empty (a factory's default is not left out)."""
    thinking: str | None = None
    images: Sequence[Image] | None = None
    tool_calls: Sequence[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    messages: Sequence[Message | Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    format: Format | None = None
    stream: bool = False
    keep_alive: KeepAlive | None = None
    options: Mapping[str, Any] | None = None
    think: Think | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: Sequence[int] | None = None


class Logprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: Sequence[int] | None = None
    top_logprobs: Sequence[TopLogprob] = ()


class Timings(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The counts and durations of an answer's last object; zeros are left out on the wire."""

    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_cached_count: int = 0
    """Those tokens of the prompt that were kept from before."""
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class GenerateResponse(Timings, kw_only=True, omit_defaults=True):
    """A whole answer, or one piece of a streamed one."""

    model: str = ""
    created_at: str = ""
    response: str = msgspec.field(default_factory=str)
    thinking: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Sequence[Logprob] | None = None
    done: bool = False
    done_reason: str | None = None
    context: Sequence[int] | None = None


class ChatResponse(Timings, kw_only=True, omit_defaults=True):
    """A whole answer, or one piece of a streamed one."""

    model: str = ""
    created_at: str = ""
    message: Message = msgspec.field(default_factory=lambda: Message(role="assistant"))
    logprobs: Sequence[Logprob] | None = None
    done: bool = False
    done_reason: str | None = None


class EmbeddingsRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    input: str | Sequence[str]
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: KeepAlive | None = None
    options: Mapping[str, Any] | None = None


class EmbeddingsResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    embeddings: Sequence[Sequence[float]]
    """[input, dimension]"""
    model: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class RerankRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    query: str
    documents: Sequence[str]
    top_n: int | None = None
    return_documents: bool | None = None


class RerankResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int
    """Into the request's `documents`."""
    relevance_score: float
    document: Any = None


class RerankResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    results: Sequence[RerankResult]
    """Best first."""
    model: str = ""


# ── models ──────────────────────────────────────────────────────────────────────────


class ModelDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: Sequence[str] | None = None
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int | None = None
    embedding_length: int | None = None


class ModelInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str = ""
    model: str = ""
    modified_at: datetime | None = None
    size: int = 0
    """Bytes."""
    digest: str = ""
    """Hex, without `sha256:`."""
    details: ModelDetails = msgspec.field(default_factory=ModelDetails)
    capabilities: Sequence[str] = ()


class ModelList(msgspec.Struct, kw_only=True):
    models: Mapping[str, ModelInfo] = {}


class EngineInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What runs a model."""

    name: str = ""
    variant: str = ""
    """`wheel`, `binary`, `built`, or a remote engine's address."""
    version: str = ""
    instruction_set: str = ""
    devices: Sequence[str] = ()
    sandbox: str = ""
    """What holds its processes back, in words, or `none`."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.variant, self.version, self.instruction_set)))


class LoadedModel(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    model: str = ""
    size: int = 0
    """Bytes of memory."""
    size_vram: int = 0
    digest: str = ""
    details: ModelDetails = msgspec.field(default_factory=ModelDetails)
    expires_at: datetime | None = None
    context_length: int = 0
    slots: int = 0
    slots_busy: int = 0
    engine: EngineInfo | None = None


class LoadedList(msgspec.Struct, kw_only=True):
    models: Sequence[LoadedModel] = ()


class ShowResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    license: str = ""
    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    system: str = ""
    renderer: str = ""
    parser: str = ""
    details: ModelDetails = msgspec.field(default_factory=ModelDetails)
    messages: Sequence[Message] | None = None
    model_info: Mapping[str, Any] = {}
    projector_info: Mapping[str, Any] | None = None
    tensors: Sequence[Mapping[str, Any]] | None = None
    capabilities: Sequence[str] = ()
    modified_at: datetime | None = None
    requires: str = ""


class CreateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a new model is made of; `from_` is `from` on the wire."""

    model: str
    from_: str | None = msgspec.field(name="from", default=None)
    files: Mapping[str, str] | None = None
    """File name -> digest (`sha256:…`) of a blob that was sent before."""
    adapters: Mapping[str, str] | None = None
    template: str | None = None
    license: str | Sequence[str] | None = None
    system: str | None = None
    parameters: Mapping[str, Any] | None = None
    messages: Sequence[Message | Mapping[str, Any]] | None = None
    quantize: str | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None


class Progress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a long operation."""

    status: str = ""
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


class Transfer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A model on its way to a node, begun by `start_download` or `distribute`."""

    id: str
    model: str = ""
    state: str = ""
    """`running`, `done`, `failed` or `cancelled`."""
    status: str = ""
    """The step it is at."""
    total: int = 0
    """Bytes of the files seen so far."""
    completed: int = 0
    started_at: float = 0.0
    """Seconds since the Unix epoch."""
    ended_at: float | None = None
    error: str = ""
    code: str = ""
    kind: str = "download"
    """`download`: from a registry; `copy`: from other nodes."""
    node: str = ""
    """The id of the node that it goes to."""
    rate: float = 0.0
    """Bytes per second, of the last seconds."""
    eta_s: float | None = None
    peers: dict[str, int] = {}
    """Bytes that came from each node."""
    dropped: Sequence[str] = ()
    """Nodes that sent wrong bytes."""


class TransferList(msgspec.Struct, kw_only=True):
    transfers: Sequence[Transfer] = ()


class ModelPlace(msgspec.Struct, kw_only=True, omit_defaults=True):
    node: str
    name: str = ""
    status: str = ""
    """Of the node: `online`, `suspect`, `offline`, …"""
    digest: str = ""
    size: int = 0
    current: bool = True
    """It is the version that counts."""


class ModelStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where a model is, and where it is going."""

    model: str
    nodes: Sequence[ModelPlace] = ()
    transfers: Sequence[Transfer] = ()


class CopiesList(msgspec.Struct, kw_only=True):
    models: Sequence[ModelStatus] = ()


class RemovedList(msgspec.Struct, kw_only=True):
    removed: Sequence[EvictAnswer] = ()


class ImportedModel(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A model of a bundle that was taken."""

    name: str = ""
    digest: str = ""
    size: int = 0
    state: str = ""
    """`imported`, `replaced` or `unchanged`."""


class ImportResult(msgspec.Struct, kw_only=True):
    models: Sequence[ImportedModel] = ()


# ── the server ──────────────────────────────────────────────────────────────────────


class Version(msgspec.Struct, kw_only=True, omit_defaults=True):
    version: str = ""
    ollama: str = ""
    """The Ollama version whose API is spoken."""
    node: str = ""
    engine: EngineInfo | None = None
    engines: Sequence[EngineInfo] = ()


class Preloaded(msgspec.Struct, kw_only=True, omit_defaults=True):
    state: str = ""
    """`waiting`, `fetching`, `loading`, `loaded` or `failed`."""
    error: str = ""


class Health(msgspec.Struct, kw_only=True, omit_defaults=True):
    status: str = ""
    node: str = ""
    version: str = ""
    models_loaded: int = 0
    preload: Mapping[str, Preloaded] = {}
    """By name: models that were to be loaded at the start."""
