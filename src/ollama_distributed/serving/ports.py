"""What serving needs of the world: engines that load models into runners.

An `Engine` knows one way to run models (the llama.cpp wheel, a llama-server binary,
another server on this machine, the echo fake). A `Runner` is one loaded model: for
llama.cpp a child process. Implementations live in `adapters/engines/` and, for fakes,
in `testing/`; one conformance suite (`testing/engine_conformance.py`) runs on all.
What a runner emits is in `base/tokens.py` and named here again, for the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.inference import (
    Format,
    Generation,
    Message,
    Sampling,
    Think,
    Tool,
    ToolChoice,
)
from ollama_distributed.base.tokens import ChatDelta as ChatDelta
from ollama_distributed.base.tokens import Done as Done
from ollama_distributed.base.tokens import EngineEvent as EngineEvent
from ollama_distributed.base.tokens import EngineFailed as EngineFailed
from ollama_distributed.base.tokens import EngineSink as EngineSink
from ollama_distributed.base.tokens import Progress as Progress
from ollama_distributed.base.tokens import Tokens as Tokens
from ollama_distributed.models.spec import ModelSpec


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How to load a model; two requests with equal plans share one runner."""

    slots: int
    """Requests that run at once (continuous batching)."""
    context_tokens: int
    """Context of one slot. The engine allocates `slots * context_tokens`."""
    threads: int
    batch: int = 256
    """Prompt tokens per step; above 256 a long prompt stalls the other streams."""
    gpu_layers: int = -1
    main_gpu: int = 0
    use_mmap: bool = True
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    flash_attention: bool | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine runs; shown by `ps`, `version` and `doctor`."""

    name: str
    """`llama.cpp`, `openai`, `ollama`, `echo`."""
    variant: str
    """Where it comes from: `wheel`, `binary`, `built`, or the remote's address."""
    version: str
    instruction_set: str = ""
    """What the engine was compiled for, e.g. `AVX2` or `AVX512 VNNI AMX`."""
    devices: tuple[str, ...] = ()
    """GPUs it sees; empty: CPU."""
    sandbox: str = ""
    """What holds its runners back, in words, or `none`; empty: it has no runners here."""


class RunnerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    slots: int
    slots_busy: int
    queued: int = 0
    tokens_per_s: float = 0.0
    """Generation speed, average since load; 0 when the engine does not say."""
    prompt_tokens_per_s: float = 0.0
    kv_used: float | None = None
    """0..1; None when the engine does not say."""


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a completion may say to a runner: the typed allow-list."""

    prompt: str | tuple[int, ...] | tuple[str | tuple[int, ...], ...]
    """Text, token ids, or a mix of both in order (continuation: text, then emitted ids)."""
    images: tuple[bytes, ...] = ()
    """One for each media marker in the prompt."""
    suffix: str = ""
    """With text: fill in the middle by the engine's infill."""
    sampling: Sampling = Sampling()
    """Complete: every default is filled in. `stop` is not sent; the decoder stops."""
    format: Format | None = None
    grammar: str = ""
    """GBNF, made by us (tool_choice); exclusive with `format`."""
    top_logprobs: int | None = None
    """None: no logprobs; 0: of the chosen token only."""
    shift: bool = True
    together: bool = False
    """Tokens that come together may be told as one, as servers elsewhere do it: none of them is counted
    apart (before a stop sequence, or as reasoning)."""
    tenant: str = ""
    """Whose it is: what a runner keeps of prompts is not shared between tenants."""


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A chat whose answer the engine parses itself (tool calls); never migrated."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    sampling: Sampling = Sampling()
    format: Format | None = None
    think: Think | None = None
    top_logprobs: int | None = None
    whole: bool = False
    """Nobody sees a part of the answer: the engine may send it in one piece."""
    together: bool = False
    """As in `CompletionRequest`."""
    tenant: str = ""
    """As in `CompletionRequest`."""


class Runner(Protocol):
    """One loaded model. Its death fails running calls with `RunnerDied`, never the node."""

    @property
    def renders(self) -> bool:
        """Whether `apply_template` can tell a prompt; False: chats are the engine's own affair."""
        ...

    @property
    def plan(self) -> LoadPlan: ...

    @property
    def info(self) -> EngineInfo: ...

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the runner, or the estimate where it cannot be read."""
        ...

    def on_exit(self, callback: Callable[[OllamaDistributedError | None], None]) -> None:
        """Call back once when the runner is gone; the error says why (None: unloaded)."""
        ...

    def generate(self, request: CompletionRequest, sink: EngineSink) -> Generation: ...

    def chat(self, request: ChatRequest, sink: EngineSink) -> Generation: ...

    async def apply_template(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> str:
        """The prompt text for these messages, with the opening of the assistant's turn.

        Images appear as the engine's media marker, in order."""
        ...

    async def template_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> tuple[int, ...] | None:
        """As `apply_template`, as token ids; None: the engine tells text sooner."""
        ...

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]: ...

    async def detokenize(self, ids: Sequence[int]) -> str: ...

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Vectors [input, dimension], as the engine gives them, and the prompt tokens."""
        ...

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        """Scores in the documents' order and the prompt tokens."""
        ...

    async def healthy(self) -> bool:
        """Whether it answers at all, soon and however busy it is."""
        ...

    def kill(self, reason: str) -> None:
        """End it at once, as a crash does: running calls fail with `RunnerDied`. Idempotent."""
        ...

    async def metrics(self) -> RunnerMetrics: ...

    async def unload(self, grace_s: float = 2.0) -> None:
        """End the runner; idempotent; returns when it is gone."""
        ...


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def can_load(self, model: ModelSpec) -> bool: ...

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> Runner:
        """Start a runner and wait until it answers.

        Raises:
            LoadFailed: with the engine's own reason.
        """
        ...

    async def close(self) -> None:
        """End all runners."""
        ...


class RemoteEngine(Engine, Protocol):
    """An engine with a catalogue of its own: models are listed from it."""

    async def models(self) -> list[ModelSpec]: ...


class Catalogue(Protocol):
    """Finds models; the node connects `catalog.service.Catalog`."""

    async def resolve(self, name: str) -> ModelSpec:
        """Raises `ModelNotFound`; from memory for a name that was resolved before."""
        ...

    def known(self, name: str) -> ModelSpec | None:
        """From memory; None: `resolve` finds it, or says why not."""
        ...


class Machine(Protocol):
    """What this machine has for runners."""

    def cores(self) -> int:
        """Physical cores that this process may use."""
        ...

    def memory_available_bytes(self) -> int:
        """What can be allocated now without swapping."""
        ...


class EngineFactory(Protocol):
    """Makes an engine from its settings; entry points of `ollama_distributed.engines` are these."""

    def __call__(self, settings: Mapping[str, Any]) -> Engine: ...
