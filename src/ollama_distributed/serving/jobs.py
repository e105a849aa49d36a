"""One generation on this node: wait for a runner, prepare the prompt, pass on the events.

A job holds its lease from `acquire` to the last event. Until a token has come it may begin
again: once with a cut prompt, and once on a new runner when the first died (I13: a request
that kills a runner is retried at most once).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    ContextExceeded,
    Internal,
    NoCapacity,
    OllamaDistributedError,
    RunnerDied,
)
from ollama_distributed.base.inference import Generation, InferenceRequest, Queued, Sampling
from ollama_distributed.base.paced import Paced
from ollama_distributed.base.queue import Ask
from ollama_distributed.base.tokens import (
    Done,
    EngineEvent,
    EngineFailed,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    SourceSink,
    Tokens,
    plausible,
)
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving import asking, continuing, prompts
from ollama_distributed.serving.grammar import GrammarAfterThoughts
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest
from ollama_distributed.serving.prompts import Prompt
from ollama_distributed.serving.requests import Requests
from ollama_distributed.serving.residents import Lease

log = structlog.get_logger(__name__)

Step = Callable[[], Awaitable[None]]


class Desk(Protocol):
    """What a job needs of the service."""

    clock: Clock
    requests: Requests

    async def acquire(
        self,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        *,
        slot: bool,
        ask: Ask,
        told: Callable[[Queued], None],
    ) -> Lease: ...

    def lease_now(self, spec: ModelSpec, shape: Shape, keep_alive_s: float | None, ask: Ask) -> Lease | None:
        """As `acquire`, with a slot; None: it has to be waited for."""
        ...

    async def unload(self, name: str) -> None: ...

    def measured(self, lease: Lease, done: Done) -> None: ...

    def finished(self, job: Job) -> None:
        """The job's last event is out, or it was cancelled."""
        ...


