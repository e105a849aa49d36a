"""One loaded model of llama.cpp, over llama-server's HTTP protocol."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from ollama_distributed.adapters.engines.call import Call, EventParser
from ollama_distributed.adapters.engines.dial import Ahead
from ollama_distributed.adapters.engines.fetch import fetch, fetch_json
from ollama_distributed.adapters.engines.http import Route
from ollama_distributed.adapters.engines.intake import Intake
from ollama_distributed.adapters.engines.llamacpp import chat
from ollama_distributed.adapters.engines.llamacpp.enforced import EnforcedCalls, WantedCalls
from ollama_distributed.adapters.engines.llamacpp.guidance import guided
from ollama_distributed.adapters.engines.llamacpp.launch import RunnerParams
from ollama_distributed.adapters.engines.llamacpp.process import RunnerProcess
from ollama_distributed.adapters.engines.llamacpp.protocol import (
    completion_body,
    completion_path,
    error_of_body,
    metric,
)
from ollama_distributed.adapters.engines.llamacpp.rendering import RenderWatch
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema, is_light
from ollama_distributed.adapters.engines.llamacpp.slots import Seat, Slots, beginning
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream, FormatStream
from ollama_distributed.adapters.engines.llamacpp.threads import Computing
from ollama_distributed.adapters.engines.llamacpp.unparsed import FormattedChat, SpokenChat
from ollama_distributed.adapters.engines.llamacpp.vocabulary import Fragments
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    EngineError,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.inference import JsonSchema, Message, Think, Tool
from ollama_distributed.base.tokens import EngineSink
from ollama_distributed.serving.ports import (
    ChatRequest,
    CompletionRequest,
    EngineInfo,
    LoadPlan,
    RunnerMetrics,
)

T = TypeVar("T")

QUICK_S = 30.0
"""Templates and tokens: microseconds of work, but the machine may be overcommitted."""
TEMPLATE_S = 30.0
"""A template that takes longer does not end."""
BATCH_S = 600.0
"""One batch of embeddings or documents."""
HEALTH_S = 1.0
METRICS_S = 0.2
"""`/metrics` waits behind the batch that runs (trap 7); the last figures serve meanwhile."""
EXIT_GRACE_S = 1.0
"""Between a broken connection and the news of the process's end, which tells the reason."""


