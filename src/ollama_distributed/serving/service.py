"""Runs models on this node: the one door of this room.

Decisions are in `plan.py`, `options.py` and `prompts.py`; the fleet holds what is loaded, a
`Job` is one running generation. `node/` connects the catalogue, the engines and the
machine; `streams/` starts generations here through its own port.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import anyio
import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import ModelNotFound, NoCapacity, RunnerDied, Unavailable, Unsupported
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Generation,
    InferenceRequest,
    LoadOptions,
    Queued,
    RerankRequest,
    RerankResult,
    Usage,
)
from ollama_distributed.base.queue import ANYONE, Ask
from ollama_distributed.base.tokens import Done, Resume, SourceSink, Written, counted
from ollama_distributed.cluster.load import ModelLoad
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving import asking, embeddings, options, prompts
from ollama_distributed.serving.fleet import CLOSING, Fleet
from ollama_distributed.serving.jobs import Job
from ollama_distributed.serving.loaded import LoadedModel, load_of, loaded_models
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.ports import Catalogue, Engine, Machine
from ollama_distributed.serving.quarantine import Crashed
from ollama_distributed.serving.queues import Waiting
from ollama_distributed.serving.requests import Requests
from ollama_distributed.serving.residents import Lease, load_key
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.serving.sizes import Estimate, estimate_bytes
from ollama_distributed.serving.speeds import Speeds

_Answer = TypeVar("_Answer")

_FOR_EVER = -1.0
"""A keep-alive."""

_LARGE_NUMBERS = 30_000
"""Numbers of all vectors that take some 3 ms to normalise; more are left to a thread."""


class Serving:
    def __init__(
        self,
        catalogue: Catalogue,
        engines: Sequence[Engine],
        machine: Machine,
        clock: Clock,
        settings: ServingSettings | None = None,
        *,
        estimate: Estimate = estimate_bytes,
        used: Callable[[ModelSpec], None] = lambda _: None,
        queue: Waiting | None = None,
    ) -> None:
        """`engines` in order of preference: the first that can load a model gets it. `used`: hears
        of each request which model it is for. `queue`: of those who wait; None: the simplest."""
        self.clock = clock
        self._used = used
        self._settings = settings or ServingSettings()
        self._catalogue = catalogue
        self.requests = Requests(catalogue, self._settings.rules)
        self._fleet = Fleet(engines, machine, clock, estimate, self._settings, queue)
        self._jobs: set[Job] = set()
        self.speeds = Speeds()

    def configure(self, settings: ServingSettings) -> None:
        """Use other settings from now on; what runs goes on as it began."""
        self._settings = settings
        self.requests.configure(settings.rules)
        self._fleet.configure(settings)

    # ── generations ─────────────────────────────────────────────────────────────────

    def start(self, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None) -> Generation:
        """Begin a generation. Never raises: what goes wrong comes as `EngineFailed`.

        `resume`: another runner began this answer already.
        """
        job = Job(self, request, sink, resume)
        if not job.over:
            self._jobs.add(job)
        return job

    def elsewhere(self, request: InferenceRequest, resume: Resume) -> bool:  # noqa: ARG002 - the port's
        """Nobody else is behind this: an answer can only be gone on with here."""
        return False

    async def written(self, request: InferenceRequest) -> Written | None:  # noqa: ARG002 - the port's
        """Nothing: answers are kept by who asked for them."""
        return None

    async def hand_over(self, request: InferenceRequest, written: Written) -> None:
        """There is nobody."""

    async def count_tokens(self, request: InferenceRequest) -> int:
        """Tokens of the rendered prompt, images not counted."""
        request = msgspec.structs.replace(request, render_only=True)
        spec, sampling, shape = await self.requests.find(request)

        async def count(lease: Lease) -> int:
            prompt = await prompts.prepare(lease.runner, spec, request, sampling)
            return len(prompt.ids or await lease.runner.tokenize(prompt.rendered))

        ask = asking.generation(request)
        tokens, _ = await self._ask(spec, shape, request.keep_alive_s, count, ask, slot=False)
        return tokens

    # ── vectors and scores ──────────────────────────────────────────────────────────

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        started = self.clock.monotonic()
        spec = await self._catalogue.resolve(request.model)
        shape = self.requests.shape(spec, request.options)

        async def vectors(lease: Lease) -> tuple[list[list[float]], int]:
            if not request.inputs:
                return [], 0
            limit = options.input_limit(spec, request.options, lease.plan.context_tokens)
            inputs = await embeddings.fit_inputs(
                lease.runner, request.inputs, limit, truncate=request.truncate
            )
            found = await lease.runner.embed(inputs)
            lease.answered(0)
            return found

        slot = bool(request.inputs)
        ask = asking.question(request)
        (raw, tokens), load_s = await self._ask(spec, shape, request.keep_alive_s, vectors, ask, slot=slot)

        def finish() -> tuple[tuple[float, ...], ...]:
            return tuple(
                embeddings.finished_vector(one, normalize=request.normalize, dimensions=request.dimensions)
                for one in raw
            )

        large = sum(map(len, raw)) > _LARGE_NUMBERS
        finished = await anyio.to_thread.run_sync(finish) if large else finish()
        return EmbedResult(vectors=finished, usage=self._usage(started, load_s, tokens))

    async def rerank(self, request: RerankRequest) -> RerankResult:
        started = self.clock.monotonic()
        spec = await self._catalogue.resolve(request.model)
        if "rerank" not in spec.capabilities:
            raise Unsupported(f"{spec.name} does not support rerank")
        shape = self.requests.shape(spec, request.options)

        async def scores(lease: Lease) -> tuple[list[float], int]:
            found = await lease.runner.rerank(request.query, request.documents)
            lease.answered(0)
            return found

        ask = asking.question(request)
        (found, tokens), load_s = await self._ask(spec, shape, request.keep_alive_s, scores, ask)
        return RerankResult(scores=tuple(found), usage=self._usage(started, load_s, tokens))

    async def _ask(
        self,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        question: Callable[[Lease], Awaitable[_Answer]],
        ask: Ask,
        *,
        slot: bool = True,
    ) -> tuple[_Answer, float]:
        """The answer and the seconds until a runner was there; once more if the first one dies."""
        for last in (False, True):
            started = self.clock.monotonic()
            lease = await self.acquire(spec, shape, keep_alive_s, slot=slot, ask=ask)
            load_s = self.clock.monotonic() - started
            try:
                return await question(lease), load_s
            except RunnerDied as error:
                lease.broken(error)
                if last:
                    raise
            finally:
                lease.release()
        raise AssertionError("the second try returns or raises")

    def _usage(self, started: float, load_s: float, prompt_tokens: int) -> Usage:
        total_s, tokens = self.clock.monotonic() - started, counted(prompt_tokens)
        return Usage(prompt_tokens=tokens, load_s=load_s, prompt_s=total_s - load_s, total_s=total_s)

    # ── what is loaded ──────────────────────────────────────────────────────────────

    def loaded(self) -> list[LoadedModel]:
        """Longest remaining time first, as Ollama lists them."""
        return loaded_models(self._fleet, self.speeds, self.clock)

    @property
    def resident(self) -> set[str]:
        """Full names of models in memory, or on their way there or out of it."""
        return {resident.spec.name for resident in self._fleet.residents}

    def quarantined(self) -> list[Crashed]:
        """Models that crashed too often."""
        return self._fleet.quarantined()

    @property
    def waiting(self) -> int:
        """Requests in the queues."""
        return self._fleet.waiting

    def names(self) -> dict[str, str]:
        """Of the loads that the queue knows, as people see them."""
        return self._fleet.names()

    @property
    def saturated(self) -> bool:
        """No loaded model has a free slot."""
        return self._fleet.saturated

    def work(self, key: str) -> ModelLoad | None:
        """What the model of this `name_key` has to do here; None: it is not loaded."""
        return load_of(key, self._fleet, self.speeds)

    async def unload(self, name: str) -> None:
        """Unload now if it is idle, else when its requests are done. Nothing if it is not loaded.

        Returns when an idle one is gone. Finds a loaded model whose name the catalogue lost.
        """
        try:
            spec: ModelSpec | None = await self._catalogue.resolve(name)
        except ModelNotFound:
            spec = None
        key = load_key(spec) if spec is not None else None
        chosen = [r for r in self._fleet.residents if r.key == key or name in (r.spec.name, r.spec.display)]
        if spec is None and not chosen:
            await self._catalogue.resolve(name)  # raises, in the catalogue's own words
        for resident in chosen:
            self._fleet.expire(resident)
        with anyio.move_on_after(self._settings.unload_timeout_s):
            await self._fleet.wait_until(lambda: all(r.state != "unloading" for r in chosen))

    # ── placement ───────────────────────────────────────────────────────────────────

    @property
    def budget_bytes(self) -> int:
        """Memory for models, those that are loaded included."""
        return self._fleet.budget_bytes()

    @property
    def seats(self) -> int:
        """Models that may be loaded at once."""
        return self._settings.max_loaded_models

    def keep_alive(self, of: Mapping[str, float]) -> None:
        """Seconds by a model's `name_key`, where they are others than the node's setting."""
        self._fleet.keeping.configure_names(of, self._fleet.residents)

    async def hold(self, name: str) -> None:
        """Load it, unless it is loaded in whatever shape, and keep it until `release`, `let_go` or
        `unload`. No other model goes for it. Cancel-safe.

        Raises:
            ModelNotFound, InvalidModel: as `Catalogue.resolve`.
            NoCapacity: there is no room beside those that are loaded.
            LoadFailed, Quarantined, QueueFull, Unavailable, DeadlineExceeded.
        """
        key, lease = await self._beside(name, None)
        self._fleet.holds.put(key, name_key(name))
        if lease is not None:
            lease.release()

    async def preload(self, name: str) -> None:
        """Load it, unless it is loaded; it stays until a request says otherwise, or its room is
        needed. No other model goes for it. Cancel-safe. Raises as `hold`."""
        _, lease = await self._beside(name, _FOR_EVER)
        if lease is not None:
            lease.release()

    async def _beside(self, name: str, keep_alive_s: float | None) -> tuple[str, Lease | None]:
        """Have it loaded beside what is; None: it is."""
        spec = await self._catalogue.resolve(name)
        key = load_key(spec)
        there = next((r for r in self._fleet.residents if r.key == key and r.state != "unloading"), None)
        shape = there.shape if there is not None else self.requests.shape(spec, LoadOptions())
        if there is None and self._fleet.needs_room(spec, shape):
            raise NoCapacity(f"{spec.display} has no room beside the models that are loaded")
        if there is not None and there.state == "ready":
            return key, None
        return key, await self.acquire(spec, shape, keep_alive_s, slot=False)

    def release(self, name: str) -> None:
        """Keep it no more under this name: keep-alive counts again. Nothing if it is not held."""
        self._fleet.holds.drop(name_key(name))
        for resident in self._fleet.residents:
            self._fleet.keeping.look_after(resident)

    def retire(self, spec: ModelSpec) -> None:
        """Unload these files as soon as they are idle, under whatever name they are loaded."""
        for resident in self._fleet.residents:
            if resident.key == load_key(spec):
                self._fleet.expire(resident)

    async def let_go(self, name: str) -> None:
        """Unload it once its requests have ended, unless it is kept under another name too.
        Returns when it is gone, however long that takes."""
        self.release(name)
        key = name_key(name)
        mine = (r for r in self._fleet.residents if name_key(r.spec.name) == key)
        going = [resident for resident in mine if resident.key not in self._fleet.holds]
        for resident in going:
            self._fleet.expire(resident)
        # One that is asked for anew meanwhile, and told how long to stay, stays.
        await self._fleet.wait_until(lambda: all(r.state == "gone" or r.keep_alive_s for r in going))

    async def close(self, drain_s: float = 10.0) -> None:
        """Refuse what is new or waits, let what runs end for `drain_s`, then stop it and unload.

        Idempotent. The engines stay open: whoever made them closes them.
        """
        self._fleet.refuse_new()
        with anyio.move_on_after(drain_s):
            await self._fleet.wait_until(lambda: all(r.active == 0 for r in self._fleet.residents))
        for job in list(self._jobs):
            job.fail(Unavailable(CLOSING))
        await self._fleet.unload_all()

    # ── for jobs ────────────────────────────────────────────────────────────────────

    async def acquire(
        self,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        *,
        slot: bool = True,
        ask: Ask = ANYONE,
        told: Callable[[Queued], None] | None = None,
    ) -> Lease:
        self._used(spec)
        return await self._fleet.acquire(spec, shape, keep_alive_s, slot=slot, ask=ask, told=told)

    def lease_now(self, spec: ModelSpec, shape: Shape, keep_alive_s: float | None, ask: Ask) -> Lease | None:
        """A slot, if nobody has to be waited for; None: `acquire` waits, or says why not."""
        lease = self._fleet.lease_now(spec, shape, keep_alive_s, ask=ask)
        if lease is not None:
            self._used(spec)
        return lease

    def measured(self, lease: Lease, done: Done) -> None:
        """An answer has ended, and its lease not yet."""
        resident = lease.resident
        if resident is None or not (done.prompt_s or done.completion_s):  # not every engine says
            return
        device, size, alone = resident.device, resident.spec.weights_bytes, lease.alone is not None
        if alone:
            self.speeds.add(device, size, done.completion_tokens, done.completion_s)
        self.speeds.add_read(
            device, size, done.prompt_tokens - done.cached_tokens, done.prompt_s, alone=alone
        )

    def finished(self, job: Job) -> None:
        self._jobs.discard(job)
