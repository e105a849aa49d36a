"""The echo engine: a fake that answers with what was asked, and whose settings are its failures.

Deterministic and free of busy work, so that tests, simulations and gateway benchmarks can
use it in place of a model. Conventions (what it answers, how it calls tools) are in
`echo_text.py`. All its timing goes through the running loop's timers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.base.errors import (
    ContextExceeded,
    Invalid,
    LoadFailed,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.inference import Message, Think, Tool
from ollama_distributed.models.spec import Architecture, ModelSpec, RemoteModel
from ollama_distributed.serving.ports import (
    ChatRequest,
    CompletionRequest,
    EngineFailed,
    EngineInfo,
    EngineSink,
    LoadPlan,
    RunnerMetrics,
)
from ollama_distributed.testing import echo_text
from ollama_distributed.testing.echo_answer import EchoAnswer, call_events, text_events, token_events

_GOLDEN = 0.618_033_988_75
"""Its multiples fill 0..1 evenly, without dice."""


class EchoSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    load_s: float = 0.0
    """How long a load takes."""
    tokens_per_s: float = 0.0
    """Speed of one answer; 0: as fast as the loop turns."""
    spread: float = 0.0
    """Answers are faster and slower than that by up to this share, each by its own: equal ones that began
    together would end together for ever."""
    fail_after_tokens: int | None = None
    """The runner dies when an answer has so many tokens."""
    crash_on_load: bool = False
    crashes: int | None = None
    """How many runners fail in these ways before all goes well; None: every one."""
    dimensions: int = 64
    """Of embedding vectors."""
    answer: str = ""
    """Always answer this, instead of echoing."""
    hash_tokens: int = 0
    """Answer with so many tokens derived from the prompt, instead of echoing."""
    models: tuple[str, ...] = ("echo",)
    """What `models()` lists."""
    prompt_cache: int = 0
    """A runner remembers so many prompts, and says how much of a new one it had read before."""
    memory_bytes: int = 1_048_576
    """What a runner says it takes."""


class EchoEngine:
    """`EchoEngine({"tokens_per_s": 50})`; the fields are those of `EchoSettings`."""

    def __init__(self, settings: Mapping[str, Any] | EchoSettings | None = None) -> None:
        try:
            self.settings = (
                settings
                if isinstance(settings, EchoSettings)
                else msgspec.convert(dict(settings or {}), EchoSettings)
            )
        except msgspec.ValidationError as exc:
            raise Invalid(f"settings of the echo engine: {exc}") from exc
        self.runners: list[EchoRunner] = []
        """Those that live."""
        self.loads = 0
        """Loads tried since the start."""
        self._crashes_left = self.settings.crashes

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(name="echo", variant="fake", version="1")

    def can_load(self, model: ModelSpec) -> bool:
        return model.remote is None or model.remote.engine == "echo"

    async def models(self) -> list[ModelSpec]:
        return [echo_model(name) for name in self.settings.models]

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> EchoRunner:
        self.loads += 1
        if on_progress is not None:
            on_progress(0.0)
        if self.settings.load_s:
            await asyncio.sleep(self.settings.load_s)
        failing = self._crashes_left is None or self._crashes_left > 0
        if self.settings.crash_on_load and failing:
            self._crashed()
            raise LoadFailed(f"the echo engine is set to fail the load of {model.display}")
        if on_progress is not None:
            on_progress(1.0)
        fail_after = self.settings.fail_after_tokens if failing else None
        runner = EchoRunner(plan, self.info, self.settings, fail_after)
        self.runners.append(runner)
        runner.on_exit(lambda error: self._ended(runner, error))
        return runner

    def speaks(self, tokens_per_s: float) -> None:
        """From now on so fast, as a machine whose processor throttles."""
        self.settings = msgspec.structs.replace(self.settings, tokens_per_s=tokens_per_s)
        for runner in self.runners:
            runner.use(self.settings)

    def _ended(self, runner: EchoRunner, error: OllamaDistributedError | None) -> None:
        self.runners.remove(runner)
        if error is not None:
            self._crashed()

    def _crashed(self) -> None:
        if self._crashes_left:
            self._crashes_left -= 1

    async def close(self) -> None:
        for runner in list(self.runners):
            await runner.unload()


class EchoRunner:
    """One loaded fake model with `plan.slots` slots; more answers than that wait in order."""

    renders = True

    def __init__(
        self, plan: LoadPlan, info: EngineInfo, settings: EchoSettings, fail_after_tokens: int | None
    ) -> None:
        self._plan = plan
        self._info = info
        self._settings = settings
        self._fail_after_tokens = fail_after_tokens
        self._running: set[EchoAnswer] = set()
        self._waiting: deque[EchoAnswer] = deque()
        self._exits: list[Callable[[OllamaDistributedError | None], None]] = []
        self._gone = False
        self._answers = 0
        """So far."""
        self._death: OllamaDistributedError | None = None
        self._read: deque[bytes] = deque(maxlen=settings.prompt_cache)
        """Prompts, the latest last."""
        self.hangs = False
        """Set: it is not healthy."""

    @property
    def plan(self) -> LoadPlan:
        return self._plan

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def memory_bytes(self) -> int:
        return self._settings.memory_bytes

    # ── answers ─────────────────────────────────────────────────────────────────────

    def generate(self, request: CompletionRequest, sink: EngineSink) -> EchoAnswer:
        try:
            prompt, answer = echo_text.answer_to(
                request, fixed=self._settings.answer, hash_tokens=self._settings.hash_tokens
            )
        except OllamaDistributedError as exc:
            return self._start(EchoAnswer(self, sink, events=iter(()), sampling=request.sampling, failed=exc))
        return self._start(
            EchoAnswer(
                self,
                sink,
                events=token_events(answer, request.top_logprobs),
                prompt_tokens=echo_text.count_tokens(prompt),
                cached_tokens=self._cached(prompt),
                sampling=request.sampling,
                shift=request.shift,
            )
        )

    def chat(self, request: ChatRequest, sink: EngineSink) -> EchoAnswer:
        prompt = echo_text.render(request.messages, request.tools)
        answer = self._settings.answer or echo_text.chat_answer(request)
        calls = not isinstance(answer, str)
        return self._start(
            EchoAnswer(
                self,
                sink,
                events=call_events(answer) if not isinstance(answer, str) else text_events(answer),
                prompt_tokens=echo_text.count_tokens(prompt.encode()),
                sampling=request.sampling,
                reason="tool_calls" if calls else "stop",
            )
        )

    def _cached(self, prompt: bytes) -> int:
        """Of its tokens, those of the longest beginning that was read; reads it."""
        if not self._read.maxlen:
            return 0
        length, best = 0, b""
        for known in self._read:
            common = _common(known, prompt)
            if common > length:
                length, best = common, known
        if best and prompt.startswith(best):
            self._read.remove(best)  # it grew
        self._read.append(prompt)
        return echo_text.count_tokens(prompt[:length])

    def _start(self, answer: EchoAnswer) -> EchoAnswer:
        if self._gone:
            answer.end(EngineFailed(self._death or Unavailable("the model is being unloaded")), later=True)
        elif len(self._running) < self._plan.slots:
            self._running.add(answer)
            answer.begin()
        else:
            self._waiting.append(answer)
        return answer

    def release(self, answer: EchoAnswer) -> None:
        """The answer ended: its slot is free."""
        if answer in self._running:
            self._running.remove(answer)
            if self._waiting and not self._gone:
                self._running.add(self._waiting[0])
                self._waiting.popleft().begin()
        else:
            with contextlib.suppress(ValueError):  # it left before
                self._waiting.remove(answer)

    def token_limit(self) -> int | None:
        return self._fail_after_tokens

    def speed(self) -> float:
        return self._settings.tokens_per_s

    def pace(self) -> float:
        self._answers += 1
        return 1.0 + self._settings.spread * (2.0 * (self._answers * _GOLDEN % 1.0) - 1.0)

    def use(self, settings: EchoSettings) -> None:
        self._settings = settings

    # ── life ────────────────────────────────────────────────────────────────────────

    def kill(self, reason: str = "the echo runner was told to crash") -> None:
        self._end(RunnerDied(reason))

    async def unload(self, grace_s: float = 2.0) -> None:  # noqa: ARG002 - it is gone at once
        self._end(None)

    def _end(self, error: OllamaDistributedError | None) -> None:
        if self._gone:
            return
        self._gone = True
        self._death = error
        for answer in [*self._running, *self._waiting]:
            answer.end(EngineFailed(error or Unavailable("the model was unloaded")))
        for callback in self._exits:
            callback(error)

    def on_exit(self, callback: Callable[[OllamaDistributedError | None], None]) -> None:
        if self._gone:
            callback(self._death)
        else:
            self._exits.append(callback)

    async def healthy(self) -> bool:
        return not (self._gone or self.hangs)

    async def metrics(self) -> RunnerMetrics:
        return RunnerMetrics(
            slots=self._plan.slots,
            slots_busy=len(self._running),
            queued=len(self._waiting),
            tokens_per_s=self._settings.tokens_per_s,
            kv_used=len(self._running) / self._plan.slots,
        )

    # ── the other questions ─────────────────────────────────────────────────────────

    async def apply_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        think: Think | None = None,  # noqa: ARG002 - the echo template has no reasoning
    ) -> str:
        self._check()
        return echo_text.render(messages, tools)

    async def template_ids(self, *_: object) -> None:
        """It renders text."""

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:  # noqa: ARG002 - has none
        self._check()
        return echo_text.tokenize(text)

    async def detokenize(self, ids: Sequence[int]) -> str:
        self._check()
        return echo_text.detokenize(ids).decode(errors="replace")

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        self._check()
        texts = [
            i if isinstance(i, str) else echo_text.detokenize(i).decode(errors="replace") for i in inputs
        ]
        counts = [echo_text.count_tokens(text.encode()) for text in texts]
        for count in counts:
            self.check_fits(count)
        return [echo_text.vector(text, self._settings.dimensions) for text in texts], sum(counts)

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        self._check()
        counts = [echo_text.count_tokens(f"{query}{document}".encode()) for document in documents]
        for count in counts:
            self.check_fits(count)
        return [echo_text.relevance(query, document) for document in documents], sum(counts)

    def _check(self) -> None:
        if self._gone:
            raise self._death or Unavailable("the model was unloaded")

    def check_fits(self, prompt_tokens: int) -> None:
        """Raises `ContextExceeded`."""
        if prompt_tokens >= self._plan.context_tokens:
            raise ContextExceeded(
                f"the prompt has {prompt_tokens} tokens, the context holds {self._plan.context_tokens}",
                prompt_tokens=prompt_tokens,
                context_tokens=self._plan.context_tokens,
            )


def echo_model(name: str = "echo") -> ModelSpec:
    """A model that only the echo engine runs, with every capability."""
    return ModelSpec(
        name=f"registry.ollama.ai/library/{name}:latest",
        display=name,
        digest=hashlib.sha256(f"echo {name}".encode()).hexdigest(),
        size_bytes=0,
        modified_at=0.0,
        architecture=Architecture(
            name="echo",
            layers=1,
            context_tokens=1_048_576,
            embedding_length=64,
            heads=1,
            kv_heads=1,
            key_length=64,
            value_length=64,
            parameters=0,
            file_type="F32",
        ),
        remote=RemoteModel(engine="echo", name=name),
        capabilities=frozenset({"completion", "tools", "insert", "embedding", "rerank"}),
        families=("echo",),
    )


def _common(one: bytes, two: bytes) -> int:
    """How long both begin alike."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == two[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