class LlamaCppRunner:
    renders = True

    def __init__(
        self,
        process: RunnerProcess,
        *,
        plan: LoadPlan,
        info: EngineInfo,
        params: RunnerParams,
        fragments: Fragments | None,
        on_gone: Callable[[LlamaCppRunner], None],
        intake: Intake | None = None,
        computing: Computing | None = None,
    ) -> None:
        self.process = process
        self._plan = plan
        self._info = info
        self._params = params
        self._fragments = fragments
        self._on_gone = on_gone
        self._intake = intake
        self._headers = {"authorization": f"Bearer {params.api_key}"}
        self._ahead = Ahead(process.address.path)
        """For the answer, opened when its prompt is rendered."""
        self._routes: dict[str, Route] = {}
        self._calls: set[Call] = set()
        self._rendering = RenderWatch(lambda one: self.apply_template(one.messages, one.tools, one.think))
        self._slots = Slots(plan.slots, copies=params.cache_ram_mib > 0)
        self._seats: dict[Call, Seat] = {}
        self._computing = computing
        self._asking = 0
        self._exit_callbacks: list[Callable[[OllamaDistributedError | None], None]] = []
        self._gone = False
        self._thread = anyio.CapacityLimiter(1)
        self._death: RunnerDied | None = None
        self._burial: asyncio.Task[None] | None = None
        self._last_metrics = RunnerMetrics(slots=plan.slots, slots_busy=0)
        process.on_exit(self._exited)

    # ── facts ───────────────────────────────────────────────────────────────────────

    @property
    def plan(self) -> LoadPlan:
        return self._plan

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def memory_bytes(self) -> int:
        return self.process.memory_bytes

    def on_exit(self, callback: Callable[[OllamaDistributedError | None], None]) -> None:
        if self._gone:
            asyncio.get_running_loop().call_soon(callback, self._death)
        else:
            self._exit_callbacks.append(callback)

    # ── answers ─────────────────────────────────────────────────────────────────────

    def generate(self, request: CompletionRequest, sink: EngineSink) -> Call:
        call = self._open(sink)

        def written(prompt: str | tuple[Any, ...]) -> dict[str, Any]:
            prepared = msgspec.structs.replace(request, prompt=prompt)
            return completion_body(prepared, context_tokens=self._plan.context_tokens)

        def send(body: dict[str, Any]) -> None:
            parser = CompletionStream(
                fragments=self._fragments,
                # Under a grammar a window that slides would lose the beginning of the value.
                stop_at_tokens=None
                if request.shift and request.format is None and not request.grammar
                else self._plan.context_tokens,
                top_logprobs=request.top_logprobs or 0,
            )
            checked = parser if request.format is None else FormatStream(parser)
            call.send(self._route(completion_path(request)), body | self._seated(call, request), checked)

        async def send_later() -> None:
            prompt = request.prompt
            if request.images and not isinstance(prompt, str):
                prompt = await self._as_text(prompt)
            send(await self._aside(partial(written, prompt)))

        takes_long = isinstance(request.format, JsonSchema) and not is_light(request.format.schema)
        if takes_long or (request.images and not isinstance(request.prompt, str)):
            call.prepare(send_later)
        else:
            call.begin(lambda: send(written(request.prompt)))
        return call

    def chat(self, request: ChatRequest, sink: EngineSink) -> Call:
        call = self._open(sink)

        async def steps() -> None:
            if chat.enforced(request):
                await self._aside(partial(check_schema, chat.calls_schema(request)))
                body = chat.chat_body(chat.wanted(request), context_tokens=self._plan.context_tokens)
                wanted = WantedCalls(lambda: call.again(lambda: self._send_enforced(call, request)))
                self._send_chat(call, request, body, wanted)
            else:
                body = chat.chat_body(request, context_tokens=self._plan.context_tokens)
                parser: EventParser = chat.ChatStream(top_logprobs=request.top_logprobs or 0)
                if request.format is None:  # else text would not be what was asked for
                    parser = FormattedChat(
                        parser, lambda: call.again(lambda: self._send_spoken(call, request))
                    )
                self._send_chat(call, request, body, parser)

        call.prepare(steps)
        return call

    def _send_chat(self, call: Call, request: ChatRequest, body: dict[str, Any], parser: EventParser) -> None:
        watched = self._rendering.over(parser, request, TEMPLATE_S)
        call.send(self._route("/v1/chat/completions"), body | self._seated(call, request), watched)

    def _route(self, path: str) -> Route:
        """Of an answer."""
        if (route := self._routes.get(path)) is None:
            route = Route(self.process.address, "POST", path, self._headers, ahead=self._ahead)
            self._routes[path] = route
        return route

    async def _completion(self, request: ChatRequest, top_logprobs: int | None = None) -> dict[str, Any]:
        """The chat as a completion of its prompt; without thinking, which nothing would take apart."""
        tools = () if request.tool_choice == "none" else request.tools
        prompt = await self.apply_template(request.messages, tools, think=False)
        completion = CompletionRequest(
            prompt=prompt,
            images=tuple(image for message in request.messages for image in message.images),
            sampling=request.sampling,
            top_logprobs=top_logprobs,
        )
        return completion_body(completion, context_tokens=self._plan.context_tokens)

    async def _send_spoken(self, call: Call, request: ChatRequest) -> None:
        body = await self._completion(request, request.top_logprobs)
        spoken = SpokenChat(
            CompletionStream(
                fragments=self._fragments,
                stop_at_tokens=self._plan.context_tokens,
                top_logprobs=request.top_logprobs or 0,
            )
        )
        call.send(self._route("/completion"), body | self._seated(call, request), spoken)

    async def _send_enforced(self, call: Call, request: ChatRequest) -> None:
        # Under the schema the first token already belongs to the call: no room to think.
        body = await self._completion(request)
        body["json_schema"] = await self._aside(partial(guided, chat.calls_schema(request)))
        calls = EnforcedCalls(stop_at_tokens=self._plan.context_tokens)
        call.send(self._route("/completion"), body | self._seated(call, request), calls)

    # ── questions ───────────────────────────────────────────────────────────────────

    async def apply_template(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> str:
        body = chat.template_body(messages, tools, think)
        asyncio.get_running_loop().call_soon(self._ahead.open)  # once the question is on its way
        try:
            answer = await self._ask("/apply-template", body, deadline_s=TEMPLATE_S)
        except DeadlineExceeded as exc:
            # It would render on for nobody: the end of its process alone stops that (S-04).
            self.kill(f"its chat template was not rendered within {TEMPLATE_S:g} s")
            raise self._unavailable() from exc
        return str(answer["prompt"])

    async def template_ids(self, *_: object) -> None:
        """llama.cpp renders text, and takes it apart together with the prompt."""

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        answer = await self._ask(
            "/tokenize", {"content": text, "add_special": add_special, "parse_special": True}
        )
        return [int(token) for token in answer["tokens"]]

    async def detokenize(self, ids: Sequence[int]) -> str:
        return str((await self._ask("/detokenize", {"tokens": list(ids)}))["content"])

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        if not self._params.pooling or self._params.pooling == "rank":
            # Without a name: a model of another name with the same weights may have loaded it.
            raise Unsupported("this model does not support embeddings")
        body = {
            "input": [text if isinstance(text, str) else list(text) for text in inputs],
            "encoding_format": "base64",
        }
        answer = await self._ask("/v1/embeddings", body, deadline_s=BATCH_S)
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return [_floats(row["embedding"]) for row in rows], int(answer["usage"]["prompt_tokens"])

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        if self._params.pooling != "rank":
            raise Unsupported("this model does not support rerank")
        body = {"query": query, "documents": list(documents)}
        answer = await self._ask("/v1/rerank", body, deadline_s=BATCH_S)
        scores = [0.0] * len(documents)
        for row in answer["results"]:
            scores[int(row["index"])] = float(row["relevance_score"])
        return scores, int(answer["usage"]["prompt_tokens"])

    async def healthy(self) -> bool:
        """Asks `/health` only: it alone does not wait behind the batch (trap 7)."""
        if self._gone:
            return False
        try:
            answer = await fetch(self.process.address, "GET", "/health", deadline_s=HEALTH_S)
        except OllamaDistributedError:
            return False
        return answer.status == 200

    async def metrics(self) -> RunnerMetrics:
        """Slots are counted here; speeds are the runner's, or the last known while it is busy."""
        with contextlib.suppress(DeadlineExceeded, RunnerDied, Unavailable):  # the last known
            answer = await fetch(
                self.process.address, "GET", "/metrics", headers=self._headers, deadline_s=METRICS_S
            )
            if answer.status == 200:
                text = answer.body.decode("utf-8", "replace")
                self._last_metrics = RunnerMetrics(
                    slots=self._plan.slots,
                    slots_busy=0,
                    tokens_per_s=metric(text, "predicted_tokens_seconds"),
                    prompt_tokens_per_s=metric(text, "prompt_tokens_seconds"),
                )
        running = len(self._calls) + self._asking
        return msgspec.structs.replace(
            self._last_metrics,
            slots_busy=min(running, self._plan.slots),
            queued=max(running - self._plan.slots, 0),
        )

    def kill(self, reason: str) -> None:
        # Not after its exit: a process that waits for a dead disk ends when it likes.
        self._over(RunnerDied(f"the runner of {self._params.alias} was killed: {reason}"))
        self.process.kill()

    async def unload(self, grace_s: float = 2.0) -> None:
        await self.process.stop(grace_s)
        if self._burial is not None:
            await asyncio.shield(self._burial)

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _aside(self, work: Callable[[], T]) -> T:
        """In a thread, of which a runner has one: a schema of 64 KiB would hold the loop for 25 ms."""
        return await anyio.to_thread.run_sync(work, limiter=self._thread)

    async def _as_text(self, prompt: tuple[Any, ...]) -> str:
        """A mixed prompt as text: an answer with images goes on from its text."""
        parts = [prompt] if all(isinstance(part, int) for part in prompt) else prompt
        return "".join([p if isinstance(p, str) else await self.detokenize(p) for p in parts])

    async def _ask(self, path: str, body: dict[str, Any], *, deadline_s: float = QUICK_S) -> Any:
        """One question with a whole answer.

        Raises:
            OllamaDistributedError: the runner's own error, or `RunnerDied`.
        """
        if self._gone:
            raise self._unavailable()
        self._asking += deadline_s == BATCH_S
        try:
            status, value = await fetch_json(
                self.process.address,
                "POST",
                path,
                headers=self._headers,
                body=body,
                deadline_s=deadline_s,
            )
        except (RunnerDied, Unavailable) as exc:
            raise await self._why(exc) from exc
        finally:
            self._asking -= deadline_s == BATCH_S
        if status >= 400:
            raise error_of_body(status, msgspec.json.encode(value))
        if not isinstance(value, dict):
            raise EngineError(f"the engine answered {path} with something else than an object")
        return value

    def _open(self, sink: EngineSink) -> Call:
        call = Call(sink, self._call_over, self._lost, read_error=error_of_body, intake=self._intake)
        if self._gone:
            call.prepare(self._refuse)
        else:
            self._calls.add(call)
        return call

    def _seated(self, call: Call, request: CompletionRequest | ChatRequest) -> dict[str, Any]:
        """Where the call is to run."""
        now_s = asyncio.get_running_loop().time()
        if (before := self._seats.pop(call, None)) is not None:
            self._slots.leave(before, now_s, whole=False)
        seat = self._seats[call] = self._slots.take(request.tenant, beginning(request), now_s)
        return seat.fields

    def _call_over(self, call: Call) -> None:
        self._calls.discard(call)
        if (seat := self._seats.pop(call, None)) is not None:
            self._slots.leave(seat, asyncio.get_running_loop().time(), whole=call.whole)
        if self._computing is not None and call.whole and self._computing.answered():
            asyncio.get_running_loop().run_in_executor(None, self._computing.let_others_first)

    async def _refuse(self) -> None:
        raise self._unavailable()

    def _unavailable(self) -> OllamaDistributedError:
        return self._death or Unavailable(f"{self._params.alias} is unloaded")

    def _lost(self, call: Call, error: OllamaDistributedError) -> None:
        """A stream broke: the process's end usually follows and tells more."""

        async def tell() -> None:
            raise await self._why(error)

        call.prepare(tell)

    async def _why(self, error: OllamaDistributedError) -> OllamaDistributedError:
        await asyncio.wait([self.process.exited], timeout=EXIT_GRACE_S)
        if self._gone:
            return self._unavailable()
        # It lives, and others are on it: one lost connection is not its death.
        lost = f"the runner of {self._params.alias} closed the connection of this answer"
        return Unavailable(lost) if isinstance(error, RunnerDied) else error

    def _exited(self, _returncode: int) -> None:
        if self.process.stopping:
            self._over(None)
        else:
            how = self.process.how_it_ended()
            self._over(RunnerDied(f"the runner of {self._params.alias} died: {how}"))
        self._burial = asyncio.get_running_loop().create_task(self._bury(), name="bury a runner")

    def _over(self, death: RunnerDied | None) -> None:
        """Nothing more comes of it; None: as we wished. Idempotent."""
        if self._gone:
            return
        self._gone, self._death = True, death
        self._rendering.close()
        self._ahead.close()
        for call in list(self._calls):
            call.fail(self._unavailable())
        for callback in self._exit_callbacks:
            callback(death)
        self._exit_callbacks.clear()

    async def _bury(self) -> None:
        await self.process.stop(0.0)
        self._on_gone(self)


def _floats(text: str) -> list[float]:
    values = array.array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