class Job(Paced[Generation]):
    """Implements `Generation`."""

    __slots__ = (
        "_asked",
        "_cut",
        "_deaths",
        "_desk",
        "_emitted",
        "_lease",
        "_load_s",
        "_over",
        "_prompt",
        "_request",
        "_resume",
        "_retried",
        "_sampling",
        "_shape",
        "_sink",
        "_spec",
        "_spoke",
        "_started",
        "_task",
        "_wait_s",
    )

    def __init__(
        self,
        desk: Desk,
        request: InferenceRequest,
        sink: SourceSink,
        resume: Resume | None,
    ) -> None:
        super().__init__()
        self._desk = desk
        self._request = request
        self._sink = sink
        self._resume = resume if resume is not None and resume.ids else None
        """What another runner said of it already."""
        self._emitted = 0 if resume is None else len(resume.ids)
        """Tokens of that."""
        self._deaths = resume.deaths if resume is not None else 0
        """Runners that died under it elsewhere."""
        self._started = desk.clock.monotonic()
        self._load_s = self._wait_s = 0.0
        self._spec: ModelSpec | None = None
        self._asked = self._sampling = Sampling()
        self._shape: Shape | None = None
        self._lease: Lease | None = None
        self._prompt: Prompt | None = None
        self._spoke = False
        """A token is out: it cannot begin again."""
        self._retried = False
        self._cut = False
        self._over = False
        self._task: asyncio.Task[None] | None = None
        if resume is not None or not self._begin_now():
            self._go(self._begin)

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if self._over:
            return
        self._over = True
        if self._task is not None:
            self._task.cancel()
        if self._generation is not None:
            self._generation.cancel()
        self._close()

    @property
    def over(self) -> bool:
        """Its last event is out, or it was cancelled."""
        return self._over

    def fail(self, error: OllamaDistributedError) -> None:
        """Stop generating, and say why."""
        if self._over:
            return
        task, generation = self._task, self._generation
        self._end(EngineFailed(error))
        if task is not None:
            task.cancel()
        if generation is not None:
            generation.cancel()

    # ── steps ───────────────────────────────────────────────────────────────────────

    def _go(self, step: Step) -> None:
        self._task = asyncio.get_running_loop().create_task(self._guard(step))

    async def _guard(self, step: Step) -> None:
        """The root of the job's tasks: whatever goes wrong becomes its last event."""
        try:
            await step()
        except Exception as exc:
            self._broke(exc)

    def _broke(self, exc: Exception) -> None:
        if isinstance(exc, OllamaDistributedError):
            self._failed(exc)
            return
        log.error("serving.job_defect", request_id=self._request.request_id, exc_info=exc)
        self._end(EngineFailed(Internal("internal error; the node's log has it under the request id")))

    def _begin_now(self) -> bool:
        """Without waiting for a task's turn, where nobody has to be waited for: the model is loaded and
        has a free slot. False: nothing was done yet."""
        request = self._request
        if request.load_only or request.render_only:
            return False
        try:
            found = self._desk.requests.find_now(request)
        except OllamaDistributedError:
            return False  # said by the task, as every refusal
        if found is None:
            return False
        spec, asked, shape = found
        lease = self._desk.lease_now(spec, shape, request.keep_alive_s, asking.generation(request))
        if lease is None:
            return False
        self._spec, self._asked, self._shape, self._lease = spec, asked, shape, lease
        self._load_s = self._desk.clock.monotonic() - self._started
        try:
            self._sampling = prompts.bounded(asked, lease.plan.context_tokens, 0)
            prompt = prompts.prepared_by_engine(lease.runner, spec, request, self._sampling)
            if prompt is None:
                self._go(partial(self._prepare, lease))
            else:
                self._start(lease, prompt)
        except Exception as exc:  # the root of what would be a task
            self._broke(exc)
        return True

    async def _begin(self) -> None:
        request = self._request
        self._spec, self._asked, self._shape = await self._desk.requests.find(request)
        if request.load_only and request.keep_alive_s == 0:
            await self._desk.unload(request.model)
            self._end(Skipped(reason="unload"))
            return
        if self._resume is not None:
            continuing.check(self._spec, request, self._resume)
        await self._run()

    async def _run(self) -> None:
        assert self._spec is not None
        assert self._shape is not None
        request, generates = self._request, not (self._request.load_only or self._request.render_only)
        self._lease = lease = await self._desk.acquire(
            self._spec,
            self._shape,
            request.keep_alive_s,
            slot=generates,
            ask=asking.generation(request, goes_on=self._resume is not None),
            told=self._sink,
        )
        now = self._desk.clock.monotonic()
        self._load_s = now - self._started
        self._wait_s = now - max(self._started, lease.ready_at)
        if request.load_only:
            self._end(Skipped(reason="load", load_s=self._load_s))
            return
        self._sampling = prompts.bounded(self._asked, lease.plan.context_tokens, self._emitted)
        if self._resume is not None:
            self._continue(lease, self._resume)
            return
        await self._prepare(lease)

    async def _prepare(self, lease: Lease) -> None:
        assert self._spec is not None
        request = self._request
        prompt = await prompts.prepare(lease.runner, self._spec, request, self._sampling)
        if request.render_only:
            self._end(
                Skipped(
                    reason="stop",
                    load_s=self._load_s,
                    rendered=prompt.rendered,
                    rendered_images=prompt.images,
                )
            )
            return
        self._start(lease, prompt)

    def _continue(self, lease: Lease, resume: Resume) -> None:
        """Go on after what another runner emitted."""
        assert self._spec is not None
        if self._sampling.num_predict == 0:
            # The last token that was allowed came just before that runner was lost.
            self._end(Done(reason="length", prompt_tokens=0, cached_tokens=0, completion_tokens=0))
            return
        self._sampling = continuing.reseeded(self._sampling, len(resume.ids))
        self._start(lease, continuing.continued(self._spec, self._request, self._sampling, resume))

    async def _shorten(self, lease: Lease, prompt: Prompt) -> None:
        assert self._spec is not None
        if self._resume is not None:
            shorter = await continuing.slid(
                lease.runner, self._spec, self._request, self._sampling, self._resume
            )
        else:
            shorter = await prompts.shorten(lease.runner, self._spec, self._request, self._sampling, prompt)
        self._start(lease, shorter)

    def _start(self, lease: Lease, prompt: Prompt) -> None:
        assert self._spec is not None
        self._prompt = prompt
        resumable = continuing.resumable(self._request, prompt)
        self._sink(
            Prepared(
                load_s=self._load_s,
                wait_s=self._wait_s,
                stop=self._sampling.stop or (),
                thinking_tags=prompt.thinking_tags,
                starts_in_thinking=prompt.starts_in_thinking,
                prompt_ids=prompt.ids,
                prompt_text="" if prompt.ids or not resumable else prompt.rendered,
                model_digest=self._spec.digest,
                resumable=resumable,
                after=self._emitted,
            )
        )
        if self._over:
            # The sink may cancel at any event.
            return
        if isinstance(prompt.ask, ChatRequest):
            self._stand_before(lease.runner.chat(prompt.ask, self._hear))
        elif prompt.ask.format is not None and prompt.thinking_tags is not None:
            self._stand_before(GrammarAfterThoughts(lease, prompt, self._hear))
        else:
            self._stand_before(lease.runner.generate(prompt.ask, self._hear))

    # ── events ──────────────────────────────────────────────────────────────────────

    def _hear(self, event: EngineEvent) -> None:
        if self._over:
            return
        if self._lease is not None:
            self._lease.heard()
        kind = type(event)
        if kind is Tokens:
            self._spoke = True
            self._sink(event)
        elif type(event) is Done:
            self._done(event)
        elif type(event) is EngineFailed:
            self._failed(event.error)
        else:
            if kind is not Progress:
                self._spoke = True
            self._sink(event)

    def _done(self, event: Done) -> None:
        event = plausible(event)
        if self._lease is not None:
            self._lease.answered(event.completion_tokens)
            self._desk.measured(self._lease, event)
        self._end(event)

    def _failed(self, error: OllamaDistributedError) -> None:
        """Begin again where that is allowed, else pass it on."""
        if self._over:
            return
        lease = self._lease
        self._generation = None
        if isinstance(error, RunnerDied) and lease is not None:
            self._lease = None
            lease.broken(error)
            if not self._spoke and not self._retried and self._deaths == 0:
                self._retried = True
                log.warning("serving.retried", request_id=self._request.request_id, reason=error.message)
                self._go(self._run)
                return
        elif (
            isinstance(error, ContextExceeded)
            and lease is not None
            and self._prompt is not None
            and not (self._spoke or self._cut)
            and self._request.truncate
            and (self._request.shift or not isinstance(self._prompt.ask, CompletionRequest))
        ):
            self._cut = True
            self._go(partial(self._shorten, lease, self._prompt))
            return
        elif isinstance(error, ContextExceeded) and self._resume is not None:
            error = NoCapacity("the answer so far fills the context that the model has on this node")
        self._end(EngineFailed(error))

    def _end(self, event: SourceEvent) -> None:
        if self._over:
            return
        self._over = True
        self._close()
        self._sink(event)

    def _close(self) -> None:
        """Give back the slot before anybody hears of the end, so that the next may begin. What made it
        holds this in its turn: both would be left to the collector, which comes seldom."""
        self._generation = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        self._desk.finished(self)
